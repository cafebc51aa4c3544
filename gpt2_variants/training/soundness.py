"""Whether a checkpoint is worth going on from: its numbers are finite, and its loss had not risen out of range."""

import math
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..trackers.jsonl import read_metrics
from . import checkpoint
from .loading import weights_only

# Nats by which a loss may lie above the lowest before it: then the data are 7.4 times less likely than they were. From
# batch to batch a loss changes by tenths, and one that comes back from a spike has done so by less.
OUT_OF_RANGE = 2.0


def pass_over_ruined(root: Path, metrics: Path) -> list[str]:
    """Mark the newest checkpoints under `root` that are not sound, until one is; a line for each that was marked now.

    Args:
        metrics: the run's `metrics.jsonl`.
    """
    records = read_metrics(metrics) if metrics.is_file() else []
    lines = []
    for path in sorted(root.glob("step-*"), reverse=True):
        if (path / checkpoint.NOT_FINITE).is_file() or checkpoint.fault_of(path):
            continue
        why = not_finite_in(path) or out_of_range(records, checkpoint.read_manifest(path)["step"])
        if why is None:
            break
        checkpoint.mark(path, why)
        lines.append(f"{path.name} is passed over: {why}")
    return lines


def out_of_range(records: Sequence[dict[str, Any]], step: int) -> str | None:
    """Return what speaks against the weights after `step`, in words: a loss `OUT_OF_RANGE` above the lowest before it.

    Those losses count that tell most of these weights: the training loss logged last by then, that of the next step,
    which they gave, and the validation loss after `step`.

    Args:
        records: of `metrics.jsonl`, or as those.
    """
    of_training = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    of_validation = [(r["step"], r["eval_loss"]) for r in records if r.get("eval_loss") is not None]
    last = max((n for n, _ in of_training if n <= step), default=None)
    for name, losses, telling in (("loss", of_training, (last, step + 1)), ("validation loss", of_validation, (step,))):
        for at, loss in losses:
            if at not in telling:
                continue
            lowest = min((other for n, other in losses if n < at and math.isfinite(other)), default=math.inf)
            if not loss <= lowest + OUT_OF_RANGE:
                return (
                    f"its {name} had risen out of range: {loss:.4g} at step {at}, more than {OUT_OF_RANGE:g} nats "
                    f"above the lowest before, {lowest:.4g}"
                )
    return None


def not_finite_in(path: Path) -> str | None:
    """Return what in a checkpoint's weights or optimizer states is not finite, in words; None where all is.

    Reads all of it, one file after the other.
    """
    for file in sorted(path.glob("*.pt")):
        try:
            with weights_only():
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, ValueError) as err:
            return f"its {file.name} cannot be read ({' '.join(str(err).split())[:100]})"
        for names, tensor in _tensors(content, ()):
            if not all(part.isfinite().all() for part in tensor.flatten().split(1 << 24)):
                return f"its {_what(names)} {'.'.join(names[-3:])} is not finite ({file.name})"
    return None


def _tensors(value: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield names, value
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _tensors(part, (*names, str(name)))
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _tensors(part, (*names, str(number)))


def _what(names: tuple[str, ...]) -> str:
    return "optimizer's" if any("optimizer" in name for name in names) else "weight"
