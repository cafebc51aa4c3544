"""Duo-predict's attention layer, and what its mask slots see.

Shape legend: B batch, S tokens, H heads, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import GPT2Config
from transformers.cache_utils import Cache

from .duo_attention import duo_attention
from .loss_head import IGNORE_INDEX
from .variant_attention import VariantAttention


def infill_visibility(num_tokens: int, neighbour: bool = True, device: torch.device | None = None) -> torch.Tensor:
    """Return what each mask slot sees: bool (S-1, 2S-1) over the keys t_1..t_S m_1..m_{S-1}.

    Its past and itself; and, with `neighbour`, the token to its right.
    """
    slot = torch.arange(num_tokens - 1, device=device).unsqueeze(1)
    token = torch.arange(num_tokens, device=device)
    sees_token = token < slot
    if neighbour:
        sees_token = sees_token | (token == slot + 1)
    return torch.cat([sees_token, token[:-1] == slot], dim=1)


def infill_mask(
    num_tokens: int,
    neighbour: bool,
    attention_mask: torch.Tensor | None,
    sequences: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """Return what the slots see in each row: bool (B or 1, 1, S-1, 2S-1). A slot always sees itself.

    Args:
        neighbour: as for `infill_visibility`.
        attention_mask: (B, S), 0 at padding, which no slot sees.
        sequences: (B, S), which of the sequences packed into its row a token belongs to; a slot sees its own only.
    """
    mask = infill_visibility(num_tokens, neighbour, device)[None, None]
    if attention_mask is not None:
        mask = mask & F.pad(attention_mask.bool(), (0, num_tokens - 1), value=True)[:, None, None, :]
    if sequences is not None:
        keys = torch.cat([sequences, sequences[:, :-1]], dim=1)
        mask = mask & (sequences[:, :-1, None] == keys[:, None, :]).unsqueeze(1)
    return mask


def has_neighbour(
    labels: torch.Tensor, attention_mask: torch.Tensor | None, sequences: torch.Tensor | None
) -> torch.Tensor:
    """Return bool (B, S-1): token k+1 is none of the padding, and belongs to the sequence of token k.

    Without a mask padding on the right shows in the labels (B, S): nothing is to be predicted from there on.
    """
    if attention_mask is not None:
        has = attention_mask[:, 1:].bool()
    else:
        predicted = (labels[:, 1:] != IGNORE_INDEX).long()
        has = predicted.flip(1).cumsum(1).flip(1) > 0
    return has if sequences is None else has & (sequences[:, 1:] == sequences[:, :-1])


class DuoPredictAttention(VariantAttention):
    """GPT-2's attention for the tokens, and for the mask slots attention by `infill_visibility`.

    Attributes:
        kernel: of `duo_attention`, for all layers.
    """

    kernel = "flash"

    def __init__(self, config: GPT2Config, layer_idx: int | None = None):
        super().__init__(config, layer_idx=layer_idx)
        self.neighbour = layer_idx == 0 or not config.leak_free  # whether a mask slot sees its right neighbour here

    def remember(
        self, key: torch.Tensor, value: torch.Tensor, cache: Cache, num_tokens: int | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do what `VariantAttention.remember` does; of two streams the cache, empty before, gets the tokens alone."""
        if num_tokens is None:
            return super().remember(key, value, cache, **kwargs)
        super().remember(key[:, :, :num_tokens], value[:, :, :num_tokens], cache, **kwargs)
        return key, value

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        num_tokens: int | None = None,
        token_mask: Any = None,
        infill_masks: dict[bool, torch.Tensor] | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Do what `VariantAttention.attend` does; where `num_tokens`, S, is given, for both streams.

        The attention weights that it returns are those of the tokens.

        Args:
            token_mask: what `create_causal_mask` makes for the tokens; `attention_mask` is not used then.
            infill_masks: whether the right neighbour is seen -> (B or 1, 1, S-1, 2S-1), what the mask slots see; None:
                what `infill_visibility` says, for whole sequences.
        """
        if num_tokens is None:
            return super().attend(query, key, value, attention_mask, **kwargs)
        if infill_masks is None:
            dropout = self.attn_dropout.p if self.training else 0.0
            mixed = duo_attention(query, key, value, num_tokens, self.neighbour, dropout, self.scaling, self.kernel)
            return mixed.transpose(1, 2), None
        q, k, v = (x[:, :, :num_tokens] for x in (query, key, value))
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"][:, :num_tokens]  # flash attention tells sequences by them
        tokens, weights = super().attend(q, k, v, token_mask, **kwargs)
        slots = self._attend_slots(query[:, :, num_tokens:], key, value, infill_masks[self.neighbour])
        return torch.cat([tokens, slots], dim=1), weights

    def _attend_slots(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """(B, S-1, H, D): attention of the slots under a dense mask, which not every backend can be given."""
        if self.config._attn_implementation == "eager":
            hidden = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)
            return super().attend(query, key, value, hidden)[0]
        dropout = self.attn_dropout.p if self.training else 0.0
        slots = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=dropout, scale=self.scaling)
        return slots.transpose(1, 2)
