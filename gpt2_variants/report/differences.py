"""How far each variant is from the baseline, at equal data, equal cost and equal time."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .groups import OF_LENGTH, Group, Mean, data_difference, differing
from .notes import AT, note_on_pairs, notes_on, notes_on_schedules
from .runs import SavedRun, interpolate
from .statistics import ALPHA, Estimate, holm, paired, welch

COMPARED = tuple(AT)  # the axes at which groups are compared
# How far apart, as a ratio, ends are the same end: a few percent of time are no two runs' fault.
CLOSE = {"tokens": 1.01, "flops": 1.01, "time": 1.05}


@dataclass(frozen=True)
class Difference:
    """A group less its baseline where both have come equally far.

    Attributes:
        axis: of `COMPARED`.
        place: how far: in training tokens, training FLOPs or seconds of training.
        group, baseline: what is compared. Of groups that differ in the length of the schedule alone it is those whose
            ends lie nearest to one another on this axis.
        ours, theirs: the step at which the group and the baseline stand there, mean over the runs.
        at_the_end: the schedule of every run of both ended there, to 1 % (5 % of time); else a run is cut in
            mid-schedule.
        estimate: in nats per token; below 0 the group is better. Paired by seed where the data order of a seed is the
            same for both; a seed that stands more than once counts once, as its mean.
        percent: the same as a difference of perplexities, in percent of the baseline's; None if it is not finite.
        percent_low, percent_high: its 95 % interval; None where there is no interval.
        comparisons: how many the p-value is adjusted for: those of a page on this axis.
        p_adjusted: Holm's adjusted p-value; None where there is no test.
        word: "better" or "worse" where `p_adjusted` is below 0.05, else "undecided"; "too few seeds" where a side has
            one seed.
    """

    axis: str
    place: float
    group: Group
    baseline: Group
    ours: float
    theirs: float
    at_the_end: bool
    estimate: Estimate
    percent: float | None
    percent_low: float | None
    percent_high: float | None
    comparisons: int
    p_adjusted: float | None
    word: str


def difference(group: Group, baseline: Group, axis: str) -> Difference | None:
    """Compare at the largest value of `axis` (of `COMPARED`) that all runs of both reached; None where there is none.

    Between evaluations the loss is interpolated linearly. The p-value is that of this comparison alone.
    """
    sides = (group, baseline)
    curves = [[run.evaluation_curve(axis) for run in side.runs] for side in sides]
    if not all(curve for side in curves for curve in side):
        return None
    place = min(curve[-1][0] for side in curves for curve in side)
    losses = [[interpolate(curve, place) for curve in side] for side in curves]
    steps = [[interpolate(run.evaluation_curve(axis, "step"), place) for run in side.runs] for side in sides]
    known = [[loss for loss in side if loss is not None] for side in losses]
    stood = [[step for step in side if step is not None] for side in steps]
    if known != losses or stood != steps:
        return None  # before a run's first evaluation
    estimate = _estimate(group, baseline, *known)
    return Difference(
        axis=axis,
        place=place,
        group=group,
        baseline=baseline,
        ours=statistics.fmean(stood[0]),
        theirs=statistics.fmean(stood[1]),
        at_the_end=all(
            run.schedule_end <= CLOSE[axis] * step
            for side, found in zip(sides, stood, strict=True)
            for run, step in zip(side.runs, found, strict=True)
        ),
        estimate=estimate,
        percent=_percent(estimate.mean),
        percent_low=_percent(estimate.low),
        percent_high=_percent(estimate.high),
        comparisons=1,
        p_adjusted=estimate.p,
        word=_word(estimate, estimate.p),
    )


def _estimate(group: Group, baseline: Group, ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Estimate the difference of the losses of the groups' runs, paired where that is possible."""
    (our_seeds, our_repeats), (their_seeds, their_repeats) = _by_seed(group, ours), _by_seed(baseline, theirs)
    common = sorted(seed for seed in our_seeds.keys() & their_seeds.keys() if seed is not None)
    if len(common) > 1 and not our_repeats and not their_repeats and _same_order(group.first, baseline.first):
        return paired([our_seeds[seed] - their_seeds[seed] for seed in common])
    return welch([*our_seeds.values()], [*their_seeds.values()])


def _by_seed(group: Group, losses: Sequence[float]) -> tuple[dict[int | None, float], bool]:
    """Return seed -> mean loss of its runs, and whether a seed has several."""
    found: dict[int | None, list[float]] = {}
    for run, loss in zip(group.runs, losses, strict=True):
        found.setdefault(run.seed, []).append(loss)
    return {seed: sum(same) / len(same) for seed, same in found.items()}, len(found) < len(losses)


def _same_order(run: SavedRun, other: SavedRun) -> bool:
    """Return whether two runs of one seed see the same sequences at the same steps, as far as is known."""
    facts = [(r.plan.get("train_batch_size"), r.block_size, r.facts.get("data_fingerprint")) for r in (run, other)]
    return facts[0] == facts[1] and None not in facts[0]


def _percent(nats: float | None) -> float | None:
    if nats is None or not math.isfinite(nats):
        return None
    return 100 * math.expm1(min(nats, 700.0))  # exp overflows a float64 above that


def _word(estimate: Estimate, p: float | None) -> str:
    if estimate.n < 2:
        return "too few seeds"
    if p is None or p >= ALPHA:
        return "undecided"
    return "better" if estimate.mean < 0 else "worse"


@dataclass(frozen=True)
class Verdict:
    """A variant against the baseline that it has the most settings in common with.

    Attributes:
        group, baseline: what is compared at equal data, if that can be. At equal cost and time it may be groups with
            schedules of other lengths: see `Difference`.
        at_tokens, at_flops, at_time: the difference at equal training tokens, FLOPs and, on the same machine, equal
            time of training, where there is one.
        ratios: cost of the group over the baseline's: "flops_per_token", "parameters", and on the same machine
            "tokens_per_second", "peak_memory", "seconds"; None where not known or not comparable.
        not_comparable: why the losses cannot be compared, or None.
        notes: what else differs between the two and may explain a difference.
    """

    group: Group
    baseline: Group
    at_tokens: Difference | None
    at_flops: Difference | None
    at_time: Difference | None
    ratios: dict[str, float | None]
    not_comparable: str | None
    notes: list[str]

    @property
    def differences(self) -> list[Difference]:
        """Those that there are, in the order of `COMPARED`."""
        return [found for found in (self.at_tokens, self.at_flops, self.at_time) if found is not None]


def judge(groups: Sequence[Group]) -> list[Verdict]:
    """Judge each variant's finished groups against the baseline's; return none where no baseline is finished.

    Groups that differ in the length of the schedule alone are alternatives and make one verdict: for each axis the one
    whose end lies nearest to the baseline's is taken. P-values are adjusted for all verdicts on one axis.
    """
    recipes: dict[str, list[Group]] = {}
    for group in groups:
        if group.finished:
            recipes.setdefault(group.first.recipe_of_any_length, []).append(group)
    baselines = [found for found in recipes.values() if found[0].is_baseline]
    verdicts = [
        _verdict(found, min(baselines, key=lambda baseline: _settings_apart(found[0].first, baseline[0].first)))
        for found in recipes.values()
        if baselines and not found[0].is_baseline
    ]
    for axis in COMPARED:
        verdicts = _adjusted(verdicts, f"at_{axis}")
    return verdicts


def _settings_apart(run: SavedRun, other: SavedRun) -> int:
    """Return how many settings differ, but for the length of the schedule."""
    return len({*differing(run, other)} - OF_LENGTH)


def _adjusted(verdicts: list[Verdict], at: str) -> list[Verdict]:
    """Return the verdicts with the p-values of the differences `at`, and what they decide, adjusted for all of them."""
    p_values = {
        n: p for n, v in enumerate(verdicts) if (found := getattr(v, at)) and (p := found.estimate.p) is not None
    }
    adjusted = dict(zip(p_values, holm([*p_values.values()]), strict=True))
    changed = list(verdicts)
    for n, p in adjusted.items():
        found = getattr(verdicts[n], at)
        new = dataclasses.replace(found, comparisons=len(adjusted), p_adjusted=p, word=_word(found.estimate, p))
        changed[n] = dataclasses.replace(verdicts[n], **{at: new})
    return changed


def _verdict(groups: Sequence[Group], baselines: Sequence[Group]) -> Verdict:
    """Judge one variant, where it and the baseline may each be several groups."""
    pairs = [(group, baseline) for group in groups for baseline in baselines]
    group, baseline = _nearest(pairs, "tokens")
    same_machine = _same_machine(group, baseline)
    not_comparable = data_difference(group.first, baseline.first)
    found: dict[str, Difference | None] = dict.fromkeys(COMPARED)
    for axis in COMPARED if not not_comparable else ():
        possible = [pair for pair in pairs if axis != "time" or _same_machine(*pair)]
        found[axis] = difference(*_nearest(possible, axis), axis) if possible else None
    notes = notes_on(group, baseline, same_machine)
    for axis, one in found.items():
        if one is not None:
            if not one.at_the_end:
                notes += notes_on_schedules(axis, ((one.group, one.ours), (one.baseline, one.theirs)), CLOSE[axis])
            if one.estimate.paired:
                notes += [note for note in note_on_pairs(one.group, one.baseline) if note not in notes]
    return Verdict(
        group=group,
        baseline=baseline,
        at_tokens=found["tokens"],
        at_flops=found["flops"],
        at_time=found["time"],
        ratios=_ratios(group, baseline, same_machine),
        not_comparable=not_comparable,
        notes=notes,
    )


def _same_machine(group: Group, baseline: Group) -> bool:
    return group.machine is not None and group.machine == baseline.machine


def _nearest(pairs: Sequence[tuple[Group, Group]], axis: str) -> tuple[Group, Group]:
    """Return the pair whose ends on `axis` lie nearest to one another; of equal ones the pair that went farthest."""

    def rank(pair: tuple[Group, Group]) -> tuple[float, float]:
        ends = [side.mean(lambda run: run.end(axis)) for side in pair]
        places = [end.mean for end in ends if end is not None]
        if len(places) < 2 or min(places) <= 0:
            return (math.inf, 0.0)
        apart = max(places) / min(places)
        return (apart if apart > CLOSE[axis] else 1.0, -min(places))

    return min(pairs, key=rank)


def _ratios(group: Group, baseline: Group, same_machine: bool) -> dict[str, float | None]:
    def ratio(a: Mean | None, b: Mean | None) -> float | None:
        return a.mean / b.mean if a and b and b.mean else None

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
    return ratios
