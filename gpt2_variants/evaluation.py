"""Loss, perplexity and accuracy: over the validation blocks on all ranks, or by a window that slides over a text."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from .models.streams import Stream

if TYPE_CHECKING:
    from .models.modeling_base import VariantLMHeadModel

UNDECLARED = "Another stream of predictions than the next token's, of which no more is told: not comparable with it."


def evaluate(
    score: Callable, batches: Iterable[dict[str, torch.Tensor]], device: torch.device | str
) -> dict[str, float]:
    """Return `eval_loss`, `eval_perplexity` and `eval_accuracy` of the next token and of every further stream.

    Args:
        score: (input_ids, labels), each (B, S) -> stream -> `TokenScores`.
        batches: this rank's; every rank must have the same number of them (ZeRO stage 3 gathers weights in step).
        device: where `score` computes.

    Returns:
        Means over the predictions of all ranks: the loss in nats per token, its exp, and the part predicted right.
        A stream named "x" gives `eval_x_loss` and so on, where it predicts anything.
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
        if not count and stream != "next_token":  # of texts that are too short for it
            continue
        prefix = "eval_" if stream == "next_token" else f"eval_{stream}_"
        loss = nll / count
        figures[f"{prefix}loss"] = loss
        figures[f"{prefix}perplexity"] = math.exp(min(loss, 700.0))  # exp overflows a float64 above that
        figures[f"{prefix}accuracy"] = correct / count
    return figures


def streams_in(figures: Mapping[str, Any], declared: Iterable[Stream]) -> list[Stream]:
    """Return the streams beside the next-token one that `figures` of `evaluate` tell of, the declared ones first.

    One that is not declared, as in the record of an older run, has its name for a title.
    """
    found = [stream for stream in declared if f"eval_{stream.name}_loss" in figures]
    known = {stream.name for stream in found}
    names = (match[1] for match in map(re.compile(r"eval_(.+)_loss").fullmatch, figures) if match)
    return found + [Stream(name, name, UNDECLARED) for name in names if name not in known]


def describe(figures: dict[str, Any], declared: Iterable[Stream] = ()) -> list[str]:
    """Say in words what `evaluate` returned: a line on the next token, and one per further stream with its caveat."""

    def line(prefix: str) -> str:
        loss, perplexity, accuracy = (figures[prefix + name] for name in ("loss", "perplexity", "accuracy"))
        return f"perplexity {perplexity:.2f}, loss {loss:.4f}, accuracy {accuracy:.3f}"

    further = [
        f"{stream.name:<10}  {line(f'eval_{stream.name}_')}. {stream.caveat}"
        for stream in streams_in(figures, declared)
    ]
    return [line("eval_"), *further]


def window_starts(num_tokens: int, block_size: int, stride: int) -> list[tuple[int, int]]:
    """Return where windows of a fixed size lie over a text, and from where on the tokens in each are new.

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
    """Return the windows of `window_starts` over `tokens` (N,): `input_ids` and `labels` (B, S), -100 where not new."""
    size = min(block_size, len(tokens))
    windows = window_starts(len(tokens), block_size, stride)
    for first in range(0, len(windows), batch_size):
        starts, new = (torch.tensor(column).unsqueeze(1) for column in zip(*windows[first : first + batch_size]))
        place = torch.arange(size).expand(len(starts), -1)
        input_ids = torch.from_numpy(tokens[(starts + place).numpy()].astype(np.int64))
        yield {"input_ids": input_ids, "labels": input_ids.masked_fill(place < new, -100)}


@torch.no_grad()
def target_places(model: "VariantLMHeadModel", num_tokens: int) -> dict[str, torch.Tensor]:
    """Return stream -> (N,), the place of the token that each of its predictions over `num_tokens` tokens is of."""
    places = torch.arange(num_tokens, device=model.device)[None]
    streams = model.prediction_streams(torch.zeros_like(places), places)
    return {name: targets[0] for name, (_, targets) in streams.items()}


def last_places(model: "VariantLMHeadModel", num_tokens: int) -> dict[str, torch.Tensor]:
    """Stream -> (N,), the last of each prediction's tokens: the place of its target, or of a later one that it sees."""
    ahead = {stream.name: stream.sees_ahead for stream in model.streams}
    return {
        name: (places + ahead.get(name, 0)).clamp(0, num_tokens - 1)
        for name, places in target_places(model, num_tokens).items()
    }


def score_new_tokens(
    score: Callable, last: Mapping[str, torch.Tensor], input_ids: torch.Tensor, labels: torch.Tensor
) -> dict:
    """`score(input_ids)`, in which only the predictions count that a window makes for the first time.

    A prediction counts in the window in which the last of its tokens is new: the one that it predicts, or a later one
    that it sees. So each counts once over all windows, however far its stream sees.

    Args:
        score: input_ids (B, S) -> stream -> `TokenScores` (B, N).
        last: `last_places` of the model that scores, for S tokens.
        labels: (B, S), -100 where not new.
    """
    new = labels != -100
    counted = {stream: new[:, places] for stream, places in last.items()}
    return {
        stream: scores._replace(nll=scores.nll * counted[stream], valid=scores.valid & counted[stream])
        for stream, scores in score(input_ids).items()
    }
