"""Duo-predict: GPT-2 that predicts every token twice, from its past, and from its past and its right neighbour.

What differs from GPT-2: beside the tokens t_1..t_S run S-1 mask slots m_1..m_{S-1} through the same weights. m_k
carries the embedding of one extra vocabulary entry and the position embedding of t_k; it attends to t_1..t_{k-1}, to
t_{k+1} and to itself, and predicts t_k. The token stream is plain GPT-2 and never sees a mask slot.

The published code lets m_k attend to t_{k+1} in every layer. From the second layer on that leaks: t_{k+1} has attended
to t_k by then, and m_k reads the very token it is to predict out of its neighbour's state. With `leak_free` m_k sees
t_{k+1} in the first layer only, where the neighbour's state is its embedding. Same weights, same cost.

The two streams lie one after the other, t_1..t_S m_1..m_{S-1}, along the sequence axis. Without labels only the token
stream exists, and the model is an ordinary causal LM.

Shape legend: B batch, S tokens, H heads, D head size, E = H * D, V vocabulary (with the mask entry).
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, GenerationMixin, GPT2Config
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateOutput
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutputWithCrossAttentions

from .duo_predict_attention import DuoPredictAttention, has_neighbour, infill_mask
from .duo_predict_attention import infill_visibility as infill_visibility  # part of the variant, told here too
from .loss_head import IGNORE_INDEX, score_logits, score_targets
from .modeling_base import (
    CACHE_NAME,
    VariantLMHeadModel,
    VariantModel,
    VariantOutput,
    beside_hidden_state,
)
from .streams import Stream
from .task_heads import task_heads


class DuoPredictGPT2Config(GPT2Config):
    """`GPT2Config` with one more vocabulary entry, `<|MASK|>`.

    Args:
        mask_token_id: the mask's entry; None: the last one.
        leak_free: a mask slot sees its right neighbour in the first layer only. False is the published pattern, which
            leaks; it is the default because published configs, which lack the field, must give the published logits.
            The registry trains with True.
        infill_weight: what a prediction of a mask slot counts in the loss beside one of the token stream; 1 as
            published. With 0 no mask slots are run, and the cost is GPT-2's.

    Raises:
        ValueError: `mask_token_id` is outside the vocabulary, `leak_free` is not a bool, or `infill_weight` is negative
            or not finite.
    """

    model_type = "duo-predict-gpt2"
    # so that what transformers' Trainer hands to compute_metrics is the logits of the next token, as for GPT-2
    keys_to_ignore_at_inference = [
        *getattr(GPT2Config, "keys_to_ignore_at_inference", [CACHE_NAME]),
        *("infill_logits", "next_token_loss", "infill_loss"),
    ]

    n_positions: int = 512
    vocab_size: int = 50258
    mask_token_id: int | None = None
    leak_free: bool = False
    infill_weight: float = 1.0

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        if not isinstance(self.leak_free, bool):
            raise ValueError(f"leak_free={self.leak_free!r}: true or false is allowed")
        if not 0 <= self.infill_weight < math.inf:
            raise ValueError(f"infill_weight={self.infill_weight!r}: 0 or more is allowed")
        if self.mask_token_id is None:
            self.mask_token_id = self.vocab_size - 1
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"mask_token_id={self.mask_token_id} is outside the vocabulary: 0 to vocab_size - 1 = "
                f"{self.vocab_size - 1} is allowed (default: the last entry)"
            )


@dataclass
class StreamsOutput(BaseModelOutputWithPastAndCrossAttentions):
    """The token stream's output as of every transformer, (B, S, E), and of the mask slots:

    Attributes:
        infill_hidden_state: (B, S-1, E), final.
        sequences: (B, S), which of the sequences packed into its row a token belongs to; None: all to one.
    """

    infill_hidden_state: torch.Tensor | None = None
    sequences: torch.Tensor | None = None


@dataclass
class DuoPredictOutput(VariantOutput):
    """`VariantOutput` with, when labels are given:

    Attributes:
        loss: of both streams; the mean over all 2 (S-1) predictions, where none is left out.
        logits: (B, S, V) of the token stream, as for every causal LM.
        infill_logits: (B, S-1, V) of the mask slots; entry k scores token k given its past and its right neighbour.
        next_token_loss, infill_loss: the mean over each stream alone.
    """

    infill_logits: torch.Tensor | None = None
    next_token_loss: torch.Tensor | None = None
    infill_loss: torch.Tensor | None = None


class DuoPredictGPT2Model(VariantModel):
    """`GPT2Model` that can run the mask slots beside the tokens."""

    config_class = DuoPredictGPT2Config
    attention_class = DuoPredictAttention

    def forward(  # type: ignore[override]  # the arguments are GPT2Model's
        self, *args: Any, infill: bool = False, **kwargs: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions | tuple[torch.Tensor, ...]:
        """Do what `GPT2Model.forward` does; with `infill` return a `StreamsOutput`.

        Raises:
            ValueError: `infill` of fewer than two tokens, on a cache that holds tokens already, or under a 4-D mask.
        """
        return self._forward_streams(*args, **kwargs) if infill else super().forward(*args, **kwargs)

    def _forward_streams(
        self,
        input_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> StreamsOutput:
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            assert input_ids is not None
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            inputs_embeds = self.wte(input_ids.view(-1, input_ids.shape[-1]))
        batch, num_tokens, channels = inputs_embeds.shape
        if num_tokens < 2:
            raise ValueError(f"infill needs a right neighbour: sequences of at least 2 tokens, not {num_tokens}")
        if cache is not None and cache.get_seq_length():
            raise ValueError(
                f"with labels, duo-predict takes whole sequences: the cache holds {cache.get_seq_length()} tokens "
                "already; give them with the others, or no labels"
            )
        if attention_mask is not None and attention_mask.ndim > 2:
            raise ValueError(
                "with labels, duo-predict takes an attention_mask of (batch, tokens), not "
                f"{tuple(attention_mask.shape)}: another does not tell what the mask slots may see"
            )
        device, sequences = inputs_embeds.device, None
        if position_ids is None:
            position_ids = torch.arange(num_tokens, device=device).unsqueeze(0)
        elif attention_mask is None:
            sequences = find_packed_sequence_indices(position_ids.expand(batch, -1))
        position_ids = position_ids.view(-1, num_tokens)

        mask_id = torch.tensor([[self.config.mask_token_id]], device=device)
        slots = self.wte(mask_id).expand(1, num_tokens - 1, channels).expand(batch, -1, -1)
        if token_type_ids is not None:
            token_type_ids = token_type_ids.view(-1, num_tokens)
            token_type_ids = torch.cat([token_type_ids, token_type_ids[:, :-1]], dim=1)
        of_streams: dict[str, Any] = {"num_tokens": num_tokens}
        # eager is what the other backends are checked against; padding and packing hide other keys in each row
        if attention_mask is not None or sequences is not None or self.config._attn_implementation == "eager":
            causal = create_causal_mask(self.config, inputs_embeds, attention_mask, None, position_ids)
            seen = {n: infill_mask(num_tokens, n, attention_mask, sequences, device) for n in (True, False)}
            of_streams |= {"token_mask": causal, "infill_masks": seen}
        outputs = super().forward(
            inputs_embeds=torch.cat([inputs_embeds, slots], dim=1),
            position_ids=torch.cat([position_ids, position_ids[:, :-1]], dim=1),
            token_type_ids=token_type_ids,
            # any 4-D mask keeps transformers from making one of (2S-1)^2; `attend` has its own
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            return_dict=True,
            **{CACHE_NAME: cache, **kwargs, **of_streams},
        )
        tokens, slots = outputs.last_hidden_state.split([num_tokens, num_tokens - 1], dim=1)
        beside = beside_hidden_state(outputs)
        for name in ("hidden_states", "cross_attentions"):  # those of the tokens, as for GPT-2
            if beside[name]:
                beside[name] = tuple(None if x is None else x[..., :num_tokens, :] for x in beside[name])
        return StreamsOutput(last_hidden_state=tokens, infill_hidden_state=slots, sequences=sequences, **beside)


class DuoPredictGPT2LMHeadModel(VariantLMHeadModel, GenerationMixin):
    """Duo-predict with its language modelling head. With labels: both streams; without: an ordinary causal LM.

    `GenerationMixin` is named because transformers makes a new class, at each load, of an exported model that has a
    `generate` of its own and not this base.
    """

    config_class = DuoPredictGPT2Config
    transformer_class = DuoPredictGPT2Model
    streams = (
        Stream(
            name="infill",
            title="Infill (has seen the right neighbour)",
            caveat="Each token given its past and its right neighbour, which it has seen: not comparable with the "
            "next-token figures, nor with any other variant's.",
            sees_ahead=1,
        ),
    )

    def positions(self, num_tokens: int) -> int:
        """Return how many tokens and, unless infill counts nothing, mask slots there are: one for each but the last."""
        return 2 * num_tokens - 1 if self.config.infill_weight else num_tokens

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> GenerateOutput | torch.LongTensor:
        """Generate as every causal LM does, but never the mask entry, which no stream is trained to predict."""
        suppressed = kwargs.pop("suppress_tokens", None)
        for config in (generation_config, self.generation_config):
            if suppressed is None and config is not None:
                suppressed = config.suppress_tokens
        suppressed = sorted({self.config.mask_token_id, *map(int, suppressed or ())})
        if generation_config is None:
            kwargs["suppress_tokens"] = suppressed
        else:
            generation_config = copy.deepcopy(generation_config)
            generation_config.suppress_tokens = suppressed
        return super().generate(inputs, generation_config, *args, **kwargs)

    def encode(self, **inputs: Any) -> Any:
        """Run both streams; the token stream alone where infill counts nothing."""
        return self.transformer(infill=True, **inputs) if self.config.infill_weight else super().encode(**inputs)

    def streams_of(
        self,
        outputs: Any,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Token k predicts token k+1 ("next_token"); mask slot k predicts token k ("infill"); k = 1..S-1.

        `shift_labels` are for the token stream alone.
        """
        streams = super().streams_of(outputs, labels, attention_mask, shift_labels)
        slots = outputs.get("infill_hidden_state")
        if slots is not None:
            can_be_told = has_neighbour(labels, attention_mask, outputs.sequences)
            streams["infill"] = (slots, labels[:, :-1].masked_fill(~can_be_told, IGNORE_INDEX))
        return streams

    def weights_of(
        self, valid: dict[str, torch.Tensor], outputs: Any, dtype: torch.dtype
    ) -> dict[str, torch.Tensor] | None:
        """Weigh both streams by one half where a sequence has as many predictions in each and both count alike.

        In general the next-token predictions of a sequence count n / (n + w m) each, with n its next-token labels, m
        its infill predictions and w the `infill_weight`, and the infill predictions w times that: the loss is the
        weighted mean over a sequence's predictions of both streams, and over the sequences by their next-token labels.
        So batches can be cut up by rows, with `num_items_in_batch` as everywhere in transformers.
        """
        if "infill" not in valid:
            return None
        weight = self.config.infill_weight
        if outputs.sequences is None:
            count = {name: part.sum(1, keepdim=True) for name, part in valid.items()}
        else:
            sequence = {name: outputs.sequences[:, : part.shape[1]] for name, part in valid.items()}
            count = {
                name: torch.zeros_like(outputs.sequences).scatter_add(1, sequence[name], part.long())
                for name, part in valid.items()
            }
        labels, slots = count["next_token"].to(dtype), count["infill"].to(dtype)
        share = labels / (labels + weight * slots).clamp(min=1)
        counts = {"next_token": share, "infill": weight * share}
        if outputs.sequences is None:
            return {name: counts[name].expand(part.shape) for name, part in valid.items()}
        return {name: counts[name].gather(1, sequence[name]) for name in valid}

    @torch.no_grad()
    def infill_log_probs(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the log-probability of each token given its past and its right neighbour; keep no (B, S, V) logits.

        Args:
            input_ids: (B, S), S >= 2.
            attention_mask: (B, S), 0 at padding, on the left or the right. Padding is seen by no token, and positions
                count from the first token that is not padding, unless they are given.
            position_ids: (B, S); without a mask, sequences that are packed into one row begin where these begin anew.

        Returns:
            (B, S-1), natural logarithms, float32 or better. Entry k (from 0) is log p(t_k | t_0..t_{k-1}, t_{k+1}); the
            last token has no right neighbour and no entry. NaN where t_k or t_{k+1} is padding, or t_{k+1} belongs to
            another sequence.

        Raises:
            ValueError: sequences of fewer than 2 tokens.
        """
        labels = input_ids
        if attention_mask is not None:
            labels = labels.masked_fill(attention_mask == 0, IGNORE_INDEX)
            if position_ids is None:
                position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        outputs = self.transformer(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, infill=True, use_cache=False
        )
        scores = score_targets(self.lm_head, *self.streams_of(outputs, labels, attention_mask)["infill"])
        return (-scores.nll).masked_fill(~scores.valid, torch.nan)

    def loss_with_logits(
        self, inputs: dict[str, Any], labels: torch.Tensor, logits_to_keep: int | torch.Tensor, **about_loss
    ) -> CausalLMOutputWithCrossAttentions:
        """Return logits and loss of both streams; those of the token stream alone where infill counts nothing."""
        if not self.config.infill_weight:
            return super().loss_with_logits(inputs, labels, logits_to_keep, **about_loss)
        self._check_own_loss(logits_to_keep)
        num_items_in_batch = about_loss.pop("num_items_in_batch")
        outputs, streams = self.run_streams(inputs, labels, **about_loss)
        targets = {name: of_stream for name, (_, of_stream) in streams.items()}
        logits = {
            "next_token": self.lm_head(outputs.last_hidden_state),
            "infill": self.lm_head(outputs.infill_hidden_state),
        }
        scores = {name: score_logits(logits[name][:, : targets[name].shape[1]], targets[name]) for name in targets}
        means = {name: s.nll.sum() / s.valid.sum() for name, s in scores.items()}
        return DuoPredictOutput(
            loss=self.mean_loss(scores, outputs, num_items_in_batch),
            logits=logits["next_token"],
            infill_logits=logits["infill"],
            next_token_loss=means["next_token"],
            infill_loss=means["infill"],
            **beside_hidden_state(outputs),
        )


DuoPredictGPT2ForSequenceClassification, DuoPredictGPT2ForTokenClassification, DuoPredictGPT2ForQuestionAnswering = (
    task_heads(DuoPredictGPT2Model)
)
