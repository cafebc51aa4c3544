"""What every variant shares: GPT-2 of `transformers`, opened at the places where the variants differ.

Shape legend: B batch, S tokens, N predictions, H heads, D head size, E = H * D, V vocabulary.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions
from transformers.modeling_utils import PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel
from transformers.utils.generic import can_return_tuple

from .loss_head import IGNORE_INDEX, LMHead, TokenScores, score_targets, summed_loss
from .precision import float32_or_better
from .streams import Stream, check_declared
from .variant_attention import VariantAttention  # noqa: F401  # the variants import it from here
from .variant_model import CACHE_NAME, ScaledInit, VariantModel

BLOCKS_TOGETHER = 4  # blocks in one compiled graph: more fuse little more, and take longer to compile


@dataclass
class VariantOutput(CausalLMOutputWithCrossAttentions):
    """`CausalLMOutputWithCrossAttentions` and, by stream of predictions ("next_token", and those of `streams`):

    Attributes:
        token_scores: stream -> `TokenScores`, when asked for by `return_token_scores=True`.
        stream_sums: stream -> (2,), with `skip_logits=True`: its negative log-likelihoods in nats, added up without
            weights, and how many they are; no gradient. None where `loss` says as much: one stream without weights.
    """

    token_scores: dict[str, TokenScores] | None = None
    stream_sums: dict[str, torch.Tensor] | None = None


class Float32Parameters(nn.Module):
    """Mixin of a module whose parameters and buffers count in float32, whatever the dtype of the model around it.

    They survive `model.bfloat16()`, and `from_pretrained(dtype=...)` where `_keep_in_fp32_modules_strict` names them.
    A training engine that casts a parameter all the same hands its float32 master value in by `set_master`.
    """

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "Float32Parameters":
        def without_rounding(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            if result.dtype.itemsize < min(tensor.dtype.itemsize, torch.float32.itemsize):
                return tensor.to(result.device, torch.float32)
            return result

        return super()._apply(without_rounding, recurse)

    def set_master(self, name: str, value: torch.Tensor) -> None:
        """Make `exact(name)` give `value` from now on; its gradient goes to the parameter `name`."""
        if not hasattr(self, f"{name}_master"):
            self.register_buffer(f"{name}_master", torch.empty_like(value), persistent=False)
        getattr(self, f"{name}_master").copy_(value)

    def exact(self, name: str) -> torch.Tensor:
        """Return the parameter `name` in float32 or better: its master value, if there is one, else its own."""
        own = float32_or_better(getattr(self, name))
        master = getattr(self, f"{name}_master", None)
        return own if master is None else master + (own - own.detach())


def recompute_blocks(model: PreTrainedModel) -> None:
    """Have `model` recompute its blocks in the backward pass, instead of keeping their activations."""
    # transformers 5.2x renamed it; the older name warns there
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


class VariantLMHeadModel(ScaledInit, GPT2LMHeadModel):
    """`GPT2LMHeadModel` with `transformer_class` inside, and a loss that need not materialise the logits.

    Weights, names, `generate()` and the results are those of `GPT2LMHeadModel`.
    """

    transformer: VariantModel
    transformer_class: type[VariantModel] = VariantModel
    streams: tuple[Stream, ...] = ()  # what `streams_of` gives beside "next_token"
    head_class: type[nn.Linear] = LMHead  # of another class than LMHead, it is called for its logits

    def __init_subclass__(cls, **kwargs):
        """Raise ValueError where `streams` is not as it should be."""
        super().__init_subclass__(**kwargs)
        check_declared(cls.__name__, cls.streams)

    def __init__(self, config: GPT2Config):
        # Not GPT2LMHeadModel's own __init__, which would build and initialise the stock blocks first.
        super(GPT2LMHeadModel, self).__init__(config)
        self.loss_type = "ForCausalLM"  # transformers reads it off a class's name, and else says that it did not
        self.transformer = self.transformer_class(config)
        self.lm_head = self.head_class(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    def positions(self, num_tokens: int) -> int:
        """Return how many positions the blocks compute for a sequence of `num_tokens` training tokens."""
        return num_tokens

    def learned(self) -> dict[str, torch.Tensor]:
        """Return what the variant has learned beside GPT-2's weights, to be drawn: title -> (L, columns); here nothing.

        One row for each layer, read off the model's own modules.
        """
        return {}

    def compile_parts(self, together: int = BLOCKS_TOGETHER) -> None:
        """`torch.compile` the blocks, `together` at a time, and the elementwise part of the loss.

        Names of parameters and results stay as they are, but for rounding.

        Raises:
            ValueError: `together` is neither 1 nor an even number above.
        """
        self.transformer.compile_blocks(together)
        if isinstance(self.lm_head, LMHead):
            self.lm_head.compile_loss()

    def encode(self, **inputs) -> Any:
        """Run the transformer on `inputs`, those of `forward`, for all streams of predictions."""
        return self.transformer(return_dict=True, **inputs)

    def streams_of(
        self,
        outputs: Any,
        labels: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Stream -> final hidden states (B, N, E) of what `encode` gave, and the targets (B, N) they are to predict.

        Args:
            labels: (B, S) aligned with the tokens; the shift to the next token happens here.
            attention_mask: (B, S), 0 at padding.
            shift_labels: (B, S), what each token is to predict, instead of the next of the `labels`.
        """
        hidden = outputs.last_hidden_state
        if shift_labels is not None:
            return {"next_token": (hidden, shift_labels)}
        return {"next_token": (hidden[:, :-1], labels[:, 1:])}

    def prediction_streams(
        self, input_ids: torch.Tensor, labels: torch.Tensor, **kwargs
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return stream -> final hidden states (B, N, E) and the targets (B, N) they are to predict.

        `labels` (B, S) are aligned with `input_ids`, as in transformers: the shift to the next token happens here.
        """
        outputs = self.encode(input_ids=input_ids, **{"use_cache": False, **kwargs})
        return self.streams_of(outputs, labels, kwargs.get("attention_mask"))

    def run_streams(
        self,
        inputs: dict[str, Any],
        labels: torch.Tensor,
        shift_labels: torch.Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> tuple[Any, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Return what `encode` gives for the `inputs` of `forward`, and `streams_of` it for labels as `forward` has."""
        if ignore_index != IGNORE_INDEX:
            labels = labels.masked_fill(labels == ignore_index, IGNORE_INDEX)
            if shift_labels is not None:
                shift_labels = shift_labels.masked_fill(shift_labels == ignore_index, IGNORE_INDEX)
        outputs = self.encode(**inputs)
        return outputs, self.streams_of(outputs, labels, inputs["attention_mask"], shift_labels)

    def weights_of(
        self, valid: dict[str, torch.Tensor], outputs: Any, dtype: torch.dtype
    ) -> dict[str, torch.Tensor] | None:
        """Return stream -> (B, N), what each prediction counts in the loss; None: all of them 1.

        They must add up to the number of next-token labels, by which the sum is divided.

        Args:
            valid: stream -> bool (B, N), False where nothing is predicted.
            outputs: what `encode` gave.
            dtype: of the weights.
        """
        return None

    # The names are spelled out because generate() asks the signature whether a model takes position_ids.
    @can_return_tuple
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
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        return_token_scores: bool = False,
        num_items_in_batch: torch.Tensor | float | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> CausalLMOutputWithCrossAttentions:
        """Do what `GPT2LMHeadModel.forward` does; and for training and evaluation take these too.

        Args:
            labels: (B, S) aligned with the tokens; -100 is ignored.
            use_cache: as everywhere; but with `skip_logits` or `return_token_scores` the default is False.
            skip_logits: return no logits; the (B, S, V) are never materialised.
            return_token_scores: return the scores of every prediction as well; implies `skip_logits`.
            num_items_in_batch: the number of next-token labels that the loss is a mean over, where `labels` are a part
                of a batch; by default that of `labels`.
            past_key_values: the older name of `cache`.

        Raises:
            ValueError: `skip_logits` or `return_token_scores` without `labels`, with `logits_to_keep`, or with a loss
                function of the caller's own.
        """
        inputs = {
            "input_ids": input_ids,
            CACHE_NAME: past_key_values if cache is None else cache,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_attention_mask": encoder_attention_mask,
            "use_cache": use_cache,
        }
        about_loss: dict[str, Any] = {
            name: kwargs.pop(name) for name in ("shift_labels", "ignore_index") if name in kwargs
        }
        about_loss["num_items_in_batch"] = num_items_in_batch
        if skip_logits or return_token_scores:
            if labels is None:
                raise ValueError("skip_logits and return_token_scores score labels: pass labels=input_ids")
            self._check_own_loss(logits_to_keep)
            inputs["use_cache"] = bool(use_cache)
            return self._loss_alone({**inputs, **kwargs}, labels, return_token_scores, **about_loss)
        if labels is None:
            return super().forward(logits_to_keep=logits_to_keep, return_dict=True, **inputs, **kwargs)
        return self.loss_with_logits({**inputs, **kwargs}, labels, logits_to_keep, **about_loss)

    def loss_with_logits(
        self, inputs: dict[str, Any], labels: torch.Tensor, logits_to_keep: int | torch.Tensor, **about_loss
    ) -> CausalLMOutputWithCrossAttentions:
        """Return the logits and the loss of `labels` (B, S) for `inputs`; one stream alone has GPT-2's own loss.

        Args:
            about_loss: `num_items_in_batch`, and `shift_labels` and `ignore_index` where they were given.
        """
        items = about_loss.pop("num_items_in_batch")
        if type(self).streams_of is not VariantLMHeadModel.streams_of:
            self._check_own_loss(logits_to_keep)
            outputs, streams = self.run_streams(inputs, labels, **about_loss)
            scores = {name: score_targets(self.lm_head, *stream) for name, stream in streams.items()}
            return CausalLMOutputWithCrossAttentions(
                loss=self.mean_loss(scores, outputs, items),
                logits=self.lm_head(outputs.last_hidden_state),
                **beside_hidden_state(outputs),
            )
        if items is not None:
            about_loss["num_items_in_batch"] = items
        return super().forward(labels=labels, logits_to_keep=logits_to_keep, return_dict=True, **inputs, **about_loss)

    def _check_own_loss(self, logits_to_keep: int | torch.Tensor) -> None:
        """Raise ValueError where the package's own loss would leave out what the caller asked for."""
        if not isinstance(logits_to_keep, int) or logits_to_keep:
            raise ValueError("logits_to_keep: the loss is taken over all positions here; leave it out with labels")
        if self.loss_function is not ForCausalLMLoss:
            raise ValueError(
                f"loss_function={self.loss_function}: {type(self).__name__} computes the loss itself here, "
                "cross-entropy, and would not call it; compute the loss from the logits instead"
            )

    def _loss_alone(
        self,
        inputs: dict[str, Any],
        labels: torch.Tensor,
        return_token_scores: bool,
        num_items_in_batch: torch.Tensor | float | None,
        **about_labels,
    ) -> VariantOutput:
        outputs, streams = self.run_streams(inputs, labels, **about_labels)
        scores = stream_sums = None
        if return_token_scores:
            scores = {name: score_targets(self.lm_head, *stream, with_correct=True) for name, stream in streams.items()}
            loss = self.mean_loss(scores, outputs, num_items_in_batch)
        else:
            valid = {name: targets != IGNORE_INDEX for name, (_, targets) in streams.items()}
            hidden, targets = (torch.cat(parts, dim=1) for parts in zip(*streams.values(), strict=True))
            weights = self.weights_of(valid, outputs, torch.promote_types(hidden.dtype, torch.float32))
            in_a_row = None if weights is None else torch.cat([weights[name] for name in streams], dim=1)
            total, nll = summed_loss(self.lm_head, hidden, targets, in_a_row)
            loss = total / number_of_items(valid, num_items_in_batch)
            if len(streams) > 1 or weights is not None:
                parts = dict(zip(streams, nll.split([part.shape[1] for part in valid.values()], dim=1), strict=True))
                stream_sums = {
                    name: torch.stack([part.sum(), valid[name].sum().to(part.dtype)]) for name, part in parts.items()
                }
        return VariantOutput(loss=loss, token_scores=scores, stream_sums=stream_sums, **beside_hidden_state(outputs))

    def mean_loss(
        self, scores: dict[str, TokenScores], outputs: Any, num_items_in_batch: torch.Tensor | float | None
    ) -> torch.Tensor:
        """Return the loss, a scalar in nats, of all streams' `scores` (B, N) of what `encode` gave."""
        valid = {name: s.valid for name, s in scores.items()}
        weights = self.weights_of(valid, outputs, scores["next_token"].nll.dtype)
        losses = [s.nll if weights is None else s.nll * weights[name] for name, s in scores.items()]
        total = functools.reduce(torch.add, (nll.sum() for nll in losses))
        return total / number_of_items(valid, num_items_in_batch)

    @torch.no_grad()
    def score(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs) -> dict[str, TokenScores]:
        """Return `TokenScores` of every stream for `input_ids` (B, S), with the options of `forward`.

        `labels` are the input ids unless given, without those that an `attention_mask` (B, S) calls padding.
        """
        mask = kwargs.get("attention_mask")
        if labels is None:
            labels = input_ids if mask is None else input_ids.masked_fill(mask == 0, IGNORE_INDEX)
        return self(input_ids, labels=labels, return_token_scores=True, return_dict=True, **kwargs).token_scores


def number_of_items(valid: dict[str, torch.Tensor], given: torch.Tensor | float | None) -> torch.Tensor | float:
    """Return what the summed loss is divided by: `given`, or how many next-token labels are `valid`, (B, N)."""
    if given is None:
        return valid["next_token"].sum()
    return given.to(valid["next_token"].device) if isinstance(given, torch.Tensor) else given


def beside_hidden_state(outputs: Any) -> dict[str, Any]:
    """Return what a transformer gives beside its last hidden state: cache, hidden states and attentions."""
    return {name: outputs.get(name) for name in (CACHE_NAME, "hidden_states", "attentions", "cross_attentions")}
