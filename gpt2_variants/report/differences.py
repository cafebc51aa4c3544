"""How far each variant is from the baseline, at equal data and equal cost."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..registry import VARIANTS
from .groups import BASELINE, Group, Mean, data_difference, differing
from .runs import SavedRun, interpolate


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
