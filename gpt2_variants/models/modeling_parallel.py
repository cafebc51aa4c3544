"""Parallel: GPT-2 whose blocks are taken in pairs that read the same input; half as deep, as many weights.

What differs from GPT-2: the blocks (0, 1), (2, 3), ... form pairs. L and R are the full outputs of a pair's two blocks
for the same input h, each with its own residual connection. The next input is (L + R) / 2 ("mean"), L + R ("add"), or
W [L; R] + c ("concat"), where `bottleneck`, a linear map from 2E to E, is one module shared by all pairs.

Shape legend: B batch, S tokens, E channels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .modeling_base import CACHE_NAME, VariantLMHeadModel, VariantModel
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
        """Return one (B, S, E) for a pair's two."""
        if self.bottleneck is not None:
            return self.bottleneck(torch.cat([left, right], dim=-1))
        total = left + right
        return total / 2 if self.config.bottleneck_method == "mean" else total

    # GPT2Model's own forward runs the blocks one after the other, and cannot be told otherwise.
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """As `GPT2Model.forward`; `past_key_values` is the older name of `cache`.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`, or an odd number of blocks.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            assert input_ids is not None
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            given_shape = input_ids.shape
            inputs_embeds = self.wte(input_ids.view(-1, given_shape[-1]))
        else:
            given_shape = inputs_embeds.shape[:-1]
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if use_cache and self.config.add_cross_attention and not isinstance(cache, EncoderDecoderCache):
            cache = EncoderDecoderCache(cache, DynamicCache(config=self.config))
        if position_ids is None:
            first = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(given_shape[-1], device=inputs_embeds.device) + first).unsqueeze(0)
        hidden = inputs_embeds + self.wpe(position_ids)
        if attention_mask is not None and attention_mask.ndim < 4:
            attention_mask = attention_mask.view(len(inputs_embeds), -1)
        mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids)
        if encoder_hidden_states is not None:
            encoder_attention_mask = create_bidirectional_mask(
                self.config, inputs_embeds, encoder_attention_mask, encoder_hidden_states=encoder_hidden_states
            )
        if token_type_ids is not None:
            hidden = hidden + self.wte(token_type_ids.view(-1, given_shape[-1]))
        hidden = self.run_pairs(
            self.drop(hidden),
            cache if not (self.gradient_checkpointing and self.training) else None,
            mask,
            encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            use_cache=use_cache,
            position_ids=position_ids,
            **kwargs,
        )
        kept: dict[str, Any] = {CACHE_NAME: cache if use_cache else None}
        return BaseModelOutputWithPastAndCrossAttentions(self.ln_f(hidden).view(*given_shape, -1), **kept)

    def run_pairs(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(B, S, E) -> (B, S, E): the pairs one after the other, with a block's arguments.

        Raises:
            ValueError: an odd number of blocks.
        """
        if len(self.h) % 2:
            raise ValueError(f"{len(self.h)} blocks in h: they are taken in pairs; an even number is needed")
        blocks = list(self.h)
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
