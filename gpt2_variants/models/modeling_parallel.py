"""Parallel: GPT-2 whose blocks are taken in pairs that read the same input; half as deep, as many weights.

What differs from GPT-2 (`variants.md`, section 2): the blocks (0, 1), (2, 3), ... form pairs. With L and R the full
outputs of a pair's two blocks on the same h, each with its own residual connection: mean: h <- (L + R) / 2; add:
h <- L + R; concat: h <- W [L; R] + c, where `bottleneck`, a linear map from 2E to E, is one module shared by all pairs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import GPT2Config
from transformers.generation.utils import GenerateOutput
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from .modeling_base import VariantLMHeadModel, VariantModel
from .wide_pair import WidePair, can_be_wide

METHODS = ("mean", "add", "concat")


class ParallelGPT2Config(GPT2Config):
    """`GPT2Config` with `bottleneck_method`: how a pair's outputs become one; mean, add or concat.

    Raises:
        ValueError: an odd `n_layer`, or another method.
    """

    model_type = "parallel-gpt2"

    bottleneck_method: str = "mean"

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        if self.bottleneck_method not in METHODS:
            raise ValueError(f"bottleneck_method={self.bottleneck_method!r}: one of {', '.join(METHODS)} is allowed")
        if self.n_layer % 2:
            raise ValueError(f"n_layer={self.n_layer}: layers are taken in pairs; an even number is needed")


class PairedBlocks(nn.ModuleList):
    """The blocks h.0, h.1, ... of GPT-2; iterating gives one callable per pair, with a block's signature."""

    def __init__(self, blocks: nn.ModuleList, merge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__(blocks)
        self._merge = merge
        self._wide: dict[nn.Module, WidePair] = {}

    def __iter__(self) -> Iterator[Callable[..., torch.Tensor]]:  # type: ignore[override]  # GPT2Model only calls them
        return (partial(self._run_pair, left, right) for left, right in self._pairs())

    __repr__ = nn.Module.__repr__  # ModuleList's iterates, and would print pairs that hold this list again

    def _pairs(self) -> Iterator[tuple[GPT2Block, GPT2Block]]:
        blocks = cast(Iterator[GPT2Block], super().__iter__())
        return zip(blocks, blocks, strict=True)

    def _run_pair(self, left: nn.Module, right: nn.Module, hidden: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        wide = self._wide.get(left)
        if wide is not None and hidden.shape[1] == 1 and not wide.observed():
            return self._merge(*wide(hidden, *args, **kwargs))
        return self._merge(left(hidden, *args, **kwargs), right(hidden, *args, **kwargs))

    @contextmanager
    def widened(self) -> Iterator[None]:
        """While it lasts, steps of one token run the blocks of a pair as one computation, where they can be.

        For as long the blocks' weights must not change, and lie in memory twice.
        """
        self._wide = {left: WidePair(left, right) for left, right in self._pairs() if can_be_wide(left, right)}
        try:
            yield
        finally:
            self._wide = {}


class ParallelGPT2Model(VariantModel):
    """`GPT2Model` whose blocks run in pairs on the same input."""

    config_class = ParallelGPT2Config
    h: PairedBlocks

    def __init__(self, config: ParallelGPT2Config):
        super().__init__(config)
        self.bottleneck = nn.Linear(2 * config.n_embd, config.n_embd) if config.bottleneck_method == "concat" else None
        self.h = PairedBlocks(self.h, self.merge)
        self.post_init()  # initialises the bottleneck

    def merge(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """One (B, S, E) of a pair's two."""
        if self.bottleneck is not None:
            return self.bottleneck(torch.cat([left, right], dim=-1))
        total = left + right
        return total / 2 if self.config.bottleneck_method == "mean" else total


class ParallelGPT2LMHeadModel(VariantLMHeadModel):
    """Parallel GPT-2 with its language modelling head."""

    config_class = ParallelGPT2Config
    transformer_class = ParallelGPT2Model
    transformer: ParallelGPT2Model

    def generate(self, *args: Any, **kwargs: Any) -> GenerateOutput | torch.LongTensor:
        """As for every causal LM; each new token takes half of GPT-2's depth, see `PairedBlocks.widened`."""
        with self.transformer.h.widened():
            return super().generate(*args, **kwargs)  # type: ignore[misc]  # a protocol that GPT-2 does not meet either
