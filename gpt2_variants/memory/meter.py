"""The bytes that are alive in the course of a training step, counted on tensors without data.

The step is taken for real, forward and backward, by the model's own code, on PyTorch's fake tensors; of a compiled
model through torch.compile, up to where inductor would write kernels.
"""

import contextlib
import copy
import functools
import itertools
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..models import loss_head
from ..models.modeling_base import VariantLMHeadModel, recompute_blocks

ROUNDED_TO = 512  # bytes: what PyTorch's CUDA allocator hands out
# Of the operators of a compiled graph those that inductor leaves to a library, and so cannot fuse with others.
OF_LIBRARIES = ("mm", "bmm", "addmm", "baddbmm", "_scaled_dot_product")


class NoEstimate(ValueError):
    """A model cannot be run without data; says why."""


@dataclass(frozen=True)
class Step:
    """What one micro-batch's forward and backward pass holds, beside the weights.

    Attributes:
        kept: bytes at the end of the forward pass.
        peak: most bytes in the forward pass.
        backward: (bytes of gradients, most other bytes while there were so many), in the course of the backward pass.
    """

    kept: int
    peak: int
    backward: tuple[tuple[int, int], ...]

    def most(self, share: float, buffers: int) -> int:
        """Return the peak in bytes on a rank that keeps `share` of the gradients, with `buffers` bytes to send them."""
        return max([self.peak, *(int(share * grads) + other + buffers for grads, other in self.backward)])


def kept_bytes(model: VariantLMHeadModel, block_size: int, checkpointing: bool = False, compiled: bool = False) -> int:
    """Return bytes in bf16 that each sequence of `block_size` tokens leaves behind at the end of a forward pass."""
    one, two = (faked_step(model, n, block_size, checkpointing, compiled).kept for n in (1, 2))
    return two - one  # without what does not grow with the batch


def faked_step(
    model: VariantLMHeadModel,
    micro_batch: int,
    block_size: int,
    checkpointing: bool = False,
    compiled: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Step:
    """Take a step of a model like `model` on CUDA, on `micro_batch` sequences of `block_size` tokens, without data.

    A fused attention keeps no attention matrix, and of its dropout the seed alone.

    Raises:
        NoEstimate: the model, a user's own, cannot be run so.
    """
    depth = (model.config.n_layer,)
    (step,) = faked_steps(model, depth, micro_batch, block_size, checkpointing, compiled, dtype)
    return step


def faked_steps(
    model: VariantLMHeadModel,
    depths: tuple[int, ...],
    micro_batch: int,
    block_size: int,
    checkpointing: bool,
    compiled: bool,
    dtype: torch.dtype,
) -> list[Step]:
    """Do what `faked_step` does, errors included, for models with each of `depths` layers, compiled once."""
    config = copy.deepcopy(model.config)
    backend = "eager" if config._attn_implementation == "eager" else "sdpa"
    if backend == "sdpa":
        config.attn_pdrop = 0.0  # on a CPU it would not be fused
    meter, steps = _Meter(dtype.itemsize), []
    try:
        with (
            _as_on_cuda(),
            _compiled_without_kernels(meter) if compiled else contextlib.nullcontext(),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            for config.n_layer in depths:
                meter.restart()
                twin = type(model)._from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=backend).train()
                if checkpointing:
                    recompute_blocks(twin)
                if compiled:
                    twin.compile_parts()
                steps.append(_take_step(twin, torch.zeros(micro_batch, block_size, dtype=torch.long), meter))
    except Exception as err:  # a user's model may look at values, and torch says so in many ways
        lines = str(err).strip().splitlines() or [""]
        raise NoEstimate(
            f"{type(model).__name__} does not run without data ({type(err).__name__}: {lines[0]})"
        ) from err
    return steps


def _take_step(model: VariantLMHeadModel, ids: torch.Tensor, meter: "_Meter") -> Step:
    for parameter in model.parameters():
        meter.leave_out(parameter)
        parameter.register_post_accumulate_grad_hook(meter.count_gradient)
    with meter:
        loss = model(input_ids=ids, labels=ids, skip_logits=True).loss
        kept, peak = meter.live, meter.most_by_gradients[0]
        meter.most_by_gradients.clear()
        loss.backward()
    return Step(kept, peak, tuple(sorted(meter.most_by_gradients.items())))


class _Meter(TorchDispatchMode):
    """Adds up the storages that operators make, until they are freed.

    Args:
        width: bytes of the model's own numbers.

    Attributes:
        live: bytes at present, without gradients.
        gradients: bytes of those of parameters so far.
        most_by_gradients: bytes of gradients -> the most of other bytes while there were so many.
        compiled: whether what runs at present is a graph that inductor would fuse.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let torch.compile work inside."""
        return True

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.compiled = False
        self.restart()

    def restart(self) -> None:
        """Count anew, from nothing."""
        self.live = self.gradients = 0
        self.most_by_gradients: dict[int, int] = {}
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.compiled:
            self.count(out)
        elif _of_a_library(func):  # its arguments too are in memory then, whatever they were fused from
            self.count((args, kwargs, out))
        return out

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Never count the memory of `tensor`."""
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = storage

    def count(self, tensors: Any) -> None:
        """Count the memory of all `tensors`, in whatever they are nested, until it is freed."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // ROUNDED_TO) * ROUNDED_TO

        def freed(_: Any) -> None:
            if self._known.pop(key, None) is not None:
                self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.most_by_gradients[self.gradients] = max(self.live, self.most_by_gradients.get(self.gradients, 0))

    def count_gradient(self, parameter: torch.Tensor) -> None:
        """Count the gradient of `parameter` as a gradient from now on."""
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        size = -(-storage.nbytes() // ROUNDED_TO) * ROUNDED_TO
        if isinstance(self._known.get(storage._cdata), weakref.ref):
            self.live -= size
            self._known[storage._cdata] = storage  # which keeps it
        self.gradients += size


def _of_a_library(operator: Any) -> bool:
    if getattr(operator, "namespace", None) not in ("aten", "prims", "prim", "inductor_prims"):
        return True  # of another library, or an operator that takes one
    name = operator.name().partition("::")[2].partition(".")[0]
    return name.startswith(OF_LIBRARIES)


def _waiting(graph: torch.fx.Graph) -> set[torch.fx.Node]:
    """Return the nodes that are used again after a call of a library: they cannot be fused with all of their uses."""
    calls = list(itertools.accumulate(_is_library_call(node) for node in graph.nodes))
    before = dict(zip(graph.nodes, calls, strict=True))
    return {node for node in graph.nodes if any(before[user] > before[node] for user in node.users)}


def _is_library_call(node: torch.fx.Node) -> int:
    return int(node.op == "call_function" and hasattr(node.target, "name") and _of_a_library(node.target))


class _Interpreter(torch.fx.Interpreter):
    """Runs a graph, and counts what inductor would keep in memory between its kernels.

    What is wider than the model's own numbers is not kept, but computed again from those that it was made from.
    """

    def __init__(self, graph: torch.fx.GraphModule, meter: _Meter, waiting: set[torch.fx.Node]):
        super().__init__(graph)
        self._meter, self._waiting = meter, waiting

    def run_node(self, n: torch.fx.Node) -> Any:
        inputs = [self.env[node] for node in n.all_input_nodes]  # some of which are freed afterwards
        out = super().run_node(n)
        if isinstance(out, torch.Tensor) and not _is_library_call(n):
            if out.dtype.itemsize > self._meter.width:
                out.made_from = [x for tensor in inputs for x in self._narrow(tensor, out.numel())]  # type: ignore
            elif n in self._waiting:
                self._meter.count(out)
        return out

    def _narrow(self, value: Any, numel: int) -> list[torch.Tensor]:
        """Return what of its maker's input `value` a wide tensor of `numel` numbers is to be made from again."""
        if not isinstance(value, torch.Tensor) or value.numel() != numel:
            return []  # as of a norm's mean, which is kept as it is
        return getattr(value, "made_from", []) if value.dtype.itemsize > self._meter.width else [value]


@contextlib.contextmanager
def _replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


@contextlib.contextmanager
def _as_on_cuda() -> Iterator[None]:
    """Make models do as on CUDA where they do otherwise on a CPU or on fake tensors."""
    from transformers import masking_utils

    rows = loss_head.chunk_rows("cuda")
    with (
        _replaced(torch.nn.functional, "dropout", _dropout),
        _replaced(loss_head, "chunk_rows", lambda device_type: rows),
        # which looks at values; of whole sequences it finds nothing, and then no mask is made
        _replaced(masking_utils, "find_packed_sequence_indices", lambda position_ids: None),
    ):
        yield


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """Stand in for `torch.nn.functional.dropout` on CUDA, which keeps a byte of each entry; a CPU keeps a factor."""
    return torch.native_dropout(input, p, True)[0] if training and p else input


@contextlib.contextmanager
def _compiled_without_kernels(meter: _Meter) -> Iterator[None]:
    """Send what is compiled inside through all of inductor's passes over graphs, then run the graph itself."""
    from torch._inductor import compile_fx

    def run_graph(graph: torch.fx.GraphModule, _: Any, **kwargs: Any) -> Any:
        waiting = _waiting(graph.graph)

        def run(args: list) -> Any:
            outside, meter.compiled = meter.compiled, True
            try:
                out = _Interpreter(graph, meter, waiting).boxed_run(args)
            finally:
                meter.compiled = outside
            meter.count(out)
            return out

        run._boxed_call = True  # type: ignore[attr-defined]  # AOTAutograd hands its arguments over, to be freed early
        return run

    torch._dynamo.reset()  # a graph of another size would make this one's sizes symbols
    try:
        with _replaced(compile_fx, "compile_fx", functools.partial(compile_fx.compile_fx, inner_compile=run_graph)):
            yield
    finally:
        torch._dynamo.reset()
