"""The variant that is asked: small models of it, at the block size that it is trained with.

Shape legend: B batch, S tokens, N predictions, E channels, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..models.modeling_base import VariantLMHeadModel
from ..registry import Variant

VOCABULARY = 67  # entries of the tokenizer; a variant may add its own
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class NotApplicable(Exception):
    """A promise that cannot be asked of this variant, or not on this machine; says why."""


@dataclass(frozen=True)
class Subject:
    """A variant, and how thoroughly it is asked.

    Attributes:
        variant: its record.
        quick: whether fewer positions, modes and layers are tried.
    """

    variant: Variant
    quick: bool = False

    @property
    def block_size(self) -> int:
        """Tokens per training sequence."""
        return self.variant.block_size

    def model(
        self, tokens: int | None = None, *, layers: int = 2, seed: int = 0, attention: str = "sdpa", **fields: Any
    ) -> VariantLMHeadModel:
        """Return a model in eval mode: width 32, 4 heads, no dropout, `tokens` positions (None: the block size).

        Args:
            fields: config fields that win over these.
        """
        values = {"n_layer": layers, "n_embd": 32, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0, **NO_DROPOUT}
        config = self.variant.make_config(None, VOCABULARY, tokens or self.block_size, **{**values, **fields})
        torch.manual_seed(seed)
        return self.variant.model_class._from_config(config, attn_implementation=attention).eval()

    def ids(self, batch: int = 2, tokens: int | None = None, seed: int = 1) -> torch.Tensor:
        """Return random ids (batch, tokens) of the tokenizer's; None: as many tokens as the block size."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, VOCABULARY, (batch, tokens or self.block_size), generator=generator)


def log_probs(model: VariantLMHeadModel, ids: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return stream -> (B, N, V) log-probabilities of `ids` (B, S), and (N,) the position that each predicts."""
    streams = model.prediction_streams(ids, torch.arange(ids.shape[1]).expand_as(ids))
    return {name: (model.lm_head(hidden).log_softmax(-1), places[0]) for name, (hidden, places) in streams.items()}


def of_stream(name: str) -> str:
    """Return how a finding begins that is of this stream of predictions."""
    return "" if name == "next_token" else f"{name}: "
