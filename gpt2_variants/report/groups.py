"""Runs that differ in the seed alone are a group: its figures are means over the seeds."""

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..models.streams import Stream
from .runs import FOLLOWING_LENGTH, LENGTH, SavedRun
from .statistics import mean_interval

BASELINE = "gpt2"
SHAPE = {"n_embd", "n_head", "n_layer"}
OF_LENGTH = {*LENGTH, *(f"schedule.{param}" for param in FOLLOWING_LENGTH)}  # names of settings


@dataclass(frozen=True)
class Mean:
    """Mean and sample standard deviation of `n` runs; no standard deviation of one, or of values not finite."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Mean":
        """Take the mean of at least one value."""
        found = list(values)
        if not all(map(math.isfinite, found)):
            return cls(math.nan, None, len(found))
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The mean's 95 % interval of Student's t; None of one run. Needs scipy."""
        return None if self.sd is None else mean_interval(self.mean, self.sd, self.n)


@dataclass(frozen=True)
class Group:
    """Finished runs that differ in the seed alone; or one that is not finished.

    Attributes:
        label: tells it from all other groups: the variant, and the settings in which groups of it differ.
        name: as the label, without the length of the schedule: groups that differ in that alone share it.
        runs: at least one, by seed.
    """

    label: str
    name: str
    runs: list[SavedRun]

    @property
    def first(self) -> SavedRun:
        """The run of the lowest seed: what all of them have in common is read from it."""
        return self.runs[0]

    @property
    def finished(self) -> bool:
        """Whether its runs are; only then it is compared."""
        return self.first.finished

    @property
    def is_baseline(self) -> bool:
        """Whether it is GPT-2 itself."""
        return self.first.variant == BASELINE

    @property
    def machine(self) -> str | None:
        """What all its runs ran on, with the same share of a batch; None if not on the same."""
        machines = {(run.machine, run.plan.get("per_device_train_batch_size")) for run in self.runs}
        return machines.pop()[0] if len(machines) == 1 else None

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams of predictions beside the next-token one that its runs' figures tell of."""
        return self.first.streams

    def mean(self, figure: Callable[[SavedRun], float | None]) -> Mean | None:
        """Return `figure` of a run, over the runs; None if one of them lacks it."""
        values = [figure(run) for run in self.runs]
        known = [value for value in values if value is not None]
        return Mean.of(known) if len(known) == len(values) else None

    def final(self, name: str) -> Mean | None:
        """Return the figure `name` of the last evaluation, such as "eval_loss"."""
        return self.mean(lambda run: run.final.get(name))

    def on_its_machine(self, figure: Callable[[SavedRun], float | None]) -> Mean | None:
        """Return what `mean` does, for a figure that says nothing unless all runs ran on the same machine."""
        return None if self.machine is None else self.mean(figure)

    @property
    def flops(self) -> Mean | None:
        """Training FLOPs of the whole run."""
        return self.mean(lambda run: run.place({"step": run.step}, "flops"))


def streams_of(groups: Sequence[Group]) -> list[Stream]:
    """Return the streams of all groups, each once."""
    return list(dict.fromkeys(stream for group in groups for stream in group.streams))


def make_groups(runs: Sequence[SavedRun]) -> list[Group]:
    """Group `runs` by what they computed; baselines first, then as they come."""
    by_settings: dict[Any, list[SavedRun]] = {}
    for run in runs:
        key = (run.recipe, None if run.finished else run.folder)
        by_settings.setdefault(key, []).append(run)
    members = [sorted(found, key=lambda run: (run.seed is None, run.seed)) for found in by_settings.values()]
    members.sort(key=lambda found: (found[0].variant != BASELINE, not found[0].finished))
    firsts = [found[0] for found in members]
    labels = [_label(run, firsts, told=lambda name: True) for run in firsts]
    names = [_label(run, firsts, told=lambda name: name not in OF_LENGTH) for run in firsts]
    # two unfinished runs may differ in nothing that a label says
    labels = [
        f"{label}, {found[0].folder}" if labels.count(label) > 1 else label
        for label, found in zip(labels, members, strict=True)
    ]
    return [Group(*parts) for parts in zip(labels, names, members, strict=True)]


def _label(run: SavedRun, others: list[SavedRun], told: Callable[[str], bool]) -> str:
    """Return the variant, and those settings of `told` names in which `run` differs from `others` of it."""
    same_variant = [other for other in others if other.variant == run.variant]
    names = {name for other in same_variant for name in differing(run, other) if told(name)}
    parts = []
    if names & SHAPE and _sizes_tell_shapes(same_variant):
        names -= SHAPE
        parts.append(f"size={run.plan['size']}")
    if "total_steps" in names:
        names -= OF_LENGTH - {"total_steps"}  # which follow from it, mostly
    parts += [f"{name}={run.settings.get(name, 'default')}" for name in sorted(names)]
    if not parts and len({other.facts.get("data_fingerprint") for other in same_variant}) > 1:
        parts.append(f"data {str(run.facts.get('data_fingerprint'))[:8]}")
    label = ", ".join([run.variant, *parts])
    if run.finished:
        return label
    return f"{label} ({run.status} at step {run.step:,}, seed {run.seed})"


def _sizes_tell_shapes(runs: Sequence[SavedRun]) -> bool:
    """Return whether runs of one named size have one shape, and all have a named size."""
    shapes = {(run.plan.get("size"), *(run.settings.get(name) for name in sorted(SHAPE))) for run in runs}
    sizes = [shape[0] for shape in shapes]
    return None not in sizes and len(set(sizes)) == len(sizes)


def differing(run: SavedRun, other: SavedRun) -> list[str]:
    """Return the names of the settings in which two runs differ, but for variant and seed."""
    names = {*run.settings, *other.settings}
    return sorted(name for name in names if run.settings.get(name) != other.settings.get(name))


def data_difference(run: SavedRun, other: SavedRun) -> str | None:
    """Return why two runs' perplexities are not of the same text in the same tokens; None if they are, as far as known.

    The fingerprint of equal data differs between block sizes. There the names of data set and tokenizer count, and the
    unigram perplexity, which the tokens lost at the blocks' ends change by less than 1 %.
    """
    a, b = run.unigram_perplexity, other.unigram_perplexity
    prints = [r.facts.get("data_fingerprint") for r in (run, other)]
    if run.block_size == other.block_size and None not in prints:
        if prints[0] != prints[1]:
            return "they were trained on other data, or with another tokenizer"
        tolerance = 1e-6
    else:
        for name, part in (("data set", r"^.*?(?=: )"), ("tokenizer", r"(?<=; tokenizer ).*$")):
            found = [re.search(part, str(r.facts.get("data", ""))) for r in (run, other)]
            values = [match and match[0] for match in found]
            if values[0] != values[1]:
                return f"the {name} differs: {values[0]} and {values[1]}"
        tolerance = 1e-2
    if a is not None and b is not None and not math.isclose(a, b, rel_tol=tolerance):
        return f"the unigram perplexity of their validation texts differs: {a:.2f} and {b:.2f}"
    return None
