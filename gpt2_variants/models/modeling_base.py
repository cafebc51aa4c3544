"""What every variant shares: GPT-2 of `transformers`, opened at the places where the variants differ.

Shape legend: B batch, S tokens, N predictions, H heads, D head size, E = H * D, V vocabulary.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GPT2Config
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import (
    GPT2Attention,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2PreTrainedModel,
    eager_attention_forward,
)

from .loss_head import IGNORE_INDEX, LMHead, TokenScores
from .precision import float32_or_better

# What GPT-2's `forward` calls the cache: transformers 5.24 renamed `past_key_values`. Here both names are taken.
CACHE_NAME = "cache" if "cache" in inspect.signature(GPT2Model.forward).parameters else "past_key_values"


@dataclass
class VariantOutput(CausalLMOutputWithCrossAttentions):
    """`CausalLMOutputWithCrossAttentions` and, by stream of predictions ("next_token", for duo-predict also "infill"):

    Attributes:
        token_scores: stream -> `TokenScores`, when asked for by `return_token_scores=True`.
    """

    token_scores: dict[str, TokenScores] | None = None


class Float32Parameters(nn.Module):
    """Mixin of a module whose parameters and buffers count in float32, whatever the dtype of the model around it.

    They survive `model.bfloat16()`, and `from_pretrained(dtype=...)` where `_keep_in_fp32_modules_strict` names them.
    A training engine that casts a parameter all the same hands its float32 master value in by `set_master`.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Float32Parameters":
        def without_rounding(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            return tensor.to(result.device) if result.dtype.itemsize < tensor.dtype.itemsize else result

        return super()._apply(without_rounding, recurse)

    def set_master(self, name: str, value: torch.Tensor) -> None:
        """From now on `exact(name)` is `value`, with the gradient going to the parameter `name`."""
        if not hasattr(self, f"{name}_master"):
            self.register_buffer(f"{name}_master", torch.empty_like(value), persistent=False)
        getattr(self, f"{name}_master").copy_(value)

    def exact(self, name: str) -> torch.Tensor:
        """The parameter `name` in float32 or better: its master value, if there is one, else its own."""
        own = float32_or_better(getattr(self, name))
        master = getattr(self, f"{name}_master", None)
        return own if master is None else master + (own - own.detach())


def recompute_blocks(model: PreTrainedModel) -> None:
    """Have `model` recompute its blocks in the backward pass, instead of keeping their activations."""
    # transformers 5.2x renamed it; the older name warns there
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


class VariantAttention(GPT2Attention):
    """GPT-2's self-attention with the softmax part, `attend`, as a method of its own. Computes what GPT-2's does."""

    def reset_own_parameters(self) -> None:
        """Initialise the parameters that GPT-2's attention does not have; here there are none.

        By `transformers.initialization`, whose functions leave alone what was loaded.
        """

    def place(
        self, query: torch.Tensor, key: torch.Tensor, first_slot: int | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`query` and `key` (B, H, S, D) told their places in the sequence; here they are left as they are.

        Args:
            first_slot: the absolute place of the first of the S: how many keys the cache holds already.
        """
        return query, key

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of `query` (B, H, Sq, D) over `key` and `value` (B, H, Sk, D): (B, Sq, H, D), and weights or None.

        The backend is the user's choice (`attn_implementation`: sdpa, eager, flash); `attention_mask` is what
        `transformers.masking_utils.create_causal_mask` makes for that backend.
        """
        backend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attn_dropout.p if self.training else 0.0
        return backend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def forward(  # type: ignore[override]  # transformers calls hidden_states a tuple; it is a tensor there too
        self,
        hidden_states: torch.Tensor,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = False,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, S, E) -> (B, S, E) and the attention weights, if the backend gives them."""
        heads = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query, key, value = (x.view(heads).transpose(1, 2) for x in self.c_attn(hidden_states).split(self.embed_dim, 2))
        cache = past_key_values if cache is None else cache
        query, key = self.place(query, key, first_slot=0 if cache is None else cache.get_seq_length(self.layer_idx))
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        mixed, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.resid_dropout(self.c_proj(mixed.flatten(2))), weights


class ScaledInit(GPT2PreTrainedModel):
    """GPT-2's initialisation, also where transformers would leave out a part of it."""

    config_class: type[GPT2Config]

    def _initialize_weights(self, module: nn.Module, *_) -> None:
        # transformers takes classes outside its own package for code that does not know its init flags, and then skips
        # modules without parameters of their own: GPT2Attention and GPT2MLP, whose turn is c_proj's 0.02 / sqrt(2 L).
        super()._initialize_weights(module)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VariantAttention):
            module.reset_own_parameters()


class VariantModel(ScaledInit, GPT2Model):
    """`GPT2Model` with the attention of its blocks replaced by `attention_class` (None: GPT-2's own)."""

    attention_class: type[VariantAttention] | None = None

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        if self.attention_class is not None:
            for layer_idx, block in enumerate(self.h):
                block.attn = self.attention_class(config, layer_idx=layer_idx)
            self.post_init()  # initialises what was replaced


class VariantLMHeadModel(ScaledInit, GPT2LMHeadModel):
    """`GPT2LMHeadModel` with `transformer_class` inside, and a loss that need not materialise the logits.

    Weights, names, `generate()` and the results are those of `GPT2LMHeadModel`.
    """

    transformer_class: type[VariantModel] = VariantModel

    def __init__(self, config: GPT2Config):
        # Not GPT2LMHeadModel's own __init__, which would build and initialise the stock blocks first.
        super(GPT2LMHeadModel, self).__init__(config)
        self.transformer = self.transformer_class(config)
        self.lm_head = LMHead(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def positions(num_tokens: int) -> int:
        """How many positions the blocks compute for a sequence of `num_tokens` training tokens."""
        return num_tokens

    def compile_parts(self) -> None:
        """`torch.compile` each block, which is one compilation for all alike, and the elementwise part of the loss.

        Names of parameters and results stay as they are, but for rounding.
        """
        for block in self.transformer.h.children():
            block.compile()
        self.lm_head.compile_loss()

    def prediction_streams(
        self, input_ids: torch.Tensor, labels: torch.Tensor, **kwargs
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Stream -> final hidden states (B, N, E) and the targets (B, N) they are to predict.

        `labels` (B, S) are aligned with `input_ids`, as in transformers: the shift to the next token happens here.
        """
        hidden = self.transformer(input_ids, **kwargs).last_hidden_state
        return {"next_token": (hidden[:, :-1], labels[:, 1:])}

    # The names are spelled out because generate() asks the signature whether a model takes position_ids.
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        return_token_scores: bool = False,
        num_items_in_batch: torch.Tensor | float | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """As `GPT2LMHeadModel.forward`; and, for training and evaluation:

        Args:
            labels: (B, S) aligned with `input_ids`; -100 is ignored.
            skip_logits: return the loss alone; the (B, S, V) logits are never materialised.
            return_token_scores: return the scores of every prediction as well; implies `skip_logits`.
            num_items_in_batch: divides the sum over the predictions; by default their count.
            past_key_values: the older name of `cache`.

        Raises:
            ValueError: `skip_logits` or `return_token_scores` without `labels`.
        """
        if skip_logits or return_token_scores:
            if labels is None or input_ids is None:
                raise ValueError("skip_logits and return_token_scores score labels: pass labels=input_ids")
            streams = self.prediction_streams(
                input_ids, labels, attention_mask=attention_mask, position_ids=position_ids, use_cache=False, **kwargs
            )
            if not return_token_scores:
                hidden, targets = (torch.cat(parts, dim=1) for parts in zip(*streams.values(), strict=True))
                total = self.lm_head(hidden, targets, summed=True)
                if num_items_in_batch is None:
                    num_items_in_batch = (targets != IGNORE_INDEX).sum()
                return VariantOutput(loss=total / num_items_in_batch)
            scores = {
                stream: self.lm_head(hidden, targets, with_correct=True)
                for stream, (hidden, targets) in streams.items()
            }
            return VariantOutput(loss=mean_loss(scores, num_items_in_batch), token_scores=scores)
        if num_items_in_batch is not None:
            kwargs["num_items_in_batch"] = num_items_in_batch
        kwargs[CACHE_NAME] = past_key_values if cache is None else cache
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    @torch.no_grad()
    def score(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs) -> dict[str, TokenScores]:
        """`TokenScores` of every stream for `input_ids` (B, S); `labels` are the input ids unless given."""
        labels = input_ids if labels is None else labels
        return self(input_ids, labels=labels, return_token_scores=True, **kwargs).token_scores


def mean_loss(scores: dict[str, TokenScores], num_items_in_batch: torch.Tensor | float | None = None) -> torch.Tensor:
    """The mean over all predictions of all streams: a scalar, in nats. Ignored ones count in neither sum."""
    total = functools.reduce(torch.add, (s.nll.sum() for s in scores.values()))
    if num_items_in_batch is None:
        num_items_in_batch = sum(s.valid.sum() for s in scores.values())
    return total / num_items_in_batch
