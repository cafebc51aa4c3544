"""GPT-2's transformer of `transformers`, whose parts a variant replaces by classes of its own."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config
from transformers.activations import NewGELUActivation
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, GPT2Model, GPT2PreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .activation import TrainedNewGELU
from .variant_attention import VariantAttention

# What GPT-2's `forward` calls the cache: transformers 5.24 renamed `past_key_values`. Here both names are taken.
CACHE_NAME = "cache" if "cache" in inspect.signature(GPT2Model.forward).parameters else "past_key_values"

# Inductor's: what one kernel may compute and read before an intermediate result is written to memory. By its defaults,
# 30 operations and 8 reads, the gradients of queries, keys and values are written, and then copied into one tensor.
FUSION: dict[str, Any] = {"realize_opcount_threshold": 300, "realize_acc_reads_threshold": 64}


class ScaledInit(GPT2PreTrainedModel):
    """GPT-2's initialisation, also where transformers would leave out a part of it."""

    config_class: type[GPT2Config]

    def _initialize_weights(self, module: nn.Module, *_) -> None:
        # transformers takes classes outside its own package for code that does not know its init flags, and then skips
        # modules without parameters of their own: GPT2Attention and GPT2MLP, whose turn is c_proj's 0.02 / sqrt(2 L).
        super()._initialize_weights(module)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if (reset := getattr(module, "reset_own_parameters", None)) is not None:
            reset()


class BlockGroup(nn.Module):
    """Runs some blocks on end, so that they can be compiled together. It has no weights."""

    def forward(self, run: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return what `run` does: `VariantModel.run_blocks`, with its arguments."""
        return run(*args, **kwargs)


class VariantModel(ScaledInit, GPT2Model):
    """`GPT2Model` with the parts replaced for which a class is given (None: GPT-2's own).

    A part that has a method `reset_own_parameters` is initialised by it, after GPT-2's way; by
    `transformers.initialization`, whose functions leave alone what was loaded.

    Attributes:
        block_class: made as `block_class(config, layer_idx=i)`; a subclass of `GPT2Block`.
        attention_class: of the blocks; made as `attention_class(config, layer_idx=i)`.
        mlp_class: of the blocks; made as `mlp_class(inner_size, config)`.
        norm_class: of both norms of each block and the last one; made as `norm_class(n_embd, eps=...)`.
        position_class: of `wpe`; made as `position_class(n_positions, n_embd)`, and called with position ids (B, S).
        embedding_class: of `wte`; made as `embedding_class(vocab_size, n_embd)`; its `weight` (V, E) is the head's.
    """

    block_class: type[GPT2Block] | None = None
    attention_class: type[VariantAttention] | None = None
    mlp_class: Callable[..., nn.Module] | None = None
    norm_class: Callable[..., nn.Module] | None = None
    position_class: Callable[..., nn.Module] | None = None
    embedding_class: Callable[..., nn.Module] | None = None

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        if self.embedding_class is not None:
            self.wte = self.embedding_class(config.vocab_size, config.n_embd)  # type: ignore[assignment]
        if self.position_class is not None:
            self.wpe = self.position_class(config.n_positions, config.n_embd)  # type: ignore[assignment]
        if self.norm_class is not None:
            self.ln_f = self.norm_class(config.n_embd, eps=config.layer_norm_epsilon)  # type: ignore[assignment]
        for layer_idx in range(len(self.h)):
            if self.block_class is not None:
                self.h[layer_idx] = self.block_class(config, layer_idx=layer_idx)
            self._replace_parts(self.h[layer_idx], layer_idx)
        self.block_group = BlockGroup()
        self.compiled_together = 0  # how many blocks `block_group` is compiled for; 0: it is not
        own = (self.block_class, self.attention_class, self.mlp_class, self.norm_class)
        if any(part is not None for part in (*own, self.position_class, self.embedding_class)):
            self.post_init()  # initialises what was replaced

    def _replace_parts(self, block: nn.Module, layer_idx: int) -> None:
        config = self.config
        if self.attention_class is not None:
            block.attn = self.attention_class(config, layer_idx=layer_idx)
        if self.mlp_class is not None:
            block.mlp = self.mlp_class(config.n_inner if config.n_inner is not None else 4 * config.n_embd, config)
        mlp: Any = getattr(block, "mlp", None)  # a block of the variant's own may have none
        if type(getattr(mlp, "act", None)) is NewGELUActivation:
            mlp.act = TrainedNewGELU()
        if self.norm_class is not None:
            for name in ("ln_1", "ln_2"):
                if hasattr(block, name):  # a block of the variant's own may have one norm
                    setattr(block, name, self.norm_class(config.n_embd, eps=config.layer_norm_epsilon))

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
        """Do what `GPT2Model.forward` does, by `run_blocks`; `past_key_values` is the older name of `cache`.

        Raises:
            ValueError: both or neither of `input_ids` and `inputs_embeds`.
        """
        for asked in ("output_attentions", "output_hidden_states"):  # `capture_outputs` sees to them
            kwargs.pop(asked, None)
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
        given_positions = position_ids
        if position_ids is None:
            first = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(given_shape[-1], device=inputs_embeds.device) + first).unsqueeze(0)
        hidden = inputs_embeds + self.wpe(position_ids)
        if attention_mask is not None and attention_mask.ndim < 4:
            attention_mask = attention_mask.view(len(inputs_embeds), -1)
        # It looks into given positions for packed sequences, for which a GPU would have to be waited for
        mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache, given_positions)
        if encoder_hidden_states is not None:
            encoder_attention_mask = create_bidirectional_mask(
                self.config, inputs_embeds, encoder_attention_mask, encoder_hidden_states=encoder_hidden_states
            )
        if token_type_ids is not None:
            hidden = hidden + self.wte(token_type_ids.view(-1, given_shape[-1]))
        hidden = self._run_in_groups(
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

    def run_blocks(self, blocks: Sequence[nn.Module], hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """(B, S, E) -> (B, S, E): `blocks` one after the other, with a block's arguments.

        Args:
            blocks: of `h`: all of them, or an even number on end that begins at an even place.
        """
        for block in blocks:
            hidden = block(hidden, *args, **kwargs)
        return hidden

    def compile_blocks(self, together: int) -> None:
        """`torch.compile` the blocks, `together` at a time: one compilation for all groups that are alike.

        What stands between two blocks, a sum and a norm, then is fused as well. Under gradient checkpointing they are
        compiled one by one, as each is a unit of what is computed again.

        Raises:
            ValueError: `together` is neither 1 nor an even number above.
        """
        if together < 1 or (together > 1 and together % 2):
            raise ValueError(f"together={together}: 1 or an even number of blocks is allowed")
        for part in (*self.h, self.block_group):
            part.compile(options=FUSION)
        self.compiled_together = together

    def _run_in_groups(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        blocks, size = list(self.h), self.compiled_together
        if size < 2 or (self.gradient_checkpointing and self.training):
            return self.run_blocks(blocks, hidden, *args, **kwargs)
        for first in range(0, len(blocks), size):
            hidden = self.block_group(self.run_blocks, blocks[first : first + size], hidden, *args, **kwargs)
        return hidden
