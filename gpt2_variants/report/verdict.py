"""Which architecture is better, in words."""

from collections.abc import Sequence

from .differences import Difference, Verdict
from .groups import Group
from .tables import flops_text, signed


def verdict_text(verdicts: Sequence[Verdict], groups: Sequence[Group]) -> list[str]:
    """Paragraphs: whether each group is better than the baseline, and what to mind in comparing them."""
    lines = []
    if not any(group.is_baseline and group.finished for group in groups):
        lines.append("No finished run of gpt2, the baseline, is among these: add one to compare with.")
    elif not verdicts:
        lines.append("No finished run of a variant is among these to compare with gpt2.")
    for v in verdicts:
        against = f"{v.group.label} against {v.baseline.label}: "
        if v.not_comparable:
            lines.append(" ".join([f"{against}their perplexities are not comparable: {v.not_comparable}.", *v.notes]))
            continue
        parts = []
        if v.at_tokens:
            parts.append(f"at equal data ({v.at_tokens.place:,.0f} training tokens) {_difference(v.at_tokens)}")
        if v.at_flops:
            same = v.at_tokens and _difference(v.at_flops) == _difference(v.at_tokens)
            found = "the same" if same else _difference(v.at_flops)
            parts.append(f"at equal cost ({flops_text(v.at_flops.place)} training FLOPs) {found}")
        compared = "; ".join(parts) or "they have no evaluation in common"
        lines.append(" ".join([f"{against}{compared}.", *_certainty(v), *v.notes]))
    return lines + _warnings(groups)


def _difference(found: Difference) -> str:
    way = "lower" if found.loss < 0 else "higher"
    error = "" if found.error is None else f" ± {found.error:.4f}"
    return f"perplexity {abs(found.percent):.1f} % {way} (loss {signed(found.loss, '.4f')}{error} nats)"


def _certainty(v: Verdict) -> list[str]:
    numbers = len(v.group.runs), len(v.baseline.runs)
    if min(numbers) < 2:
        seeds = "One seed each" if max(numbers) == 1 else f"{numbers[0]} and {numbers[1]} runs"
        return [f"{seeds}: a difference of one seed cannot be told from chance; train at least two of each."]
    words = []
    for name, found in (("equal data", v.at_tokens), ("equal cost", v.at_flops)):
        if found is not None:
            better = "better" if found.loss < 0 else "worse"
            clear = f"{better}, by more than two standard errors"
            words.append(f"at {name} {clear if found.clear else 'not told from chance (within two standard errors)'}")
    return [f"With {numbers[0]} and {numbers[1]} seeds: {'; '.join(words)}."] if words else []


def _warnings(groups: Sequence[Group]) -> list[str]:
    lines = []
    for group in groups:
        seeds = [run.seed for run in group.runs]
        if len(set(seeds)) < len(seeds):
            lines.append(f"{group.label}: a seed stands more than once; the spread is then not that of seeds.")
        if group.finished and group.machine is None:
            lines.append(f"{group.label}: no one machine is on record; time, speed and memory are left out.")
        if not group.finished:
            lines.append(f"{group.label}: not finished, and not compared.")
    return lines
