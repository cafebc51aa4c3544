"""Duo-predict's attention over a fused causal attention kernel: bf16 and fp16 on CUDA, without dropout on CPUs.

The kernel computes both causal pasts. A slot's other keys are merged through the log-sum-exp; backward, the kernel is
given the merged output and log-sum-exp, and so differentiates the merged softmax.

Shape legend: B batch, S tokens, H heads, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F

from .blockwise_duo_attention import extra_keys
from .causal_kernels import causal_attention, causal_attention_backward
from .precision import float32_or_better


class FlashDuoAttention(torch.autograd.Function):
    """Both pasts by a causal attention kernel, a slot's other keys merged with theirs through the log-sum-exp."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        num_tokens: int,
        neighbour: bool,
        dropout: float,
        scale: float,
        kernel: str = "flash",
    ) -> torch.Tensor:
        """Return what `duo_attention` does; `kernel` is one of `causal_kernels.KERNELS`."""
        past = num_tokens - 2
        options: dict[str, Any] = {"dropout": dropout, "scale": scale, "kernel": kernel}
        tokens = [x[:, :, :num_tokens] for x in (query, key, value)]
        slots = [query[:, :, num_tokens + 1 :], key[:, :, :past], value[:, :, :past]]
        out_tokens, lse_tokens, *random_tokens = causal_attention(*tokens, **options)

        q = query[:, :, num_tokens:]
        others = [slice(first, first + num_tokens - 1) for first in extra_keys(num_tokens, neighbour)]
        scores = torch.stack([_dot(q, key[:, :, other]) * scale for other in others], dim=-1)
        if dropout:
            factor = (torch.rand_like(scores) >= dropout).to(scores.dtype) / (1 - dropout)
        else:
            factor = torch.ones_like(scores)
        lse = scores.logsumexp(-1)
        if past:
            out_past, lse_past, *random_slots = causal_attention(*slots, **options)
            lse_past = F.pad(lse_past, (1, 0), value=-torch.inf)  # m_1 has no past
            lse = torch.logaddexp(lse, lse_past)
            out_slots = F.pad(out_past, (0, 0, 1, 0)) * (lse_past - lse).exp().unsqueeze(-1)
        else:
            random_slots, out_slots = random_tokens, torch.zeros_like(q)
        weights = (scores - lse.unsqueeze(-1)).exp() * factor
        for column, other in enumerate(others):
            out_slots = out_slots + weights[..., column, None] * value[:, :, other]
        out = _cat_rows(out_tokens, out_slots.to(query.dtype))

        ctx.save_for_backward(query, key, value, out, lse_tokens, lse, factor, *random_tokens, *random_slots)
        ctx.num_tokens, ctx.others, ctx.options = num_tokens, others, options
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return gradients of query, key and value."""
        query, key, value, out, lse_tokens, lse, factor, *random = ctx.saved_tensors
        num_tokens, past = ctx.num_tokens, ctx.num_tokens - 2
        random_tokens, random_slots = random[: len(random) // 2], random[len(random) // 2 :]
        tokens = [x[:, :, :num_tokens] for x in (grad, query, key, value, out)]
        options, scale = ctx.options, ctx.options["scale"]
        grad_q, grad_k, grad_v = causal_attention_backward(*tokens, lse=lse_tokens, random=random_tokens, **options)

        q, g, o = (x[:, :, num_tokens:] for x in (query, grad, out))
        delta = _dot(g, o)
        of_slots = []  # gradients of q, and of the others' keys and values, a pair for each of the others
        grad_q_slots = torch.zeros((), dtype=delta.dtype, device=q.device)
        for column, other in enumerate(ctx.others):
            k, v = key[:, :, other], value[:, :, other]
            probability, kept = (_dot(q, k) * scale - lse).exp(), factor[..., column]
            grad_score = (probability * (kept * _dot(g, v) - delta) * scale).unsqueeze(-1)
            grad_q_slots = grad_q_slots + grad_score * k
            of_slots.append((grad_score * q, (probability * kept).unsqueeze(-1) * g))
        if past:
            # with the merged output and log-sum-exp: the gradients of the merged softmax
            slots = (g[:, :, 1:], q[:, :, 1:], key[:, :, :past], value[:, :, :past], o[:, :, 1:])
            of_past = causal_attention_backward(*slots, lse=lse[:, :, 1:].contiguous(), random=random_slots, **options)
            grad_q_slots = grad_q_slots + _pad_rows(of_past[0], before=1)
            grad_k, grad_v = (
                x.to(delta.dtype) + _pad_rows(y, after=2) for x, y in zip((grad_k, grad_v), of_past[1:], strict=True)
            )
        for of_neighbour in of_slots[1:]:
            grad_k, grad_v = (x + _pad_rows(y, before=1) for x, y in zip((grad_k, grad_v), of_neighbour, strict=True))
        streams = [(grad_q, grad_q_slots), *zip((grad_k, grad_v), of_slots[0], strict=True)]
        grads = [_cat_rows(*(x.to(query.dtype) for x in of_both)) for of_both in streams]
        return *grads, None, None, None, None, None


def _cat_rows(tokens: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """(B, H, S, D), (B, H, S-1, D) -> (B, H, 2S-1, D), position by position in memory, as `c_proj` reads them."""
    return torch.cat([tokens.transpose(1, 2), slots.transpose(1, 2)], dim=1).transpose(1, 2)


def _pad_rows(x: torch.Tensor, before: int = 0, after: int = 0) -> torch.Tensor:
    """`x` (B, H, K, D), in float32 or better, with rows of zeros."""
    return F.pad(float32_or_better(x), (0, 0, before, after))


def _dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(..., D), (..., D) -> (...), in float32 or better."""
    return (float32_or_better(x) * y).sum(-1)
