"""Duo-predict's attention without its dense (2S-1)^2 mask: exact, in memory linear in S.

The tokens are causal over t_1..t_S. So is the past of the mask slots once they are shifted by one: m_2..m_{S-1} over
t_1..t_{S-2} is causal as well. A slot's own key, and its right neighbour where it sees it, join the same softmax.

Two ways, equal but for rounding:
  PyTorch's flash attention kernel for both pasts, where there is one: bf16 and fp16 on CUDA, without dropout on CPUs. A
      slot's other keys are merged through the log-sum-exp; backward, the kernel is given the merged output and
      log-sum-exp, and so differentiates the merged softmax.
  Else blocks of queries, in plain matrix products; their probabilities are computed again in the backward pass.

Shape legend: B batch, S tokens, H heads, D head size, C queries in a block, K keys.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

# Heads and queries whose probabilities are alive at once on a CPU: as many as its caches hold (benchmarks/NOTES.md).
HEADS = 16
BLOCK = 64


def duo_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_tokens: int,
    neighbour: bool,
    dropout: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention of t_1..t_S m_1..m_{S-1} over each other, as `variants.md`, section 3, says.

    Args:
        query, key, value: (B, H, 2S-1, D).
        num_tokens: S, at least 2.
        neighbour: a mask slot m_k sees t_{k+1}, beside its past and itself.
        dropout: probability with which each attention weight is dropped, in steps of 2^-16 where not on CUDA's kernel.
        scale: of the scores; None: D^-1/2.

    Returns:
        (B, H, 2S-1, D), of the dtype of `query`.

    Raises:
        ValueError: the streams have another length than 2S-1, or fewer than 2 tokens.
    """
    if num_tokens < 2 or query.shape[2] != 2 * num_tokens - 1:
        raise ValueError(
            f"duo_attention: {num_tokens} tokens and a length of {query.shape[2]}; at least 2 tokens are needed, and a "
            "length of twice as many less one"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    flash_on_cuda = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0
    if flash_on_cuda or (query.device.type == "cpu" and not dropout):
        return _FlashDuoAttention.apply(query, key, value, num_tokens, neighbour, dropout, scale)
    # drawn from the default generator, so that a seed, and recomputation under activation checkpointing, repeat it
    seed = torch.randint(2**62, ()) if dropout else torch.zeros((), dtype=torch.long)
    return _blockwise(query, key, value, seed, num_tokens, neighbour, dropout, scale)


def _extra_keys(num_tokens: int, neighbour: bool) -> list[int]:
    """Where the keys of m_1..m_{S-1} that are not their past begin, each S-1 long: themselves, the right neighbours."""
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
            q = _float32(self.query[:, rows])
            scores = torch.empty(len(q), stop - start, keys + len(others), dtype=q.dtype, device=q.device)
            if keys:
                past = torch.bmm(q, _float32(self.key[:, :keys]).transpose(1, 2))
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


def _float32(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype.itemsize < torch.float32.itemsize else x


def _streams(
    tensors: Sequence[torch.Tensor],
    seed: torch.Tensor,
    num_tokens: int,
    neighbour: bool,
    dropout: float,
    scale: float,
) -> Iterator[tuple[_Blocks, tuple[torch.Tensor, ...]]]:
    """Both streams of a few heads after the other; of the `tensors` (B * H, ., .), the first are query, key and value.

    Few enough heads that the probabilities of a block stay in a CPU's cache. Yields `_Blocks`, and the heads' tensors.
    """
    device = tensors[0].device
    generator = torch.Generator(device).manual_seed(int(seed)) if dropout else None
    tokens: tuple[int, int, int, list[int]] = (0, num_tokens, num_tokens, [])
    slots = (num_tokens, num_tokens - 1, num_tokens - 2, _extra_keys(num_tokens, neighbour))
    for heads in zip(*(x.split(HEADS) if device.type == "cpu" else [x] for x in tensors), strict=True):
        query, key, value, *_ = heads
        for stream in (tokens, slots):
            yield _Blocks(query, key, value, *stream, dropout, scale, generator), heads


def _merge_heads(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.flatten(0, 1).contiguous() for x in tensors]


def _in_own_dtype(operator: Callable) -> Callable:
    """`operator`, whose first argument is a tensor, with autocast off: it would round the scores."""

    @functools.wraps(operator)
    def run(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return operator(*args)

    return run


@torch.library.custom_op("gpt2_variants::duo_attention", mutates_args=())
@_in_own_dtype
def _blockwise(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seed: torch.Tensor,
    num_tokens: int,
    neighbour: bool,
    dropout: float,
    scale: float,
) -> torch.Tensor:
    q, k, v = _merge_heads(query, key, value)
    whole = torch.empty_like(q)
    for blocks, (*_, values, out) in _streams((q, k, v, whole), seed, num_tokens, neighbour, dropout, scale):
        for rows, keys, others, probabilities, factor in blocks:
            weights = probabilities if factor is None else probabilities.mul_(factor)
            mixed = _float32(torch.bmm(weights[..., :keys].to(values.dtype), values[:, :keys]))
            for column, other in enumerate(others, start=keys):
                mixed += weights[..., column, None] * values[:, other]
            out[:, rows] = mixed
    return whole.view(query.shape)


@_blockwise.register_fake
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
    grads = (torch.empty_like(q), torch.zeros_like(_float32(k)), torch.zeros_like(_float32(v)))
    for blocks, heads in _streams((q, k, v, g, *grads), seed, num_tokens, neighbour, dropout, scale):
        q, k, v, g, grad_q, grad_k, grad_v = heads
        for rows, keys, others, probabilities, factor in blocks:
            g_rows, q_rows = g[:, rows], q[:, rows]
            weights = probabilities if factor is None else probabilities * factor
            grad_weights = torch.empty_like(probabilities)
            grad_weights[..., :keys] = torch.bmm(g_rows, v[:, :keys].transpose(1, 2))
            for column, other in enumerate(others, start=keys):
                grad_weights[..., column] = (_float32(g_rows) * v[:, other]).sum(-1)
                grad_v[:, other] += weights[..., column, None] * g_rows
            if factor is not None:
                grad_weights.mul_(factor)
            grad_scores = torch._softmax_backward_data(grad_weights, probabilities, -1, probabilities.dtype)
            grad_scores.mul_(scale)
            of_past = grad_scores[..., :keys].to(q.dtype)
            grad_v[:, :keys] += torch.bmm(weights[..., :keys].to(v.dtype).transpose(1, 2), g_rows)
            grad_k[:, :keys] += torch.bmm(of_past.transpose(1, 2), q_rows)
            grad_q_rows = _float32(torch.bmm(of_past, k[:, :keys]))
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


_blockwise.register_autograd(_backward, setup_context=_keep_for_backward)


class _FlashDuoAttention(torch.autograd.Function):
    """Both pasts by a flash attention kernel, a slot's other keys merged with theirs through the log-sum-exp."""

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
    ) -> torch.Tensor:
        past = num_tokens - 2
        tokens = [x[:, :, :num_tokens] for x in (query, key, value)]
        slots = [query[:, :, num_tokens + 1 :], key[:, :, :past], value[:, :, :past]]
        out_tokens, lse_tokens, *random_tokens = _flash(*tokens, dropout=dropout, scale=scale)

        q = query[:, :, num_tokens:]
        others = [slice(first, first + num_tokens - 1) for first in _extra_keys(num_tokens, neighbour)]
        scores = torch.stack([_dot(q, key[:, :, other]) * scale for other in others], dim=-1)
        if dropout:
            factor = (torch.rand_like(scores) >= dropout).to(scores.dtype) / (1 - dropout)
        else:
            factor = torch.ones_like(scores)
        lse = scores.logsumexp(-1)
        if past:
            out_past, lse_past, *random_slots = _flash(*slots, dropout=dropout, scale=scale)
            lse_past = F.pad(lse_past, (1, 0), value=-torch.inf)  # m_1 has no past
            lse = torch.logaddexp(lse, lse_past)
            out_slots = F.pad(out_past, (0, 0, 1, 0)) * (lse_past - lse).exp().unsqueeze(-1)
        else:
            random_slots, out_slots = random_tokens, torch.zeros_like(q)
        weights = (scores - lse.unsqueeze(-1)).exp() * factor
        for column, other in enumerate(others):
            out_slots = out_slots + weights[..., column, None] * value[:, :, other]
        out = torch.cat([out_tokens, out_slots.to(query.dtype)], dim=2)

        ctx.save_for_backward(query, key, value, out, lse_tokens, lse, factor, *random_tokens, *random_slots)
        ctx.num_tokens, ctx.others, ctx.dropout, ctx.scale = num_tokens, others, dropout, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse_tokens, lse, factor, *random = ctx.saved_tensors
        num_tokens, past = ctx.num_tokens, ctx.num_tokens - 2
        random_tokens, random_slots = random[: len(random) // 2], random[len(random) // 2 :]
        tokens = [x[:, :, :num_tokens] for x in (grad, query, key, value, out)]
        options = {"dropout": ctx.dropout, "scale": ctx.scale}
        grad_q, grad_k, grad_v = _flash_backward(*tokens, lse=lse_tokens, random=random_tokens, **options)

        q, g, o = (x[:, :, num_tokens:] for x in (query, grad, out))
        delta = _dot(g, o)
        grad_q_slots = torch.zeros_like(q, dtype=delta.dtype)
        grad_k, grad_v = (F.pad(x.to(delta.dtype), (0, 0, 0, num_tokens - 1)) for x in (grad_k, grad_v))
        if past:
            # with the merged output and log-sum-exp: the gradients of the merged softmax
            slots = (g[:, :, 1:], q[:, :, 1:], key[:, :, :past], value[:, :, :past], o[:, :, 1:])
            grads = _flash_backward(*slots, lse=lse[:, :, 1:].contiguous(), random=random_slots, **options)
            grad_q_slots[:, :, 1:] += grads[0]
            grad_k[:, :, :past] += grads[1]
            grad_v[:, :, :past] += grads[2]
        for column, other in enumerate(ctx.others):
            k, v = key[:, :, other], value[:, :, other]
            probability, kept = (_dot(q, k) * ctx.scale - lse).exp(), factor[..., column]
            grad_score = (probability * (kept * _dot(g, v) - delta) * ctx.scale).unsqueeze(-1)
            grad_q_slots += grad_score * k
            grad_k[:, :, other] += grad_score * q
            grad_v[:, :, other] += (probability * kept).unsqueeze(-1) * g
        grad_q = torch.cat([grad_q, grad_q_slots.to(query.dtype)], dim=2)
        return grad_q, grad_k.to(query.dtype), grad_v.to(query.dtype), None, None, None, None


def _dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(..., D), (..., D) -> (...), in float32 or better."""
    return (_float32(x) * y).sum(-1)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, dropout: float, scale: float
) -> tuple[torch.Tensor, ...]:
    """Causal attention: its output, its log-sum-exp (B, H, S), and on CUDA the state of its random numbers."""
    if query.device.type != "cpu":
        attention = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, _, _, _, _, seed, offset, _ = attention(query, key, value, dropout, True, False, scale=scale)
        return out, lse, seed, offset
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scale)


def _flash_backward(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if query.device.type != "cpu":
        backward, length = torch.ops.aten._scaled_dot_product_flash_attention_backward, query.shape[2]
        return backward(
            *(grad, query, key, value, out, lse, None, None, length, length, dropout, True, *random), scale=scale
        )
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(grad, query, key, value, out, lse, dropout, True, scale=scale)
