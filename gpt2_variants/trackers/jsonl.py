"""`metrics.jsonl`, which every run writes."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..folders import copied_aside, write_aside


class Steps:
    """Rising steps, kept as ranges (first, last, every so many): those of a run that logs evenly are a few."""

    def __init__(self, steps: Iterable[int] = ()):
        self.ranges: list[list[int]] = []
        for step in steps:
            self.add(step)

    def add(self, step: int) -> None:
        """Append `step`, unless it is the last one already."""
        if self.ranges:
            last = self.ranges[-1]
            if step == last[1]:
                return
            if last[0] == last[1] or step == last[1] + last[2]:
                last[1:] = [step, last[2] if last[0] != last[1] else step - last[1]]
                return
        self.ranges.append([step, step, 1])

    def __iter__(self) -> Iterator[int]:
        for first, last, every in self.ranges:
            yield from range(first, last + 1, every)

    def __str__(self) -> str:
        return ", ".join(_range_in_words(*found) for found in self.ranges)


def _range_in_words(first: int, last: int, every: int) -> str:
    if first == last:
        return str(first)
    if every == 1:
        return f"{first} to {last}"
    return f"{first} and {last}" if first + every == last else f"{first} to {last} (every {every} steps)"


KINDS = {"training": "loss", "evaluations": "eval_loss"}  # a kind of record -> what the records of that kind have


def steps_of(logged: Any, kind: str) -> Steps:
    """Return the steps of one of `KINDS` in what `JsonlTracker.logged` gave; none where it is not of that form."""
    steps = Steps()
    ranges = logged.get(kind) if isinstance(logged, dict) else None
    for entry in ranges if isinstance(ranges, list) else ():
        if isinstance(entry, list) and len(entry) == 3 and all(type(n) is int and n >= 0 for n in entry) and entry[2]:
            steps.ranges.append(list(entry))
    return steps


def lost_steps(logged: Any, records: Iterable[dict[str, Any]]) -> dict[str, Steps]:
    """Kind of record -> the steps that were logged and of which `records` hold none; without kinds that lack none."""
    found: dict[str, set[int]] = {kind: set() for kind in KINDS}
    for record in records:
        for kind, key in KINDS.items():
            if record.get(key) is not None:
                found[kind].add(record["step"])
    lost = {kind: Steps(step for step in steps_of(logged, kind) if step not in found[kind]) for kind in KINDS}
    return {kind: steps for kind, steps in lost.items() if steps.ranges}


def in_words(damaged: int, lost: dict[str, Steps]) -> str:
    """Return what is wrong with a `metrics.jsonl`; "" where nothing is."""
    parts = [f"{damaged} line{'s are' if damaged > 1 else ' is'} no record of a step"] if damaged else []
    for kind, steps in lost.items():
        one = len(set(steps)) == 1
        parts.append(f"the {kind.removesuffix('s')} records of step{'' if one else 's'} {steps} are lost")
    return "; ".join(parts)


class Lines(NamedTuple):
    """What a `metrics.jsonl` holds.

    Attributes:
        records: in order.
        damaged: how many lines are no records, the half line of a killed process at the end not counted.
    """

    records: list[dict[str, Any]]
    damaged: int


def read_lines(path: Path) -> Lines:
    """Read a `metrics.jsonl`, whatever became of it. A record is an object of numbers, with a whole "step"."""
    records, damaged = [], 0
    *whole, half = path.read_bytes().split(b"\n")
    for line in (*whole, half):
        text = line.strip(b"\0 \r\t")  # a machine that crashed leaves zeros
        record = _record(text)
        if record is not None:
            records.append(record)
        damaged += b"\0" in line or (record is None and text != b"" and not (line is half and text.startswith(b"{")))
    return Lines(records, damaged)


def _record(text: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int or record["step"] < 0:
        return None
    is_figures = all(value is None or type(value) in (int, float) for value in record.values())
    return record if is_figures else None


class JsonlTracker:
    """`metrics.jsonl`: one JSON object a line, flushed line by line; a resumed run goes on with no step twice.

    What of it is no record is dropped, counted and said, and the file as it was is kept beside it; so are the steps
    said whose lines are lost.

    Args:
        resume_step: lines of later steps are dropped: they are trained again.
        logged: what `logged` gave when that checkpoint was saved; None where it is not known.

    Attributes:
        damaged: how many lines were no records.
        lost: kind of record -> the steps whose lines are lost, by `logged`.
    """

    def __init__(self, path: Path, resume_step: int, logged: Any = None):
        found = read_lines(path) if path.exists() else Lines([], 0)
        self.damaged = found.damaged
        kept = [record for record in found.records if record["step"] <= resume_step]
        self.lost = lost_steps(logged, kept)
        self._steps = {
            kind: steps_of(logged, kind) if logged else Steps(r["step"] for r in kept if r.get(key) is not None)
            for kind, key in KINDS.items()
        }
        if self.damaged or self.lost:
            beside = f"; the file as it was is {copied_aside(path).name}" if self.damaged else ""
            print(f"{path}: {in_words(self.damaged, self.lost)}{beside}", file=sys.stderr)
        if path.exists():
            write_aside(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a", encoding="utf-8")

    def logged(self) -> dict[str, list[list[int]]]:
        """Kind of record -> the steps that were logged so far, also in earlier sessions, as `Steps.ranges`."""
        return {kind: [list(entry) for entry in steps.ranges] for kind, steps in self._steps.items()}

    def log(self, record: dict[str, Any]) -> None:
        """Write one line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for kind, key in KINDS.items():
            if record.get(key) is not None:
                self._steps[kind].add(record["step"])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a `metrics.jsonl`, in order, without what is none."""
    return read_lines(path).records
