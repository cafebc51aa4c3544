"""Duo-predict as it was published, one interleaved sequence under a dense mask: what ours is timed against.

The streams lie as t_1 m_1 t_2 m_2 ... t_S; every layer computes attention over all 2S-1 positions with a (2S-1, 2S-1)
mask. Weights, predictions and loss head are those of `DuoPredictGPT2LMHeadModel`.
"""

import torch

from gpt2_variants.models.modeling_duo_predict import DuoPredictGPT2LMHeadModel, StreamsOutput


def interleaved_mask(num_tokens: int, neighbour: bool, device: torch.device | None = None) -> torch.Tensor:
    """Who sees whom: bool (2S-1, 2S-1) over t_1 m_1 t_2 ... t_S; `neighbour`: m_k sees t_{k+1}."""
    place = torch.arange(2 * num_tokens - 1, device=device)
    query, key = place[:, None], place[None, :]
    from_token, to_token = query % 2 == 0, key % 2 == 0
    # t_k at 2(k-1), m_k at 2(k-1)+1: the tokens before m_k's own end two places before it
    seen = torch.where(from_token, key <= query, key <= query - 2) & to_token
    if neighbour:
        seen = seen | (~from_token & (key == query + 1))
    return seen | (query == key)


class DenseDuoPredictLMHeadModel(DuoPredictGPT2LMHeadModel):
    """`DuoPredictGPT2LMHeadModel` that trains on the interleaved sequence. For whole sequences, without padding."""

    def encode(self, input_ids, **kwargs):
        """Do what `DuoPredictGPT2LMHeadModel.encode` does, for whole sequences `input_ids` (B, S)."""
        body, (batch, num_tokens) = self.transformer, input_ids.shape
        ids = torch.full((batch, 2 * num_tokens - 1), self.config.mask_token_id, device=input_ids.device)
        ids[:, ::2] = input_ids
        positions = torch.arange(2 * num_tokens - 1, device=input_ids.device) // 2
        hidden = body.drop(body.wte(ids) + body.wpe(positions))
        first, later = (
            interleaved_mask(num_tokens, neighbour, input_ids.device)[None, None]
            for neighbour in (True, not self.config.leak_free)
        )
        for layer, block in enumerate(body.h):
            hidden = block(hidden, None, first if layer == 0 else later)
        hidden = body.ln_f(hidden)
        return StreamsOutput(last_hidden_state=hidden[:, ::2], infill_hidden_state=hidden[:, 1::2])
