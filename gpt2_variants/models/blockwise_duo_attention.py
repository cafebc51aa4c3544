"""Duo-predict's attention in blocks of queries, by plain matrix products: on every device, with dropout too.

The probabilities of a block are computed again in the backward pass.

Shape legend: B batch, S tokens, H heads, D head size, C queries in a block, K keys.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .precision import float32_or_better

# Heads and queries whose probabilities are alive at once on a CPU: as many as its caches hold (benchmarks/NOTES.md).
HEADS = 16
BLOCK = 64


def extra_keys(num_tokens: int, neighbour: bool) -> list[int]:
    """Return where the keys of m_1..m_{S-1} beside their past begin, S-1 each: themselves, the right neighbours."""
    return [num_tokens, 1] if neighbour else [num_tokens]


class _Blocks:
    """The probabilities of one stream's queries, block by block. Tensors are (B * H, ., D), contiguous.

    Args:
        first: where the stream's queries begin.
        queries, past: how many queries there are, and on how many keys, from the first, the last of them looks back;
            a query looks on one key more than the one before it.
        extras: where the other keys begin, one of each for every query.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        first: int,
        queries: int,
        past: int,
        extras: list[int],
        dropout: float,
        scale: float,
        generator: torch.Generator | None,
    ):
        self.query, self.key, self.value = query, key, value
        self.first, self.queries, self.past, self.extras = first, queries, past, extras
        # A probability of 2^-16 n is dropped exactly: random bits are the most of what dropout costs on a CPU.
        self.dropped = round(dropout * 2**16)
        self.scale, self.generator = scale, generator

    def __iter__(self) -> Iterator[tuple[slice, int, list[slice], torch.Tensor, torch.Tensor | None]]:
        """Per block: the slice of its queries, K, its slices of the other keys, and its probabilities and dropout.

        The probabilities are (B * H, C, K + extras), float32 or better; dropout is a factor of that shape, or None.
        """
        for start in range(0, self.queries, BLOCK):
            stop = min(start + BLOCK, self.queries)
            rows = slice(self.first + start, self.first + stop)
            keys = max(self.past - self.queries + stop, 0)
            others = [slice(first + start, first + stop) for first in self.extras]
            q = float32_or_better(self.query[:, rows])
            scores = torch.empty(len(q), stop - start, keys + len(others), dtype=q.dtype, device=q.device)
            if keys:
                past = torch.bmm(q, float32_or_better(self.key[:, :keys]).transpose(1, 2))
                hidden = torch.ones(past.shape[1:], dtype=torch.bool, device=q.device).triu_(keys - (stop - start) + 1)
                scores[..., :keys] = past.masked_fill_(hidden, -torch.inf)
            for column, other in enumerate(others, start=keys):
                scores[..., column] = (q * self.key[:, other]).sum(-1)
            yield rows, keys, others, torch.softmax(scores.mul_(self.scale), -1), self._dropout(scores)

    def _dropout(self, scores: torch.Tensor) -> torch.Tensor | None:
        if not self.dropped:
            return None
        bits = torch.empty(-(-scores.numel() // 4), dtype=torch.long, device=scores.device)
        bits.random_(-(2**63), None, generator=self.generator)
        kept = bits.view(torch.int16)[: scores.numel()].view(scores.shape) >= self.dropped - 2**15
        return kept.to(scores.dtype).mul_(2**16 / (2**16 - self.dropped))


def _streams(
    tensors: Sequence[torch.Tensor],
    seed: torch.Tensor,
    num_tokens: int,
    neighbour: bool,
    dropout: float,
    scale: float,
) -> Iterator[tuple[_Blocks, tuple[torch.Tensor, ...]]]:
    """Yield both streams of a few heads after the other; `tensors` (B * H, ., .) are query, key, value and others.

    Few enough heads that the probabilities of a block stay in a CPU's cache. Yields `_Blocks`, and the heads' tensors.
    """
    device = tensors[0].device
    generator = torch.Generator(device).manual_seed(int(seed)) if dropout else None
    tokens: tuple[int, int, int, list[int]] = (0, num_tokens, num_tokens, [])
    slots = (num_tokens, num_tokens - 1, num_tokens - 2, extra_keys(num_tokens, neighbour))
    for heads in zip(*(x.split(HEADS) if device.type == "cpu" else [x] for x in tensors), strict=True):
        query, key, value, *_ = heads
        for stream in (tokens, slots):
            yield _Blocks(query, key, value, *stream, dropout, scale, generator), heads


def _merge_heads(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.flatten(0, 1).contiguous() for x in tensors]


def _in_own_dtype(operator: Callable) -> Callable:
    """Return `operator`, whose first argument is a tensor, with autocast off, which would round the scores."""

    @functools.wraps(operator)
    def run(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return operator(*args)

    return run


@torch.library.custom_op("gpt2_variants::duo_attention", mutates_args=())
@_in_own_dtype
def blockwise_duo_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor,
    num_tokens: int,
    neighbour: bool,
    dropout: float,
    scale: float,
) -> torch.Tensor:
    """Return what `duo_attention` does; `seed` is that of the dropout."""
    q, k, v = _merge_heads(query, key, value)
    whole = torch.empty_like(q)
    for blocks, (*_, values, out) in _streams((q, k, v, whole), seed, num_tokens, neighbour, dropout, scale):
        for rows, keys, others, probabilities, factor in blocks:
            weights = probabilities if factor is None else probabilities.mul_(factor)
            mixed = float32_or_better(torch.bmm(weights[..., :keys].to(values.dtype), values[:, :keys]))
            for column, other in enumerate(others, start=keys):
                mixed += weights[..., column, None] * values[:, other]
            out[:, rows] = mixed
    return whole.view(query.shape)


@blockwise_duo_attention.register_fake
def _(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


@torch.library.custom_op("gpt2_variants::duo_attention_backward", mutates_args=())
@_in_own_dtype
def _blockwise_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor,
    num_tokens: int,
    neighbour: bool,
    dropout: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g, q, k, v = _merge_heads(grad, query, key, value)
    # those of the keys and values are sums over blocks
    grads = (torch.empty_like(q), torch.zeros_like(float32_or_better(k)), torch.zeros_like(float32_or_better(v)))
    for blocks, heads in _streams((q, k, v, g, *grads), seed, num_tokens, neighbour, dropout, scale):
        q, k, v, g, grad_q, grad_k, grad_v = heads
        for rows, keys, others, probabilities, factor in blocks:
            g_rows, q_rows = g[:, rows], q[:, rows]
            weights = probabilities if factor is None else probabilities * factor
            grad_weights = torch.empty_like(probabilities)
            grad_weights[..., :keys] = torch.bmm(g_rows, v[:, :keys].transpose(1, 2))
            for column, other in enumerate(others, start=keys):
                grad_weights[..., column] = (float32_or_better(g_rows) * v[:, other]).sum(-1)
                grad_v[:, other] += weights[..., column, None] * g_rows
            if factor is not None:
                grad_weights.mul_(factor)
            grad_scores = torch._softmax_backward_data(grad_weights, probabilities, -1, probabilities.dtype)
            grad_scores.mul_(scale)
            of_past = grad_scores[..., :keys].to(q.dtype)
            grad_v[:, :keys] += torch.bmm(weights[..., :keys].to(v.dtype).transpose(1, 2), g_rows)
            grad_k[:, :keys] += torch.bmm(of_past.transpose(1, 2), q_rows)
            grad_q_rows = float32_or_better(torch.bmm(of_past, k[:, :keys]))
            for column, other in enumerate(others, start=keys):
                grad_q_rows += grad_scores[..., column, None] * k[:, other]
                grad_k[:, other] += grad_scores[..., column, None] * q_rows
            grad_q[:, rows] = grad_q_rows
    of_query, of_key, of_value = (x.to(query.dtype).view(query.shape) for x in grads)
    return of_query, of_key, of_value


@_blockwise_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    query, key, value, seed, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, seed)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return *_blockwise_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


blockwise_duo_attention.register_autograd(_backward, setup_context=_keep_for_backward)
