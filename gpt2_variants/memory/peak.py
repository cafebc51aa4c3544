"""The most memory that a run takes of a GPU, and what of it a card has room for."""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..models.loss_head import chunk_rows
from ..models.modeling_base import BLOCKS_TOGETHER
from ..ranks import has_cuda
from .meter import Step, faked_steps
from .states import Sharding, States, model_states

if TYPE_CHECKING:
    from ..config.plan import Plan
    from ..models.modeling_base import VariantLMHeadModel

GIB = 1024**3
# Layers of the two models whose steps are counted; of one of any depth the line through them tells.
FEW, MORE = BLOCKS_TOGETHER, 2 * BLOCKS_TOGETHER  # which are compiled together
# What is not in an estimate: CUDA's own, NCCL's buffers, and what the allocator cannot hand out again in one piece;
# that alone was 2.2 GiB beside 57.8 in a dry run of the CUDA path.
RESERVE = 3 * GIB
CARD_80_GB = int(79.2 * GIB)  # what an H100 of 80 GB leaves to a process


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: as messages name it.
        size: bytes of its memory.
        here: whether it is this machine's; else 80 GB are taken for granted.
    """

    name: str
    size: int
    here: bool

    @property
    def room(self) -> int:
        """Bytes for what is estimated."""
        return self.size - RESERVE


def card() -> Card:
    """Return the CUDA device of this process; where there is none, one of 80 GB."""
    if not has_cuda():
        return Card("a card of 80 GB", CARD_80_GB, here=False)
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Card(device.name, device.total_memory, here=True)


class Demand:
    """What a plan's model takes of a GPU, by sequences per forward pass and by how the states are shared out.

    Args:
        model: the plan's, on the meta device.
        compiled: by torch.compile, which keeps fewer activations.
    """

    def __init__(self, plan: "Plan", model: "VariantLMHeadModel", compiled: bool):
        self.plan, self.model, self.compiled = plan, model, compiled
        self._dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
        self._total = model.num_parameters()
        self._largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
        # from here on the loss holds as much as it ever does: a chunk of rows, and the one before
        self._kink = -(-2 * chunk_rows("cuda") // model.positions(plan.block_size))

    def sharding(self, gpus: int | None = None, stage: int | None = None, offload: bool | None = None) -> Sharding:
        """Return how the plan shares out the states; on another number of GPUs, or at another stage, if given."""
        zero = self.plan.ds_config.get("zero_optimization", {})
        return Sharding(
            gpus=self.plan.world_size if gpus is None else gpus,
            stage=self.plan.zero_stage if stage is None else stage,
            offload=bool(self.plan.offload) if offload is None else offload,
            bucket=int(zero.get("reduce_bucket_size", 5e8)),  # DeepSpeed's default
            overlap=bool(zero.get("overlap_comm", False)) or (gpus or 1) > 1,
            weight_bytes=self._dtype.itemsize,
        )

    def states(self, sharding: Sharding | None = None) -> States:
        """Return the bytes of weights, gradients and optimizer states."""
        return model_states(self._total, self._largest, sharding or self.sharding())

    def peak(self, micro_batch: int, sharding: Sharding | None = None) -> int:
        """Return bytes at the peak of a step on `micro_batch` sequences. Raise `NoEstimate`."""
        states = self.states(sharding)
        of_passes = self._most(micro_batch, states.gradient_share, states.buffers)
        return max(states.at_step, states.held + of_passes)

    def activations(self, micro_batch: int) -> int:
        """Return bytes beside all states at the peak of a step on `micro_batch` sequences. Raise `NoEstimate`."""
        return self._most(micro_batch, 0.0, 0)

    def largest_that_fits(self, room: int) -> int | None:
        """Return the most sequences per forward pass that fit into `room` and divide those of a GPU; else None."""
        sequences = self.plan.train_batch_size // self.plan.world_size
        sizes = [n for n in range(1, sequences + 1) if sequences % n == 0]
        return max((n for n in sizes if self.peak(n) <= room), default=None)

    def _most(self, micro_batch: int, share: float, buffers: int) -> int:
        """Return what `Step.most` does, counted for few sequences and for the plan's, and between them on a line.

        A compiled step is counted for the plan's and, of few ones, for the most: fewer take as much less as without.
        """
        own = self.plan.per_device_train_batch_size
        few = min(self._kink, own)
        if micro_batch >= own or micro_batch == few or (micro_batch < few and not self.compiled):
            return self._counted(micro_batch, share, buffers)
        if micro_batch < few:
            less, at_few = (self.uncompiled._counted(n, share, buffers) for n in (micro_batch, few))
            return self._counted(few, share, buffers) * less // at_few
        low, high = (self._counted(n, share, buffers) for n in (few, own))
        return low + (high - low) * (micro_batch - few) // (own - few)

    @functools.cached_property
    def uncompiled(self) -> "Demand":
        """The same without torch.compile."""
        return Demand(self.plan, self.model, compiled=False)

    def _counted(self, micro_batch: int, share: float, buffers: int) -> int:
        layers = self.model.config.n_layer
        if layers <= MORE:
            (step,) = self._steps((layers,), micro_batch)
            return step.most(share, buffers)
        few, more = (step.most(share, buffers) for step in self._steps((FEW, MORE), micro_batch))
        return few + (more - few) * (layers - FEW) // (MORE - FEW)

    @functools.cache  # noqa: B019  # a few small values, of an object that lives as long as its caller
    def _steps(self, depths: tuple[int, ...], micro_batch: int) -> list[Step]:
        plan = self.plan
        how = (plan.gradient_checkpointing, self.compiled, self._dtype)
        return faked_steps(self.model, depths, micro_batch, plan.block_size, *how)
