"""GPT-2's self-attention of `transformers`, opened at the places where the variants differ.

Shape legend: B batch, S tokens, H heads, D head size, E = H * D.
"""

import torch
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, eager_attention_forward


class VariantAttention(GPT2Attention):
    """GPT-2's self-attention with the softmax part, `attend`, as a method of its own. Computes what GPT-2's does."""

    def reset_own_parameters(self) -> None:
        """Initialise the parameters that GPT-2's attention does not have; here there are none.

        By `transformers.initialization`, whose functions leave alone what was loaded.
        """

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values (B, H, S, D) of `hidden_states` (B, S, E)."""
        heads = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query, key, value = (x.view(heads).transpose(1, 2) for x in self.c_attn(hidden_states).split(self.embed_dim, 2))
        return query, key, value

    def place(
        self, query: torch.Tensor, key: torch.Tensor, first_slot: int | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `query` and `key` (B, H, S, D) told their places in the sequence; here they are left as they are.

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
        if self.reorder_and_upcast_attn and self.config._attn_implementation == "eager":
            return self._upcast_and_reordered_attn(query, key, value, attention_mask)
        backend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attn_dropout.p if self.training else 0.0
        return backend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def remember(
        self, key: torch.Tensor, value: torch.Tensor, cache: Cache, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put `key` and `value` (B, H, S, D) into `cache`; return those to attend to, the cache's own before them."""
        return cache.update(key, value, self.layer_idx)

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
        query, key, value = self.project(hidden_states)
        cache = past_key_values if cache is None else cache
        if isinstance(cache, EncoderDecoderCache):
            cache = cache.self_attention_cache
        query, key = self.place(query, key, first_slot=0 if cache is None else cache.get_seq_length(self.layer_idx))
        if cache is not None:
            key, value = self.remember(key, value, cache, **kwargs)
        mixed, weights = self.attend(query, key, value, attention_mask, **kwargs)
        return self.resid_dropout(self.c_proj(mixed.flatten(2))), weights
