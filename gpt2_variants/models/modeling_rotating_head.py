"""Rotating head: GPT-2 whose queries and keys are rotated by their position, each head with frequencies of its own.

What differs from GPT-2: with angle = position * f[head, pair], the channel pairs (0, 1),
(2, 3), ... of each query and key become (x_even cos - x_odd sin, x_even sin + x_odd cos) before the scores. Positions
are absolute slots of the cache, which holds rotated keys; GPT-2's learned position embeddings stay.

f is learned ("lr") or fixed in geometric progression ("gp"); with `use_norm` it passes through a LayerNorm first. An
angle at position 1000 in bf16 is noise, and so is one of a bf16 frequency: both are float32 whatever the model's dtype.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config
from transformers import initialization as init

from .modeling_base import Float32Parameters, VariantAttention, VariantLMHeadModel, VariantModel
from .task_heads import task_heads

METHODS = ("lr", "gp")


class RotatingHeadGPT2Config(GPT2Config):
    """`GPT2Config` with the source of the frequencies.

    Args:
        rotatinghead: "lr": learned, one (H, D/2) per layer; "gp": fixed, f[h, j] = s_h base_frequency^(-2j/D) with s_h
            in geometric progression from 1 (first head) to 0.1 (last).
        use_norm: the frequencies pass through a LayerNorm over D/2.
        base_frequency: of "gp".

    Raises:
        ValueError: an odd head size D, another `rotatinghead`, or a value of another kind.
    """

    model_type = "rotating-head-gpt2"

    rotatinghead: str = "lr"
    use_norm: bool = False
    base_frequency: float = 10000.0

    def __post_init__(self, **kwargs) -> None:
        super().__post_init__(**kwargs)
        if self.rotatinghead not in METHODS:
            raise ValueError(f"rotatinghead={self.rotatinghead!r}: one of {', '.join(METHODS)} is allowed")
        if not isinstance(self.use_norm, bool):
            raise ValueError(f"use_norm={self.use_norm!r}: true or false is allowed")
        if not self.base_frequency > 0:
            raise ValueError(f"base_frequency={self.base_frequency!r}: a number above 0 is needed")
        if self.n_embd // self.n_head % 2:
            raise ValueError(
                f"n_embd={self.n_embd} and n_head={self.n_head}: a head size of {self.n_embd // self.n_head}; channels "
                "are rotated in pairs, an even head size is needed"
            )


def geometric_frequencies(num_heads: int, head_dim: int, base: float) -> torch.Tensor:
    """f[h, j] = s_h base^(-2j/D), float32 (H, D/2), in radians per position, on the CPU."""
    scales = torch.logspace(0, -1, num_heads, dtype=torch.float64, device="cpu")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    return (scales[:, None] * base**-exponents).float()


class FrequencyNorm(Float32Parameters, nn.LayerNorm):
    """LayerNorm in float32."""

    def forward(self, frequencies: torch.Tensor) -> torch.Tensor:
        """(H, D/2) -> (H, D/2), each head normalised over its D/2."""
        weight, bias = self.exact("weight"), self.exact("bias")
        return F.layer_norm(frequencies.to(weight.dtype), self.normalized_shape, weight, bias, self.eps)


class HeadwiseRotation(Float32Parameters, nn.Module):
    """The rotation of one layer's heads.

    Attributes:
        frequencies: (H, D/2), in radians per position; a parameter where they are learned. Fixed ones follow from the
            config: they are no buffer, so that nothing can be missing or left empty, and float32 in every model.
    """

    def __init__(self, config: RotatingHeadGPT2Config):
        super().__init__()
        head_dim = config.n_embd // config.n_head
        self._fixed = (config.n_head, head_dim, config.base_frequency)
        self.frequencies: torch.Tensor
        if config.rotatinghead == "lr":
            self.frequencies = nn.Parameter(torch.empty(config.n_head, head_dim // 2, dtype=torch.float32))
        else:
            self.frequencies = geometric_frequencies(*self._fixed)
        self.layer_norm = FrequencyNorm(head_dim // 2, dtype=torch.float32) if config.use_norm else None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "HeadwiseRotation":
        super()._apply(fn, recurse)
        if not isinstance(self.frequencies, nn.Parameter):
            like = fn(torch.empty(0, dtype=self.frequencies.dtype))
            dtype = torch.promote_types(like.dtype, torch.float32)
            self.frequencies = geometric_frequencies(*self._fixed).to(like.device, dtype)
        return self

    def reset_parameters(self) -> None:
        """Learned frequencies: N(0, 1); norm: 1 and 0."""
        if isinstance(self.frequencies, nn.Parameter):
            init.normal_(self.frequencies, mean=0.0, std=1.0)
        if self.layer_norm is not None:
            init.ones_(self.layer_norm.weight)
            init.zeros_(self.layer_norm.bias)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Return the angles at `positions` (S,) in radians: (H, S, D/2), float32 or better."""
        frequencies = self.exact("frequencies").to(positions.device)
        if self.layer_norm is not None:
            frequencies = self.layer_norm(frequencies)
        return positions[:, None] * frequencies[:, None]


class Rotation(torch.autograd.Function):
    """`rotate`, which keeps its outputs for the backward pass in place of its inputs: the attention keeps them anyway.

    A rotated y, with g the gradient that reaches it, gives both gradients: that of x is g turned back by the angles,
    that of an angle is g_odd y_even - g_even y_odd, since d y_even / d angle = -y_odd and d y_odd / d angle = y_even.
    """

    @staticmethod
    def forward(query: torch.Tensor, key: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what `rotate` does."""
        return turn((query, key), angles)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
        """Keep the two outputs, and the angles: their cosines are cheaper to compute again."""
        ctx.save_for_backward(*output, inputs[2])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return gradients of query, key and angles."""
        *rotated, angles = ctx.saved_tensors
        turned_back = turn(gradients, -angles)
        if not ctx.needs_input_grad[2]:
            return *turned_back, None
        by_angle = []
        for g, y in zip(gradients, rotated, strict=True):
            g = g.to(angles.dtype)
            by_angle.append((g[..., 1::2] * y[..., ::2] - g[..., ::2] * y[..., 1::2]).sum(0))
        return *turned_back, by_angle[0] + by_angle[1]


def turn(tensors: tuple[torch.Tensor, ...], angles: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Each (B, H, S, D) with its pairs of channels turned by `angles` (H, S, D/2), in whose dtype it is computed."""
    cos, sin = angles.cos(), angles.sin()
    if torch.compiler.is_compiling():  # inductor fuses this, and nothing complex
        # position by position in memory, as c_attn gives them: so do the kernels then return the attention's output
        cos, sin = cos.transpose(0, 1), sin.transpose(0, 1)
        pairs = ((x[..., ::2], x[..., 1::2]) for x in (x.transpose(1, 2) for x in tensors))
        by_position = (torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1) for even, odd in pairs)
        turned = (y.transpose(1, 2) for y in by_position)
    else:  # no copies of every other channel: three times as fast
        factor = torch.complex(cos, sin)
        # an unfused attention's gradient of the key lies transposed
        adjacent = (x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
        numbers = (torch.view_as_complex(x.to(angles.dtype).unflatten(-1, (-1, 2))) for x in adjacent)
        turned = (torch.view_as_real(x * factor) for x in numbers)
    return tuple(y.flatten(-2).type_as(x) for x, y in zip(tensors, turned, strict=True))


def rotate(query: torch.Tensor, key: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`query` and `key` (B, H, S, D) with their channel pairs (0, 1), (2, 3), ... rotated by `angles` (H, S, D/2).

    Computed in the dtype of `angles`, returned in that of `query` and `key`.
    """
    if torch.is_grad_enabled():
        return Rotation.apply(query, key, angles)
    query, key = turn((query, key), angles)  # a decoded token's takes a third of the time without the Function
    return query, key


class RotatingHeadAttention(VariantAttention):
    """GPT-2's attention with rotated queries and keys."""

    def __init__(self, config: RotatingHeadGPT2Config, layer_idx: int | None = None):
        super().__init__(config, layer_idx=layer_idx)
        self.rope = HeadwiseRotation(config)

    def reset_own_parameters(self) -> None:
        """Do what `HeadwiseRotation.reset_parameters` does."""
        self.rope.reset_parameters()

    def place(
        self, query: torch.Tensor, key: torch.Tensor, first_slot: int | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate queries and keys by their absolute slots; arguments and result are as in `VariantAttention.place`."""
        angles = self.rope(first_slot + torch.arange(query.shape[2], device=query.device))
        return rotate(query, key, angles)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Do what `VariantAttention.attend` does."""
        if torch.is_grad_enabled():
            # a view of c_attn's whole output: kept for the backward pass, it would keep the unrotated ones in memory
            value = value.clone()
        return super().attend(query, key, value, attention_mask, **kwargs)


class RotatingHeadGPT2Model(VariantModel):
    """`GPT2Model` with `RotatingHeadAttention`."""

    config_class = RotatingHeadGPT2Config
    attention_class = RotatingHeadAttention
    _keep_in_fp32_modules_strict = ["rope"]


class RotatingHeadGPT2LMHeadModel(VariantLMHeadModel):
    """Rotating-head GPT-2 with its language modelling head."""

    config_class = RotatingHeadGPT2Config
    transformer_class = RotatingHeadGPT2Model


(
    RotatingHeadGPT2ForSequenceClassification,
    RotatingHeadGPT2ForTokenClassification,
    RotatingHeadGPT2ForQuestionAnswering,
) = task_heads(RotatingHeadGPT2Model)
