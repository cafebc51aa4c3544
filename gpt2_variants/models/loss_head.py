"""The output projection and its loss, without the (N, V) logits.

Training needs the sum of the losses, and for its records their values. A chunk of rows at a time, its logits become
their own gradient in place, and what remains of a chunk is its part of the gradients: three matrix products a row, as
many as the plain head needs, and logits of one chunk. (torch 2.13's chunked `linear_cross_entropy` does the same, but
returns its loss in the dtype of its input, 10.75 for 11.03 in bf16, and multiplies bf16 in float32 on a CPU:
benchmarks/NOTES.md.)

Shape legend: B batch, N predictions, R rows of a chunk, E channels, V vocabulary.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .precision import float32_or_better

IGNORE_INDEX = -100  # a label that is not predicted, as everywhere in PyTorch and transformers
CHUNK_ROWS = {"cpu": 1024, "cuda": 4096}  # rows of logits alive at once, by type of device; 4096 elsewhere
VOCABULARY_MULTIPLE = 128  # what CUDA's matrix products want of a dimension; 50,257 is odd


class TokenScores(NamedTuple):
    """How one stream of predictions did, prediction by prediction.

    Attributes:
        nll: (B, N) negative log-likelihood of the target in nats, float32 or better; 0 where ignored.
        correct: (B, N) bool, the most probable token is the target; None unless asked for.
        valid: (B, N) bool, False where the label was -100.
    """

    nll: torch.Tensor
    correct: torch.Tensor | None
    valid: torch.Tensor


def chunk_rows(device_type: str) -> int:
    """Return how many rows of logits are alive at once on that type of device."""
    return CHUNK_ROWS.get(device_type, 4096)


class LMHead(nn.Linear):
    """The tied output projection, which can also score targets without materialising the (N, V) logits.

    Scoring is a `forward` of this module, not a function over its weight, so that ZeRO stage 3 gathers the weight.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._logits_to_grad = logits_to_grad

    def compile_loss(self) -> None:
        """Fuse the elementwise part of the loss by `torch.compile`."""
        self._logits_to_grad = torch.compile(logits_to_grad, dynamic=False)

    def __getstate__(self) -> dict[str, Any]:
        # what is compiled cannot be pickled
        return {**super().__getstate__(), "_logits_to_grad": logits_to_grad}  # type: ignore[misc]

    def forward(  # type: ignore[override]  # nn.Linear's scores nothing
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        summed: bool = False,
        with_correct: bool = False,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor | TokenScores | tuple[torch.Tensor, torch.Tensor]:
        """Return the logits (..., V) of `hidden` (..., E); given `targets`, `score_targets`, or `summed_loss`."""
        if targets is None:
            return super().forward(hidden)
        if not summed:
            return _score_in_chunks(super().forward, hidden, targets, with_correct)
        if not torch.is_grad_enabled():
            return _with_sum(_score_in_chunks(super().forward, hidden, targets), weights)
        rows = hidden.reshape(-1, hidden.shape[-1])
        device = rows.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype
        with torch.autocast(device, enabled=False):
            total, nll = _SummedLoss.apply(
                rows.to(dtype),
                self.weight.to(dtype),
                targets.reshape(-1),
                None if weights is None else weights.reshape(-1),
                self._logits_to_grad,
            )
        return total, nll.view_as(targets)


def score_targets(
    head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, with_correct: bool = False
) -> TokenScores:
    """Return the `TokenScores` of `head` on `hidden` (B, N, E) for `targets` (B, N), -100 where ignored.

    The logits are formed some rows at a time in the model's dtype, and again in the backward pass; the softmax is
    float32 or better. What stands in the place of `LMHead`, such as an adapter around it, is called for its logits.
    """
    if isinstance(head, LMHead):
        return head(hidden, targets, with_correct=with_correct)
    return _score_in_chunks(head, hidden, targets, with_correct)


def summed_loss(
    head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the losses that `score_targets` gives, a scalar; each counts by its `weights` (B, N), else 1.

    Beside it the losses themselves, (B, N), unweighted and without a gradient. `LMHead` makes the gradients of the sum
    with it and forms no logits twice.
    """
    if isinstance(head, LMHead):
        return head(hidden, targets, summed=True, weights=weights)
    return _with_sum(_score_in_chunks(head, hidden, targets), weights)


def _with_sum(scores: TokenScores, weights: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return (scores.nll if weights is None else scores.nll * weights).sum(), scores.nll.detach()


def _score_in_chunks(
    logits_of: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    with_correct: bool = False,
) -> TokenScores:
    """Return what `score_targets` does, from the logits of some rows at a time."""

    def score(h: torch.Tensor, t: torch.Tensor) -> TokenScores:
        return score_logits(logits_of(h), t, with_correct)

    rows, flat_targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    size = chunk_rows(rows.device.type)
    chunks = []
    for h, t in zip(rows.split(size), flat_targets.split(size), strict=True):
        if torch.is_grad_enabled():
            chunks.append(checkpoint(score, h, t, use_reentrant=False))
        else:
            chunks.append(score(h, t))
    nll, correct, valid = zip(*chunks, strict=True)
    return TokenScores(
        nll=torch.cat(nll).view_as(targets),
        correct=torch.cat(correct).view_as(targets) if with_correct else None,
        valid=torch.cat(valid).view_as(targets),
    )


def score_logits(logits: torch.Tensor, targets: torch.Tensor, with_correct: bool = False) -> TokenScores:
    """Return the `TokenScores` of `logits` (..., N, V) for `targets` (..., N); the softmax is float32 or better."""
    logits = float32_or_better(logits)
    nll = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return TokenScores(
        nll=nll.view_as(targets),
        correct=logits.argmax(-1) == targets if with_correct else None,
        valid=targets != IGNORE_INDEX,
    )


def logits_to_grad(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed cross-entropy of `logits` (R, V) for `targets` (R,), its gradient (R, V), and the cross-entropies (R,).

    Each row counts in the sum by its `weights` (R,), if there are any. Softmax and sum in float32 or better; the
    gradient in the dtype of `logits`, which may be overwritten: with log_softmax and its exponential instead, a CPU
    takes a third longer (benchmarks/NOTES.md). Where nothing is predicted all of it is 0.
    """
    if torch.compiler.is_compiling():
        return _fused_logits_to_grad(logits, targets, weights)
    x = float32_or_better(logits)
    predicted = valid = (targets != IGNORE_INDEX).unsqueeze(1)
    if weights is not None:
        valid = valid * weights.unsqueeze(1).to(x.dtype)
    index = targets.clamp(min=0).unsqueeze(1)
    of_target, top = x.gather(1, index), x.amax(-1, keepdim=True)
    grad = x.sub_(top).exp_()
    normaliser = grad.sum(-1, keepdim=True)
    nll = normaliser.log() + top - of_target
    loss = (nll * valid).sum()
    grad.mul_(valid / normaliser)
    grad.scatter_add_(1, index, -valid.to(grad.dtype))
    return loss, grad.to(logits.dtype), (nll * predicted).squeeze(1)


def _fused_logits_to_grad(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what `logits_to_grad` does, for inductor: it reads the logits twice and writes the gradient once.

    The target's entry is told by comparing indices. A scatter would need the whole gradient in float32 first.
    """
    x = float32_or_better(logits)
    is_target = torch.arange(x.shape[-1], device=x.device) == targets.unsqueeze(1)
    top = x.amax(-1, keepdim=True)
    normaliser = (x - top).exp().sum(-1, keepdim=True)
    of_target = torch.where(is_target, x, 0).sum(-1, keepdim=True)
    predicted = counted = (targets != IGNORE_INDEX).unsqueeze(1).to(x.dtype)
    if weights is not None:
        counted = counted * weights.unsqueeze(1).to(x.dtype)
    nll = normaliser.log() + top - of_target
    grad = (x - top).exp() * (counted / normaliser) - torch.where(is_target, counted, 0)
    return (nll * counted).sum(), grad.to(logits.dtype), (nll * predicted).squeeze(1)


def padding_of(weight: torch.Tensor) -> int:
    """Return how many rows of zeros, no parameters and no tokens, `weight` (V, E) gets for the training loss."""
    return 0 if weight.device.type == "cpu" else -len(weight) % VOCABULARY_MULTIPLE


class _SummedLoss(torch.autograd.Function):
    """Summed cross-entropy of `hidden` (N, E) times `weight` (V, E) for `targets` (N,), its gradients made with it.

    Beside the sum its unweighted addends (N,), for which there is no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        loss_and_grad: Callable,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        size = chunk_rows(hidden.device.type)
        precise = torch.float32 if weight.dtype.itemsize < torch.float32.itemsize else weight.dtype
        padding = padding_of(weight)
        padded = F.pad(weight, (0, 0, 0, padding)) if padding else weight
        total = torch.zeros((), dtype=precise, device=hidden.device)
        addends = []
        grad_hidden = torch.empty_like(hidden)
        grad_weight: torch.Tensor | None = None
        parts = [hidden.split(size), targets.split(size), grad_hidden.split(size)]
        of_rows = itertools.repeat(None, len(parts[0])) if weights is None else weights.split(size)
        for h, t, grad_h, w in zip(*parts, of_rows, strict=True):
            logits = torch.mm(h, padded.t())
            if padding:
                logits[:, -padding:] = -torch.inf
            loss, grad, nll = loss_and_grad(logits, t, w)
            del logits
            total += loss
            addends.append(nll)
            torch.mm(grad, padded, out=grad_h)
            if grad_weight is None:
                grad_weight = torch.mm(grad.t(), h)
                if len(hidden) > size:
                    grad_weight = grad_weight.to(precise)
            elif grad.dtype == precise:
                grad_weight.addmm_(grad.t(), h)
            else:  # a chunk's part in the model's dtype, as the plain head's gradient is; their sum is not
                grad_weight += torch.mm(grad.t(), h)
        assert grad_weight is not None  # split gives a chunk even of no rows
        ctx.save_for_backward(grad_hidden, grad_weight[: len(weight)])
        ctx.dtype = weight.dtype
        nll = torch.cat(addends)
        ctx.mark_non_differentiable(nll)
        return total, nll

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scaled = torch.empty_like(grad_weight, dtype=ctx.dtype)
        grad_weight = torch.mul(grad_weight, grad, out=scaled)
        return (grad_hidden * grad).to(grad_hidden.dtype), grad_weight, None, None, None
