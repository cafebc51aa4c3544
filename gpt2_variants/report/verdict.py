"""Which architecture is better, in words."""

from collections.abc import Sequence
from dataclasses import dataclass

from .differences import Difference, Verdict
from .groups import Group
from .notes import AT
from .statistics import ALPHA, MOST_SEEDS, seeds_needed
from .tables import flops_text, p_text, with_interval

EQUAL = {"tokens": "data", "flops": "cost", "time": "time"}
TOO_FEW = "too few seeds: at least two of each are needed to tell a difference from chance"


@dataclass(frozen=True)
class Said:
    """What is said of a variant, or of all runs.

    Attributes:
        short: one sentence.
        text: its figures; empty where the sentence says all.
        notes: what to mind in it.
    """

    short: str
    text: str = ""
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        return " ".join([self.text or self.short, *self.notes])


def verdict_said(verdicts: Sequence[Verdict], groups: Sequence[Group]) -> list[Said]:
    """Return whether each group is better than the baseline, and what to mind in comparing them."""
    lines = []
    if not any(group.is_baseline and group.finished for group in groups):
        lines.append(Said("No finished run of gpt2, the baseline, is among these: add one to compare with."))
    elif not verdicts:
        lines.append(Said("No finished run of a variant is among these to compare with gpt2."))
    for v in verdicts:
        against = f"{v.group.name} against {v.baseline.name}: "
        if v.not_comparable:
            text = f"{against}their perplexities are not comparable: {v.not_comparable}."
            lines.append(Said(f"{v.group.name}: cannot be compared with {v.baseline.name}.", text, v.notes))
            continue
        first_at: dict[str, str] = {}  # what was found -> where first
        sentences = []
        for found in v.differences:
            told = sentence(found)
            sentences.append(f"At {_place(found, v)} {first_at.get(told, told)}.")
            first_at.setdefault(told, f"as at {AT[found.axis]}")
        if not sentences:
            sentences = ["They have no evaluation in common."]
        elif all(found.word == "too few seeds" for found in v.differences):
            places = [_place(found, v) for found in v.differences]
            sentences = [f"At {' and at '.join(places)} {TOO_FEW}."]
        first, *others = sentences
        lines.append(Said(_short(v), " ".join([against + first[0].lower() + first[1:], *others]), v.notes))
    return lines + [Said(warning) for warning in _warnings(groups)]


def _short(v: Verdict) -> str:
    """Return the words of a verdict in one sentence."""
    places: dict[str, list[str]] = {}
    for found in v.differences:
        places.setdefault(found.word, []).append(EQUAL[found.axis])
    words = [f"{word} at equal {_listed(at)}" for word, at in places.items()]
    return f"{v.group.name}: {', '.join(words) or 'no evaluation in common with the baseline'}."


def _listed(words: Sequence[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} and {last}" if others else last


def sentence(found: Difference) -> str:
    """Say what was found, without its place and a full stop; no figure of a difference stands without its interval."""
    estimate = found.estimate
    if found.word == "too few seeds":
        return TOO_FEW
    if estimate.low is None or estimate.high is None or estimate.sd is None or found.p_adjusted is None:
        return "undecided: a run's loss is not a number there"
    nats = f"{with_interval(estimate.mean, estimate.low, estimate.high, '.4f')} nats"
    p = f"adjusted {p_text(found.p_adjusted)}" if found.comparisons > 1 else p_text(found.p_adjusted)
    if found.word == "undecided":
        largest = max(abs(estimate.low), abs(estimate.high))
        n = seeds_needed(estimate.sd, estimate.mean, ALPHA / found.comparisons)
        number = f"{n:,} or more" if n == MOST_SEEDS else f"about {n}"
        alone = estimate.p is not None and estimate.p < ALPHA
        why = f"; alone it would be told from chance, among {found.comparisons} comparisons it is not" if alone else ""
        return (
            f"undecided: no difference larger than {largest:.4f} nats found (loss {nats}, {p}{why}); with {number} "
            "seeds of each, a difference of the size seen would be found in every second case"
        )
    percent = with_interval(found.percent, found.percent_low, found.percent_high, ".1f")
    return f"{found.word}: perplexity {percent} %, loss {nats}, {p}"


def _place(found: Difference, v: Verdict) -> str:
    """Return where the two stand, and by which groups, if they are others than at equal data."""
    how_far = {
        "tokens": f"{found.place:,.0f} training tokens",
        "flops": f"{flops_text(found.place)} training FLOPs",
        "time": f"{found.place:,.0f} s of training on the same machine",
    }
    place = f"{AT[found.axis]} ({how_far[found.axis]})"
    for group, main in ((found.group, v.group), (found.baseline, v.baseline)):
        if group is not main:
            place += f", by {group.label},"
    return place


def _warnings(groups: Sequence[Group]) -> list[str]:
    lines = []
    for group in groups:
        seeds = [run.seed for run in group.runs]
        if len(set(seeds)) < len(seeds):
            lines.append(
                f"{group.label}: a seed stands more than once; the spread is then not that of seeds. In differences it "
                "counts once, as its mean, and nothing is paired with it."
            )
        if group.finished and group.machine is None:
            lines.append(f"{group.label}: no one machine is on record; time, speed and memory are left out.")
        if not group.finished:
            lines.append(f"{group.label}: not finished, and not compared.")
    return lines
