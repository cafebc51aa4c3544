"""Runs beside one another: seeds averaged, and how far each variant is from the baseline, at equal data and equal cost.

Runs that differ in the seed alone are a group. What a run lacks (an old or damaged record) is None here, never a guess.
"""

import functools
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config.plan import recipe
from .config.saved_plan import saved_plan
from .faults import UsageError
from .records import read_facts
from .registry import VARIANTS
from .trackers.jsonl import read_metrics

BASELINE = "gpt2"
AXES = ("tokens", "steps", "time", "flops")  # what curves are drawn against
# Fields of a plan that other figures of a report show, or that follow from data and variant.
SHOWN_ELSEWHERE = ("variant", "num_parameters", "flops_per_token", "data_fingerprint", "model", "optimizer", "schedule")


@dataclass(frozen=True)
class Mean:
    """Mean and sample standard deviation of `n` runs; no standard deviation of one."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Mean":
        """Of at least one value."""
        found = list(values)
        return cls(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found))

    @property
    def squared_error(self) -> float | None:
        """The square of the mean's standard error, sd² / n."""
        return None if self.sd is None else self.sd**2 / self.n


@dataclass(frozen=True)
class SavedRun:
    """A run's folder as read.

    Attributes:
        folder: as it was named.
        facts: of `run.json`.
        training: the records with a "loss", in order.
        evaluations: the records with an "eval_loss", in order.
    """

    folder: Path
    facts: dict[str, Any]
    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @property
    def variant(self) -> str:
        """The variant's name, known to the registry or not."""
        return str(self.facts.get("variant", "unknown variant"))

    @property
    def status(self) -> str:
        """As in `run.json`: running, finished, interrupted or failed."""
        return str(self.facts.get("status", "of unknown status"))

    @property
    def finished(self) -> bool:
        """Whether it trained to its end and was exported."""
        return self.status == "finished"

    @functools.cached_property
    def plan(self) -> dict[str, Any]:
        """The fields of the run's plan; None what an older record does not tell."""
        return saved_plan(self.folder, self.facts)

    @functools.cached_property
    def recipe(self) -> str:
        """What decides results or cost, but for the seed, as JSON: equal for runs that are seeds of one recipe."""
        return json.dumps(recipe(self.plan), sort_keys=True)

    @functools.cached_property
    def settings(self) -> dict[str, str]:
        """Of the recipe, what a reader is to be told by name, as text; data set and tokenizer by the names given."""
        told = {k: v for k, v in recipe(self.plan).items() if k not in SHOWN_ELSEWHERE}
        told |= {name: self.plan.get(name) for name in ("dataset", "tokenizer")}
        model = {k: v for k, v in (self.plan.get("model") or {}).items() if k not in ("bos_token_id", "eos_token_id")}
        if model.get("n_positions") == self.block_size:
            model.pop("n_positions", None)
        model.pop("vocab_size", None)  # follows from tokenizer and variant
        for name in ("optimizer", "schedule"):
            section = self.plan.get(name) or {}
            told |= {name: section.get("type"), **{f"{name}.{k}": v for k, v in section.get("params", {}).items()}}
        for repeated in ("warmup_max_lr", "warmup_num_steps", "total_num_steps"):
            told.pop(f"schedule.{repeated}", None)
        told |= model
        return {k: v if isinstance(v, str) else json.dumps(v) for k, v in told.items() if v not in (None, [], {}, ())}

    @property
    def seed(self) -> int | None:
        """Of initialisation, data order and dropout."""
        return self.plan.get("seed")

    @property
    def block_size(self) -> int | None:
        """Tokens per training sequence."""
        return self.plan.get("block_size")

    @property
    def step(self) -> int:
        """The last one that a record tells of."""
        return max((r["step"] for r in (*self.training, *self.evaluations)), default=0)

    @property
    def final(self) -> dict[str, Any]:
        """The figures of the exported weights: of the last evaluation, or of the best; empty where there was none."""
        if self.plan.get("load_best_model_at_end") and self.facts.get("final_eval"):
            return self.facts["final_eval"]
        return self.evaluations[-1] if self.evaluations else self.facts.get("final_eval") or {}

    @property
    def num_parameters(self) -> int | None:
        """Tied ones counted once."""
        return self.facts.get("num_parameters")

    @property
    def flops_per_token(self) -> float | None:
        """Training FLOPs per token of data."""
        return self.facts.get("flops_per_token")

    @property
    def unigram_perplexity(self) -> float | None:
        """Of the validation text, under the counts of the training text."""
        return self.facts.get("unigram_perplexity")

    @property
    def tokens(self) -> float | None:
        """Training tokens, with repeats, up to the last step."""
        return self.tokens_at(self.step)

    @property
    def tokens_per_step(self) -> float | None:
        """On average."""
        return self.tokens / self.step if self.step and self.tokens is not None else None

    @property
    def seconds(self) -> float | None:
        """Of training, without evaluations and checkpoints."""
        last = [r["elapsed_seconds"] for r in (*self.training, *self.evaluations) if "elapsed_seconds" in r]
        return max(last, default=self.facts.get("train_seconds"))

    @property
    def tokens_per_second(self) -> float | None:
        """The median of those logged."""
        speeds = [r["tokens_per_second"] for r in self.training if r.get("tokens_per_second") is not None]
        return statistics.median(speeds) if speeds else None

    @property
    def peak_memory_bytes(self) -> float | None:
        """Of one process: GPU memory on CUDA, else the resident set."""
        return max((r["peak_memory_bytes"] for r in self.training if r.get("peak_memory_bytes")), default=None)

    @property
    def machine(self) -> str | None:
        """Device and number of processes; None if the run moved between several, or does not say."""
        starts = {(start.get("device"), start.get("world_size")) for start in self.facts.get("starts") or [{}]}
        device, world_size = starts.pop()
        if starts or device is None:
            return None
        return f"{world_size} x {device}"

    @property
    def on_cpu(self) -> bool:
        """Whether it ran on a CPU; `records.device_name` gives the cores of those alone."""
        return self.machine is not None and self.machine.endswith("cores)")

    def tokens_at(self, step: float) -> float | None:
        """Training tokens up to `step`, linear between the records, since an epoch's last batch may be short."""
        known = [(0, 0), *((r["step"], r["tokens"]) for r in self.training if r.get("tokens") is not None)]
        if len(known) == 1:
            return None
        last_step, last_tokens = known[-1]
        if step > last_step:
            return last_tokens * step / last_step
        return interpolate(known, step)

    def place(self, record: dict[str, Any], axis: str) -> float | None:
        """Where a record stands on an axis of `AXES`: steps, tokens, seconds or training FLOPs."""
        if axis == "steps":
            return record["step"]
        if axis == "time":
            return record.get("elapsed_seconds")
        tokens = self.tokens_at(record["step"])
        if axis == "tokens" or tokens is None:
            return tokens
        return None if self.flops_per_token is None else tokens * self.flops_per_token

    def evaluation_curve(self, axis: str, key: str = "eval_loss") -> list[tuple[float, float]]:
        """(place, value of `key`: "eval_loss" in nats, or "step") of each evaluation that can be placed on `axis`."""
        placed = [(self.place(record, axis), record[key]) for record in self.evaluations]
        return [(place, value) for place, value in placed if place is not None]


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """The value at `x` on the line through `points` (x, y), which rise in x; None outside of them."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            # exact at the points themselves
            return y0 if x == x0 else y1 if x == x1 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[0][1] if len(points) == 1 and points[0][0] == x else None


def read_run(folder: Path) -> SavedRun:
    """Read a run's folder; `metrics.jsonl` may be missing or cut off.

    Raises:
        UsageError: there is no `run.json`, or it cannot be read.
    """
    if not (folder / "run.json").is_file():
        raise UsageError([f"{folder}: holds no run (no run.json)"])
    try:
        facts = read_facts(folder)
    except ValueError as err:
        raise UsageError([str(err)]) from err
    metrics = folder / "metrics.jsonl"
    records = read_metrics(metrics) if metrics.is_file() else []
    return SavedRun(
        folder,
        facts,
        training=[r for r in records if r.get("loss") is not None],
        evaluations=[r for r in records if r.get("eval_loss") is not None],
    )


@dataclass(frozen=True)
class Group:
    """Finished runs that differ in the seed alone; or one that is not finished.

    Attributes:
        label: tells it from all other groups: the variant, and the settings in which groups of it differ.
        runs: at least one, by seed.
    """

    label: str
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
    def has_infill(self) -> bool:
        """Whether its runs predict tokens from their right neighbours too."""
        return "eval_infill_loss" in self.first.final

    def mean(self, figure: Callable[[SavedRun], float | None]) -> Mean | None:
        """`figure` of a run, over the runs; None if one of them lacks it."""
        values = [figure(run) for run in self.runs]
        known = [value for value in values if value is not None]
        return Mean.of(known) if len(known) == len(values) else None

    def final(self, name: str) -> Mean | None:
        """The figure `name` of the last evaluation, such as "eval_loss"."""
        return self.mean(lambda run: run.final.get(name))

    def on_its_machine(self, figure: Callable[[SavedRun], float | None]) -> Mean | None:
        """As `mean`, for a figure that says nothing unless all runs ran on the same machine."""
        return None if self.machine is None else self.mean(figure)

    @property
    def flops(self) -> Mean | None:
        """Training FLOPs of the whole run."""
        return self.mean(lambda run: run.place({"step": run.step}, "flops"))


def make_groups(runs: Sequence[SavedRun]) -> list[Group]:
    """Group `runs` by what they computed; baselines first, then as they come."""
    by_settings: dict[Any, list[SavedRun]] = {}
    for run in runs:
        key = (run.recipe, None if run.finished else run.folder)
        by_settings.setdefault(key, []).append(run)
    members = [sorted(found, key=lambda run: (run.seed is None, run.seed)) for found in by_settings.values()]
    members.sort(key=lambda found: (found[0].variant != BASELINE, not found[0].finished))
    labels = [_label(found[0], [other[0] for other in members]) for found in members]
    # two unfinished runs may differ in nothing that a label says
    labels = [
        f"{label}, {found[0].folder}" if labels.count(label) > 1 else label
        for label, found in zip(labels, members, strict=True)
    ]
    return [Group(label, found) for label, found in zip(labels, members, strict=True)]


def _label(run: SavedRun, others: list[SavedRun]) -> str:
    same_variant = [other for other in others if other.variant == run.variant]
    names = {name for other in same_variant for name in differing(run, other)}
    parts = [f"{name}={run.settings.get(name, 'default')}" for name in sorted(names)]
    if not names and len({other.facts.get("data_fingerprint") for other in same_variant}) > 1:
        parts.append(f"data {str(run.facts.get('data_fingerprint'))[:8]}")
    label = ", ".join([run.variant, *parts])
    if run.finished:
        return label
    return f"{label} ({run.status} at step {run.step:,}, seed {run.seed})"


def differing(run: SavedRun, other: SavedRun) -> list[str]:
    """The names of the settings in which two runs differ, but for variant and seed."""
    names = {*run.settings, *other.settings}
    return sorted(name for name in names if run.settings.get(name) != other.settings.get(name))


def data_difference(run: SavedRun, other: SavedRun) -> str | None:
    """Why perplexities of two runs are not of the same text in the same tokens; None if they are, as far as is known.

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


@dataclass(frozen=True)
class Difference:
    """A group less its baseline where both have come equally far.

    Attributes:
        place: how far: in training tokens or training FLOPs.
        ours, theirs: the step at which the group and the baseline stand there, mean over the seeds.
        at_the_end: that is the end of every run of both, to 1 %; else curves are read before some run's end.
        loss: difference in nats per token; below 0 the group is better.
        percent: difference of the perplexities, in percent of the baseline's.
        error: standard error of `loss`, sqrt(s1²/n1 + s2²/n2); None unless both have at least 2 seeds.
    """

    place: float
    ours: float
    theirs: float
    at_the_end: bool
    loss: float
    percent: float
    error: float | None

    @property
    def clear(self) -> bool:
        """Whether the difference is larger than two of its standard errors."""
        return self.error is not None and abs(self.loss) > 2 * self.error


def difference(group: Group, baseline: Group, axis: str) -> Difference | None:
    """At the largest value of `axis` (tokens, flops) that all runs of both reached; None where none is common.

    Between evaluations the loss is interpolated linearly; perplexities are its exp, averaged over the seeds.
    """
    sides = (group, baseline)
    curves = [[run.evaluation_curve(axis) for run in g.runs] for g in sides]
    if not all(curve for side in curves for curve in side):
        return None
    ends = [curve[-1][0] for side in curves for curve in side]
    place = min(ends)
    losses = [[interpolate(curve, place) for curve in side] for side in curves]
    known = [[loss for loss in side if loss is not None] for side in losses]
    if known != losses:
        return None  # before a run's first evaluation
    (ours, our_perplexity), (theirs, their_perplexity) = ((Mean.of(side), Mean.of(map(_exp, side))) for side in known)
    our_step, their_step = (
        statistics.fmean(interpolate(run.evaluation_curve(axis, "step"), place) or 0 for run in g.runs) for g in sides
    )
    errors = [loss.squared_error for loss in (ours, theirs) if loss.squared_error is not None]
    return Difference(
        place=place,
        ours=our_step,
        theirs=their_step,
        at_the_end=max(ends) <= 1.01 * place,
        loss=ours.mean - theirs.mean,
        percent=100 * (our_perplexity.mean / their_perplexity.mean - 1),
        error=math.sqrt(sum(errors)) if len(errors) == 2 else None,
    )


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # exp overflows a float64 above that


@dataclass(frozen=True)
class Verdict:
    """A finished group against the baseline that it has the most settings in common with.

    Attributes:
        at_tokens, at_flops: the difference at equal training tokens and at equal training FLOPs, where there is one.
        ratios: cost of the group over the baseline's: "flops_per_token", "parameters", and on the same machine
            "tokens_per_second", "peak_memory", "seconds"; None where not known or not comparable.
        not_comparable: why the losses cannot be compared, or None.
        notes: what else differs between the two and may explain a difference.
    """

    group: Group
    baseline: Group
    at_tokens: Difference | None
    at_flops: Difference | None
    ratios: dict[str, float | None]
    not_comparable: str | None
    notes: list[str]


def judge(groups: Sequence[Group]) -> list[Verdict]:
    """Each finished group that is no baseline, where there is a finished baseline."""
    baselines = [group for group in groups if group.is_baseline and group.finished]
    return [
        _verdict(group, min(baselines, key=lambda baseline: len(differing(group.first, baseline.first))))
        for group in groups
        if baselines and group.finished and not group.is_baseline
    ]


def _verdict(group: Group, baseline: Group) -> Verdict:
    def ratio(a: Mean | None, b: Mean | None) -> float | None:
        return a.mean / b.mean if a and b and b.mean else None

    machines = (group.machine, baseline.machine)
    same_machine = None not in machines and machines[0] == machines[1]
    figures: dict[str, Callable[[SavedRun], float | None]] = {
        "parameters": lambda run: run.num_parameters,
        "flops_per_token": lambda run: run.flops_per_token,
    }
    on_a_machine: dict[str, Callable[[SavedRun], float | None]] = {
        "tokens_per_second": lambda run: run.tokens_per_second,
        "peak_memory": lambda run: run.peak_memory_bytes,
        "seconds": lambda run: run.seconds,
    }
    ratios = {name: ratio(group.mean(figure), baseline.mean(figure)) for name, figure in figures.items()}
    for name, figure in on_a_machine.items():
        ratios[name] = ratio(group.mean(figure), baseline.mean(figure)) if same_machine else None
    not_comparable = data_difference(group.first, baseline.first)
    at_tokens, at_flops = (
        None if not_comparable else difference(group, baseline, axis) for axis in ("tokens", "flops")
    )
    notes = _notes(group, baseline, same_machine)
    for at, found in (("equal data", at_tokens), ("equal cost", at_flops)):
        notes += _notes_on_schedules(group, baseline, at, found)
    return Verdict(group, baseline, at_tokens, at_flops, ratios, not_comparable, notes)


def _notes(group: Group, baseline: Group, same_machine: bool) -> list[str]:
    ours, theirs = group.first, baseline.first
    notes = []
    if ours.block_size != theirs.block_size:
        notes.append(
            f"Their blocks have {ours.block_size} and {theirs.block_size} tokens: in the shorter ones tokens are "
            "predicted from less context, and that alone raises a perplexity."
        )
    per_step = [ours.tokens_per_step, theirs.tokens_per_step]
    if per_step[0] and per_step[1] and not math.isclose(per_step[0], per_step[1], rel_tol=0.01):
        notes.append(f"A step has {per_step[0]:,.0f} and {per_step[1]:,.0f} tokens.")
    # of data set, tokenizer and block size more is said than that they differ
    apart = {"block_size", "dataset", "tokenizer"} | _own_fields(ours)
    if ours.block_size != theirs.block_size:
        apart |= {"total_steps", "warmup_steps"}  # that the same data make more steps of shorter blocks is no setting
    if names := [name for name in differing(ours, theirs) if name not in apart]:
        pairs = (f"{n} {ours.settings.get(n, 'default')} and {theirs.settings.get(n, 'default')}" for n in names)
        notes.append(f"Settings differ beside the variant: {', '.join(pairs)}.")
    for group_of, run in ((group, ours), (baseline, theirs)):
        if run.plan.get("load_best_model_at_end"):
            notes.append(
                f"{group_of.label} exports the weights of its best evaluation; the differences here are of its curve."
            )
    if not same_machine:
        notes.append("They did not run on the same machine: time, speed and memory are not compared.")
    return notes


def _notes_on_schedules(group: Group, baseline: Group, at: str, found: Difference | None) -> list[str]:
    """Of runs that were compared before their ends; the rate of one that goes on is higher than at its end."""
    if found is None or found.at_the_end:
        return []
    return [
        f"At {at} {g.label} stood at step {step:,.0f} of {g.first.step:,}, where its learning rate had not decayed as "
        f"far as at its end. That counts against it; a run with --max_steps {step:.0f} would be the fair one."
        for g, step in ((group, found.ours), (baseline, found.theirs))
        if step < 0.99 * g.first.step
    ]


def _own_fields(run: SavedRun) -> set[str]:
    """The config fields that the variant of `run` has and the baseline has not, and what tells the variant itself."""
    return {"variant_code", *(run.plan.get("model") or {})} - {*VARIANTS[BASELINE].config_fields()}
