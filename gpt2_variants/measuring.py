"""Measuring a run: one stopwatch, FLOPs and MFU, memory.

MFU convention (PaLM, Chowdhery et al., 2022, appendix B; the same as nanoGPT's): 6 N + 12 L E S FLOPs per position, N
all parameters with the tied embedding counted once, attention counted in full though it is causal, against the device's
dense bf16 peak. A module that a forward pass applies k times counts k times in N, since it is multiplied with k times.
"""

import contextlib
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models.modeling_base import VariantLMHeadModel

# Dense bf16 peak in FLOP/s, from NVIDIA's data sheets; the first name that the device's name contains counts.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
)


def applied_parameters(model: "VariantLMHeadModel") -> int:
    """Count the parameters of `model`, which is on the meta device: those of a module once for each time it is applied.

    Tied ones and those of a module that is looked up (an embedding) count once. Where the model cannot run without
    data, every parameter counts once, with a warning.
    """
    import torch

    times: Counter[torch.nn.Module] = Counter()
    multiplied = [m for m in model.transformer.modules() if not isinstance(m, torch.nn.Embedding)]
    hooks = [m.register_forward_pre_hook(lambda module, _: times.update([module])) for m in multiplied]
    ids, mask = torch.zeros(1, 2, dtype=torch.long, device="meta"), torch.ones(1, 1, 2, 2, device="meta").bool()
    try:
        with torch.no_grad():  # a 4-D mask, since transformers looks at the values of what it makes one from
            model.transformer(ids, attention_mask=mask, use_cache=False)
    except Exception as err:  # of a user's own variant
        warnings.warn(
            f"FLOPs: {type(model).__name__} does not run without data ({err}); a module that it applies "
            "several times counts once",
            stacklevel=2,
        )
        times.clear()
    finally:
        for hook in hooks:
            hook.remove()
    again = sum((n - 1) * sum(p.numel() for p in module.parameters(recurse=False)) for module, n in times.items())
    return model.num_parameters() + again


def flops_per_token(num_parameters: int, n_layer: int, n_embd: int, block_size: int, positions: int) -> float:
    """Return training FLOPs (forward and backward) per token of data, in blocks of `block_size` tokens.

    `num_parameters` are those that are applied, see `applied_parameters`;
    `positions` is how many positions the model computes for a block: S, or 2S-1 for duo-predict.
    """
    return (6 * num_parameters + 12 * n_layer * n_embd * block_size) * positions / block_size


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of the device in FLOP/s; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS if name in device_name), None)


def peak_memory_bytes() -> int:
    """Return the most memory this process has held: of the GPU by torch's allocator, without one the resident set."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def duration(seconds: float) -> str:
    """Return `seconds` in words: tenths below a minute, then minutes and seconds, then hours and minutes."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return "{} h {} min".format(*divmod(round(seconds / 60), 60))


class Stopwatch:
    """Seconds of training: those between `start` and `stop`, on top of the `elapsed` ones of earlier sessions."""

    def __init__(self, elapsed: float = 0.0):
        self._before = elapsed
        self._since: float | None = None

    def start(self) -> None:
        """Begin to count."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Count no more, until the next `start`."""
        self._before, self._since = self.elapsed, None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the seconds inside."""
        self.start()
        try:
            yield
        finally:
            self.stop()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count no seconds inside."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._before + running
