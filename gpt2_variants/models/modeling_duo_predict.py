"""Duo-predict: GPT-2 that predicts every token twice, from its past, and from its past and its right neighbour.

What differs from GPT-2 (`variants.md`, section 3): beside the tokens t_1..t_S run S-1 mask slots m_1..m_{S-1} through
the same weights. m_k carries the embedding of one extra vocabulary entry and the position embedding of t_k; it attends
to t_1..t_{k-1}, to t_{k+1} and to itself, and predicts t_k. The token stream is plain GPT-2 and never sees a mask slot.

The published code lets m_k attend to t_{k+1} in every layer. From the second layer on that leaks: t_{k+1} has attended
to t_k by then, and m_k reads the very token it is to predict out of its neighbour's state. With `leak_free` m_k sees
t_{k+1} in the first layer only, where the neighbour's state is its embedding. Same weights, same cost.

The two streams lie one after the other, t_1..t_S m_1..m_{S-1}, along the sequence axis. Without labels only the token
stream exists, and the model is an ordinary causal LM.

Shape legend: B batch, S tokens, H heads, D head size, E = H * D, V vocabulary (with the mask entry).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, GPT2Config
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateOutput
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
)

from .duo_attention import duo_attention
from .loss_head import IGNORE_INDEX, score_logits
from .modeling_base import VariantAttention, VariantLMHeadModel, VariantModel, VariantOutput, mean_loss


class DuoPredictGPT2Config(GPT2Config):
    """`GPT2Config` with one more vocabulary entry, `<|MASK|>`.

    Args:
        mask_token_id: the mask's entry; None: the last one.
        leak_free: a mask slot sees its right neighbour in the first layer only. False is the published pattern, which
            leaks; it is the default because published configs, which lack the field, must give the published logits.
            The registry trains with True.

    Raises:
        ValueError: `mask_token_id` is outside the vocabulary, or `leak_free` is not a bool.
    """

    model_type = "duo-predict-gpt2"

    n_positions: int = 512
    vocab_size: int = 50258
    mask_token_id: int | None = None
    leak_free: bool = False

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        if not isinstance(self.leak_free, bool):
            raise ValueError(f"leak_free={self.leak_free!r}: true or false is allowed")
        if self.mask_token_id is None:
            self.mask_token_id = self.vocab_size - 1
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"mask_token_id={self.mask_token_id} is outside the vocabulary: 0 to vocab_size - 1 = "
                f"{self.vocab_size - 1} is allowed (default: the last entry)"
            )


@dataclass
class DuoPredictOutput(VariantOutput):
    """`VariantOutput` with, when labels are given:

    Attributes:
        loss: the mean over all 2 (S-1) predictions.
        logits: (B, S, V) of the token stream, as for every causal LM.
        infill_logits: (B, S-1, V) of the mask slots; entry k scores token k given its past and its right neighbour.
        next_token_loss, infill_loss: the mean over each stream alone.
    """

    infill_logits: torch.Tensor | None = None
    next_token_loss: torch.Tensor | None = None
    infill_loss: torch.Tensor | None = None


def infill_visibility(num_tokens: int, neighbour: bool = True, device: torch.device | None = None) -> torch.Tensor:
    """What each mask slot sees: bool (S-1, 2S-1) over the keys t_1..t_S m_1..m_{S-1}.

    Its past and itself; and, with `neighbour`, the token to its right.
    """
    slot = torch.arange(num_tokens - 1, device=device).unsqueeze(1)
    token = torch.arange(num_tokens, device=device)
    sees_token = token < slot
    if neighbour:
        sees_token = sees_token | (token == slot + 1)
    return torch.cat([sees_token, token[:-1] == slot], dim=1)


class DuoPredictAttention(VariantAttention):
    """GPT-2's attention for the tokens, and for the mask slots attention by `infill_visibility`."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        num_tokens: int | None = None,
        neighbour: bool = True,
        infill_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `VariantAttention.attend`; with `num_tokens`, S, over both streams.

        Args:
            neighbour: the mask slots see their right neighbours.
            infill_mask: (B or 1, 1, S-1, 2S-1), what they see, where that depends on padding too; None: no padding.
        """
        if num_tokens is None:
            return super().attend(query, key, value, attention_mask, **kwargs)
        dropout = self.attn_dropout.p if self.training else 0.0
        if infill_mask is None:
            mixed = duo_attention(query, key, value, num_tokens, neighbour, dropout, self.scaling)
            return mixed.transpose(1, 2), None
        q, k, v = (x[:, :, :num_tokens] for x in (query, key, value))
        tokens, _ = super().attend(q, k, v, attention_mask, **kwargs)
        slots = F.scaled_dot_product_attention(
            query[:, :, num_tokens:], key, value, attn_mask=infill_mask, dropout_p=dropout, scale=self.scaling
        )
        return torch.cat([tokens, slots.transpose(1, 2)], dim=1), None


class DuoPredictGPT2Model(VariantModel):
    """`GPT2Model` that can run the mask slots beside the tokens."""

    config_class = DuoPredictGPT2Config
    attention_class = DuoPredictAttention

    def forward(
        self, input_ids: torch.Tensor | None = None, *args: Any, infill: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions | tuple[torch.Tensor, torch.Tensor]:
        """As `GPT2Model.forward`; with `infill`, the final hidden states of both streams: (B, S, E) and (B, S-1, E)."""
        if not infill:
            return super().forward(input_ids, *args, **kwargs)
        if input_ids is None:
            raise ValueError("infill needs input_ids")
        return self._forward_streams(input_ids, *args, **kwargs)

    def _forward_streams(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens = input_ids.shape[1]
        if num_tokens < 2:
            raise ValueError(f"infill needs a right neighbour: sequences of at least 2 tokens, not {num_tokens}")
        if position_ids is None:
            position_ids = torch.arange(num_tokens, device=input_ids.device).unsqueeze(0)
        positions = self.wpe(position_ids)
        tokens = self.wte(input_ids) + positions
        mask_id = torch.tensor([[self.config.mask_token_id]], device=input_ids.device)
        slots = (self.wte(mask_id) + positions[:, :-1]).expand(input_ids.shape[0], -1, -1)

        # eager is what the other backends are checked against; padding hides other keys in each row
        dense = attention_mask is not None or self.config._attn_implementation == "eager"
        causal_mask, masks = None, {}
        if dense:
            causal_mask = create_causal_mask(self.config, tokens, attention_mask, None)
            masks = {n: self._infill_mask(num_tokens, n, attention_mask, input_ids.device) for n in (True, False)}
        hidden = self.drop(torch.cat([tokens, slots], dim=1))
        for layer, block in enumerate(self.h):
            neighbour = layer == 0 or not self.config.leak_free
            hidden = block(
                hidden, None, causal_mask, num_tokens=num_tokens, neighbour=neighbour, infill_mask=masks.get(neighbour)
            )
        return self.ln_f(hidden).split([num_tokens, num_tokens - 1], dim=1)

    @staticmethod
    def _infill_mask(
        num_tokens: int, neighbour: bool, attention_mask: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor:
        """(B or 1, 1, S-1, 2S-1). Padding (B, S) is hidden from the slots too; a slot always sees itself."""
        mask = infill_visibility(num_tokens, neighbour, device)[None, None]
        if attention_mask is None:
            return mask
        return mask & F.pad(attention_mask.bool(), (0, num_tokens - 1), value=True)[:, None, None, :]


class DuoPredictGPT2LMHeadModel(VariantLMHeadModel):
    """Duo-predict with its language modelling head. With labels: both streams; without: an ordinary causal LM."""

    config_class = DuoPredictGPT2Config
    transformer_class = DuoPredictGPT2Model

    @staticmethod
    def positions(num_tokens: int) -> int:
        """The tokens and one mask slot for each but the last."""
        return 2 * num_tokens - 1

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> GenerateOutput | torch.LongTensor:
        """As for every causal LM; the mask entry, which no stream is trained to predict, is never generated."""
        if generation_config is None or generation_config.suppress_tokens is None:
            kwargs.setdefault("suppress_tokens", [self.config.mask_token_id])
        return super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]  # as for parallel

    def prediction_streams(
        self, input_ids: torch.Tensor, labels: torch.Tensor, **kwargs
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Token k predicts token k+1 ("next_token"); mask slot k predicts token k ("infill"); k = 1..S-1."""
        tokens, slots = self.transformer(input_ids, infill=True, **kwargs)
        return {"next_token": (tokens[:, :-1], labels[:, 1:]), "infill": (slots, labels[:, :-1])}

    @torch.no_grad()
    def infill_log_probs(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """The log-probability of each token given its past and its right neighbour; no (B, S, V) logits are kept.

        Args:
            input_ids: (B, S), S >= 2.
            attention_mask: (B, S), 0 at padding, on the left or the right. Padding is seen by no token, and positions
                count from the first token that is not padding.

        Returns:
            (B, S-1), natural logarithms, float32 or better. Entry k (from 0) is log p(t_k | t_0..t_{k-1}, t_{k+1}); the
            last token has no right neighbour and no entry. NaN where t_k or t_{k+1} is padding.

        Raises:
            ValueError: sequences of fewer than 2 tokens.
        """
        position_ids, labels = None, input_ids
        if attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
            seen = attention_mask.bool()
            labels = F.pad(input_ids[:, :-1].masked_fill(~(seen[:, :-1] & seen[:, 1:]), IGNORE_INDEX), (0, 1))
        streams = self.prediction_streams(input_ids, labels, attention_mask=attention_mask, position_ids=position_ids)
        scores = self.lm_head(*streams["infill"])
        return (-scores.nll).masked_fill(~scores.valid, torch.nan)

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
        """As `VariantLMHeadModel.forward`; with `labels` (B, S) and the logits wanted, a `DuoPredictOutput`.

        Raises:
            ValueError: with labels, sequences of one token, or a cache, embeddings or token types instead of plain ids.
        """
        if labels is None or skip_logits or return_token_scores:
            return super().forward(
                input_ids,
                cache=cache,
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                skip_logits=skip_logits,
                return_token_scores=return_token_scores,
                num_items_in_batch=num_items_in_batch,
                **kwargs,
            )
        if not (cache is past_key_values is inputs_embeds is token_type_ids is None):
            raise ValueError(
                "with labels, duo-predict takes whole sequences of input_ids: no cache, embeddings or token types"
            )
        tokens, slots = self.transformer(
            input_ids, infill=True, attention_mask=attention_mask, position_ids=position_ids
        )
        logits, infill_logits = self.lm_head(tokens), self.lm_head(slots)
        scores = {
            "next_token": score_logits(logits[:, :-1], labels[:, 1:]),
            "infill": score_logits(infill_logits, labels[:, :-1]),
        }
        return DuoPredictOutput(
            loss=mean_loss(scores, num_items_in_batch),
            logits=logits,
            infill_logits=infill_logits,
            next_token_loss=mean_loss({"next_token": scores["next_token"]}),
            infill_loss=mean_loss({"infill": scores["infill"]}),
        )
