"""Two GPT-2 blocks that read the same input, as one computation of twice the width: for decoding, token by token.

A step of one token is bound by the number of operations, not by their size. Of a pair's two blocks, the norms, the
matrix products, the activation and the residual sums run as one operation each, on stacked weights; the two attentions
stay apart, so that each block's layer of the cache holds what it would hold otherwise. A prompt, or a training step,
gains nothing from it: there the matrix products count.

Shape legend: B batch, E = H * D the width, H heads, D head size; 2 the blocks of the pair.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2Block, eager_attention_forward
from transformers.pytorch_utils import Conv1D

READ_DIRECTLY = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def can_be_wide(left: GPT2Block, right: GPT2Block) -> bool:
    """Whether `WidePair` computes what the two blocks do: GPT-2's own modules, in eval mode, all weights at hand.

    Not so with weights that ZeRO stage 3 has partitioned, that are quantised, offloaded, on two devices, or adapted.
    """
    if left.training or right.training or left.attn.config.add_cross_attention:
        return False
    if left.attn.config.reorder_and_upcast_attn:
        return False
    modules = [block.get_submodule(name) for block in (left, right) for name in READ_DIRECTLY]
    if any(type(module) not in (nn.LayerNorm, Conv1D) for module in modules):
        return False
    if any("forward" in vars(module) for block in (left, right) for module in block.modules()):
        return False  # replaced, e.g. by accelerate's offloading
    weights = [parameter for module in modules for parameter in module.parameters()]
    if any(hasattr(weight, "ds_id") or weight.is_meta for weight in weights):
        return False
    return len({(weight.device, weight.dtype) for weight in weights}) == 1


class WidePair:
    """The two blocks of a pair as one computation, on copies of their weights: stale as soon as those change."""

    def __init__(self, left: GPT2Block, right: GPT2Block):
        self._blocks = (left, right)
        self._modules = [*left.modules(), *right.modules()]
        self._weights = {name: self._stack(name) for name in READ_DIRECTLY}

    def _stack(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight, (2, 1, E) of a norm or (2, in, out), and bias (2, 1, out)."""
        weight = torch.stack([block.get_parameter(f"{name}.weight").detach() for block in self._blocks])
        bias = torch.stack([block.get_parameter(f"{name}.bias").detach() for block in self._blocks]).unsqueeze(1)
        return weight if weight.dim() == 3 else weight.unsqueeze(1), bias

    def observed(self) -> bool:
        """Whether somebody hooked into the blocks, e.g. to collect hidden states: the hooks would not be called."""
        return any(module._forward_hooks or module._forward_pre_hooks for module in self._modules)

    def __call__(
        self,
        hidden: torch.Tensor,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: None = None,
        encoder_attention_mask: None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the two blocks return for `hidden` (B, 1, E), with a block's arguments: two (B, 1, E)."""
        rows = hidden.squeeze(1)
        attended = self._attend(self._norm("ln_1", rows), cache, attention_mask, **kwargs)
        after_attention = self._linear("attn.c_proj", attended) + rows
        inner = self._blocks[0].mlp.act(self._linear("mlp.c_fc", self._norm("ln_2", after_attention)))
        left, right = (after_attention + self._linear("mlp.c_proj", inner)).unsqueeze(2)
        return left, right

    def _attend(
        self, x: torch.Tensor, cache: Cache | None, attention_mask: torch.Tensor | None, **kwargs
    ) -> torch.Tensor:
        """(2, B, E) -> (2, B, E), each block with its own layer of the cache."""
        attention = self._blocks[0].attn
        heads = self._linear("attn.c_attn", x).view(*x.shape[:2], 3, attention.num_heads, 1, attention.head_dim)
        backend = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager_attention_forward)
        mixed = []
        for block, own_heads in zip(self._blocks, heads, strict=True):
            query, key, value = own_heads.unbind(1)  # (B, H, 1, D)
            if cache is not None:
                key, value = cache.update(key, value, block.attn.layer_idx)
            out, _ = backend(
                block.attn, query, key, value, attention_mask, dropout=0.0, scaling=block.attn.scaling, **kwargs
            )
            mixed.append(out.flatten(1))
        return torch.stack(mixed)

    def _norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """(B, E), the same for both, or (2, B, E) -> (2, B, E)."""
        weight, bias = self._weights[name]
        return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:], eps=self._blocks[0].ln_1.eps), weight)

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """(2, B, in) -> (2, B, out)."""
        weight, bias = self._weights[name]
        return torch.baddbmm(bias, x, weight)
