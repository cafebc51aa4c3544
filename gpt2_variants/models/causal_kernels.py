"""PyTorch's fused causal attention kernels, called so that they also give and take their log-sum-exp.

`scaled_dot_product_attention` keeps it to itself; to merge further keys into the softmax, it has to be at hand.

Shape legend: B batch, S tokens, H heads, D head size.
"""

from collections.abc import Sequence
from typing import Any

import torch

KERNELS = ("flash", "cudnn")  # cudnn: on CUDA only
LARGEST_HEAD = 256  # of both kernels
OLDEST_DEVICE = (8, 0)  # compute capability: Ampere


@torch.compiler.assume_constant_result
def _recent(device: torch.device) -> bool:
    # compared here: dynamo of torch 2.11 cannot compare a constant tuple
    return torch.cuda.get_device_capability(device) >= OLDEST_DEVICE


def has_causal_kernel(query: torch.Tensor, dropout: float) -> bool:
    """Return whether there is a kernel for `query` (B, H, S, D): elsewhere than on CPUs and CUDA there is none."""
    if query.device.type == "cpu":
        return not dropout
    head_size, half = query.shape[-1], query.dtype in (torch.bfloat16, torch.float16)
    if not (query.is_cuda and half and head_size % 8 == 0 and head_size <= LARGEST_HEAD):
        return False
    return _recent(query.device)


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout: float, scale: float, kernel: str
) -> tuple[torch.Tensor, ...]:
    """Causal attention of (B, H, S, D): its output, its log-sum-exp (B, H, S), and on CUDA the state of its dropout."""
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)
    if kernel == "cudnn":
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention
        out, lse, _, _, _, _, *random, _ = cudnn(query, key, value, None, True, dropout, True, scale=scale)
        return out, lse.view(lse.shape[:3]), *random
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    out, lse, _, _, _, _, *random, _ = flash(query, key, value, dropout, True, scale=scale)
    return out, lse, *random


def causal_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    *,
    lse: torch.Tensor,
    random: Sequence[torch.Tensor],
    dropout: float,
    scale: float,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return gradients of `query`, `key` and `value` (B, H, S, D).

    `out` and `lse` are those of a softmax over these keys or more.

    `random` is the state of the dropout that `causal_attention` returned.
    """
    given: tuple[Any, ...] = (grad, query, key, value, out)
    if query.device.type == "cpu":
        of_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return of_cpu(*given, lse, dropout, True, scale=scale)
    lengths = (None, None, query.shape[2], key.shape[2])
    if kernel == "cudnn":
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
        return cudnn(*given, lse.unsqueeze(-1), *random, None, *lengths, dropout, True, scale=scale)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_backward
    return flash(*given, lse, *lengths, dropout, True, *random, scale=scale)
