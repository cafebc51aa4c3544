"""Loss, perplexity and accuracy: over the validation blocks on all ranks, or by a window that slides over a text."""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist


def evaluate(
    score: Callable, batches: Iterable[dict[str, torch.Tensor]], device: torch.device | str
) -> dict[str, float]:
    """`eval_loss`, `eval_perplexity` and `eval_accuracy` of the next token, and the same of every further stream.

    Args:
        score: (input_ids, labels), each (B, S) -> stream -> `TokenScores`.
        batches: this rank's; every rank must have the same number of them (ZeRO stage 3 gathers weights in step).
        device: where `score` computes.

    Returns:
        Means over the predictions of all ranks: the loss in nats per token, its exp, and the part predicted right.
        "infill" gives `eval_infill_loss` and so on.
    """
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        for stream, scores in score(batch["input_ids"].to(device), batch["labels"].to(device)).items():
            correct = scores.correct & scores.valid
            part = torch.stack([x.sum(dtype=torch.float64) for x in (scores.nll, correct, scores.valid)])
            sums[stream] = sums.get(stream, 0) + part
    figures = {}
    for stream, total in sums.items():
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(total)
        nll, correct, count = total.tolist()
        prefix = "eval_" if stream == "next_token" else f"eval_{stream}_"
        loss = nll / count
        figures[f"{prefix}loss"] = loss
        figures[f"{prefix}perplexity"] = math.exp(min(loss, 700.0))  # exp overflows a float64 above that
        figures[f"{prefix}accuracy"] = correct / count
    return figures


def describe(figures: dict[str, float]) -> list[str]:
    """What `evaluate` returned in words: a line on the next token and, where there is one, a line on infill."""

    def line(prefix: str) -> str:
        loss, perplexity, accuracy = (figures[prefix + name] for name in ("loss", "perplexity", "accuracy"))
        return f"perplexity {perplexity:.2f}, loss {loss:.4f}, accuracy {accuracy:.3f}"

    lines = [line("eval_")]
    if "eval_infill_loss" in figures:
        lines.append(
            f"infill      {line('eval_infill_')} (each token given its past and its right neighbour: not comparable "
            "with the line above)"
        )
    return lines


def window_starts(num_tokens: int, block_size: int, stride: int) -> list[tuple[int, int]]:
    """Where windows of a fixed size lie over a text, and from where on the tokens in each are new.

    Window i begins at token i * stride, as in transformers' "Perplexity of fixed-length models"; but the last one is
    moved back to end with the text, so that all are equally long.

    Args:
        num_tokens: N, length of the text.
        block_size: tokens per window; a shorter text is one window.
        stride: tokens from one window to the next, 1 to `block_size`.

    Returns:
        (start, new) of each window: it predicts its tokens from number `new` (at least 1) on, counted from its start.
        Together they predict every token of the text once, except the first of the text and, without overlap
        (`stride == block_size`), the first of each window, which has no context there.
    """
    size = min(block_size, num_tokens)
    windows, end = [], 0
    for start in range(0, num_tokens, stride):
        start = min(start, num_tokens - size)
        windows.append((start, max(1, end - start)))
        end = start + size
        if end == num_tokens:
            break
    return windows


def window_batches(
    tokens: np.ndarray, block_size: int, stride: int, batch_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """The windows of `window_starts` over `tokens` (N,): `input_ids` and `labels` (B, S), -100 where not new."""
    size = min(block_size, len(tokens))
    windows = window_starts(len(tokens), block_size, stride)
    for first in range(0, len(windows), batch_size):
        starts, new = (torch.tensor(column).unsqueeze(1) for column in zip(*windows[first : first + batch_size]))
        place = torch.arange(size).expand(len(starts), -1)
        input_ids = torch.from_numpy(tokens[(starts + place).numpy()].astype(np.int64))
        yield {"input_ids": input_ids, "labels": input_ids.masked_fill(place < new, -100)}


def score_new_tokens(score: Callable, input_ids: torch.Tensor, labels: torch.Tensor) -> dict:
    """`score(input_ids)`, in which only the predictions count that a window makes for the first time.

    Prediction n of either stream reaches as far as token n+1: the next-token stream predicts it, the infill stream
    predicts token n with token n+1 as the right neighbour. So both count where `labels` (B, S) has token n+1, and each
    counts once over all windows.

    Args:
        score: input_ids (B, S) -> stream -> `TokenScores` (B, S-1).
    """
    new = labels[:, 1:] != -100
    return {
        stream: scores._replace(nll=scores.nll * new, valid=scores.valid & new)
        for stream, scores in score(input_ids).items()
    }
