"""The forest plots of a page: each variant's difference from the baseline, with its interval."""

from collections.abc import Sequence

from .. import drawing
from .differences import Difference, Verdict
from .tables import signed
from .template import ShownFigure, shown

TITLES = {
    "tokens": ("At equal data", "Both have seen the same number of training tokens."),
    "flops": ("At equal cost", "Both have spent the same number of training FLOPs."),
    "time": ("At equal time", "Both have trained for the same time on the same machine."),
}
HOW_TO_READ = (
    "The line is the 95 % interval of the difference in validation loss. A filled mark is a difference that is told "
    "from chance after all comparisons of this chart are counted: a circle is better, a square is worse. A hollow mark "
    "is undecided. Without a mark there are too few seeds for an interval."
)


def forests(verdicts: Sequence[Verdict]) -> list[ShownFigure]:
    """Return a forest plot for each axis on which something is compared."""
    found = []
    for axis, (title, caption) in TITLES.items():
        differences = [one for verdict in verdicts for one in verdict.differences if one.axis == axis]
        rows = [_row(one) for one in differences]
        rows = [row for row in rows if row.value == row.value]  # a loss that is not a number has no place
        if not rows:
            continue
        baselines = {one.baseline.name for one in differences}
        with drawing.look():
            zero = baselines.pop() if len(baselines) == 1 else "the baseline"
            drawn = drawing.forest(rows, "nats per token; to the left is better", zero)
        found.append(shown(f"forest-{axis}", title, caption, drawn))
    return found


def _row(found: Difference) -> drawing.Row:
    estimate = found.estimate
    nats = _with_interval((estimate.mean, estimate.low, estimate.high), ".4f", " nats")
    percent = _with_interval((found.percent, found.percent_low, found.percent_high), ".2f", " %")
    hover = f"{found.group.label} less {found.baseline.label}: {nats}, perplexity {percent}: {found.word}"
    return drawing.Row(found.group.name, estimate.mean, estimate.low, estimate.high, found.word, hover)


def _with_interval(values: tuple[float | None, float | None, float | None], form: str, unit: str) -> str:
    mean, *ends = ("-" if value is None else signed(value, form) for value in values)
    return mean + unit + ("" if "-" in ends else f" ({' to '.join(ends)}{unit})")
