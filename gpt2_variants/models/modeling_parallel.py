"""Parallel: GPT-2 whose blocks are taken in pairs that read the same input; half as deep, as many weights.

What differs from GPT-2: the blocks (0, 1), (2, 3), ... form pairs. L and R are the full outputs of a pair's two blocks
for the same input h, each with its own residual connection. The next input is (L + R) / 2 ("mean"), L + R ("add"), or
W [L; R] + c ("concat"), where `bottleneck`, a linear map from 2E to E, is one module shared by all pairs.

Shape legend: B batch, S tokens, E channels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from .modeling_base import VariantLMHeadModel, VariantModel
from .task_heads import task_heads

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

    @property
    def num_pairs(self) -> int:
        """How many pairs there are; `output_hidden_states` gives one entry more."""
        return self.n_layer // 2


class BlockPair(nn.Module):
    """Runs two blocks on the same input. It has no weights; `output_hidden_states` records what it reads and gives."""

    def forward(
        self,
        hidden: torch.Tensor,
        left: nn.Module,
        right: nn.Module,
        merge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(B, S, E) -> (B, S, E): `merge` of what `left` and `right` make of `hidden`, with a block's arguments."""
        return merge(left(hidden, *args, **kwargs), right(hidden, *args, **kwargs))


def _stream_between_pairs() -> OutputRecorder:
    recorder = OutputRecorder(target_class=BlockPair)
    recorder.num_hidden_layers_key = "num_pairs"  # newer versions of transformers count from the end by it
    return recorder


class ParallelGPT2Model(VariantModel):
    """`GPT2Model` whose blocks run in pairs on the same input.

    `h` is an ordinary list of GPT-2's blocks; an even number of them is needed. `output_hidden_states` gives what each
    pair reads and the final state, n_layer / 2 + 1 entries; `output_attentions` gives one entry for each block.
    """

    config_class = ParallelGPT2Config
    _can_record_outputs = {**GPT2PreTrainedModel._can_record_outputs, "hidden_states": _stream_between_pairs()}

    def __init__(self, config: ParallelGPT2Config):
        super().__init__(config)
        self.bottleneck = nn.Linear(2 * config.n_embd, config.n_embd) if config.bottleneck_method == "concat" else None
        self.pair = BlockPair()
        self.post_init()  # initialises the bottleneck

    def merge(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Join the two outputs of a pair, (B, S, E) each, into one."""
        if self.bottleneck is not None:
            return self.bottleneck(torch.cat([left, right], dim=-1))
        total = left + right
        return total / 2 if self.config.bottleneck_method == "mean" else total

    def run_blocks(self, blocks: Sequence[nn.Module], hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(B, S, E) -> (B, S, E): the pairs among `blocks` one after the other, with a block's arguments.

        Raises:
            ValueError: an odd number of blocks.
        """
        if len(blocks) % 2:
            raise ValueError(f"{len(self.h)} blocks in h: they are taken in pairs; an even number is needed")
        for left, right in zip(blocks[::2], blocks[1::2], strict=True):
            hidden = self.pair(hidden, left, right, self.merge, *args, **kwargs)
        return hidden


class ParallelGPT2LMHeadModel(VariantLMHeadModel):
    """Parallel GPT-2 with its language modelling head."""

    config_class = ParallelGPT2Config
    transformer_class = ParallelGPT2Model


ParallelGPT2ForSequenceClassification, ParallelGPT2ForTokenClassification, ParallelGPT2ForQuestionAnswering = (
    task_heads(ParallelGPT2Model)
)
