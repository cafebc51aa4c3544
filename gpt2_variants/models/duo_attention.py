"""Duo-predict's attention without its dense (2S-1)^2 mask: exact, in memory linear in S.

The tokens are causal over t_1..t_S. So is the past of the mask slots once they are shifted by one: m_2..m_{S-1} over
t_1..t_{S-2} is causal as well. A slot's own key, and its right neighbour where it sees it, join the same softmax.

Two ways, equal but for rounding:
  A fused kernel of PyTorch's for both pasts, where there is one: bf16 and fp16 on CUDA from compute capability 8.0 on,
      for heads of up to 256 channels, and without dropout on CPUs. A slot's other keys are merged through the
      log-sum-exp; backward, the kernel is given the merged output and log-sum-exp, and so differentiates the merged
      softmax.
  Else blocks of queries, in plain matrix products; their probabilities are computed again in the backward pass.

Shape legend: B batch, S tokens, H heads, D head size, C queries in a block, K keys.
"""

import torch

from .blockwise_duo_attention import blockwise_duo_attention
from .causal_kernels import KERNELS, has_causal_kernel
from .flash_duo_attention import FlashDuoAttention


def duo_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_tokens: int,
    neighbour: bool,
    dropout: float = 0.0,
    scale: float | None = None,
    kernel: str = "flash",
) -> torch.Tensor:
    """Return softmax attention of t_1..t_S m_1..m_{S-1} over each other: a token sees itself and its past, m_k sees
    itself, t_1..t_{k-1} and, as `neighbour` says, t_{k+1}.

    Args:
        query, key, value: (B, H, 2S-1, D).
        num_tokens: S, at least 2.
        neighbour: a mask slot m_k sees t_{k+1}, beside its past and itself.
        dropout: probability with which each attention weight is dropped, in steps of 2^-16 where not on CUDA's kernel.
        scale: of the scores; None: D^-1/2.
        kernel: which fused kernel computes the pasts on CUDA: "flash", or "cudnn".

    Returns:
        (B, H, 2S-1, D), of the dtype of `query`.

    Raises:
        ValueError: the streams have another length than 2S-1, or fewer than 2 tokens; or another `kernel`.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel={kernel!r}: one of {', '.join(KERNELS)} is allowed")
    if num_tokens < 2 or query.shape[2] != 2 * num_tokens - 1:
        raise ValueError(
            f"duo_attention: {num_tokens} tokens and a length of {query.shape[2]}; at least 2 tokens are needed, and a "
            "length of twice as many less one"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if has_causal_kernel(query, dropout):
        return FlashDuoAttention.apply(query, key, value, num_tokens, neighbour, dropout, scale, kernel)
    # drawn from the default generator, so that a seed, and recomputation under activation checkpointing, repeat it
    seed = torch.randint(2**62, ()) if dropout else torch.zeros((), dtype=torch.long)
    return blockwise_duo_attention(query, key, value, seed, num_tokens, neighbour, dropout, scale)
