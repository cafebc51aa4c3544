"""The curves of a report, one chart for each figure, drawn against tokens, steps, time and FLOPs."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from markupsafe import Markup

from .. import drawing
from .groups import Group, streams_of
from .runs import AXES

DRAWN = 1e100  # what is larger, as of a run that diverged, or is no number, has no place on an axis
MOST_POINTS = 200  # of a curve of training losses; more are averaged, which a chart this small shows as well


def _value(group: Group, record: dict[str, Any], key: str) -> float | None:
    """Return the figure `key` of a record; a training loss is the next token's alone, None where it was not logged."""
    if key != "next_token_loss" or key in record or group.streams:
        return record.get(key)
    return record.get("loss")  # of the next token, all that the variant predicts


def _curve(group: Group, axis: str, chart: "_Chart", style: drawing.Style) -> drawing.Line | None:
    """Return the mean of a chart's figure over the group's runs, at the steps that all of them logged, and its band."""
    by_step: list[dict[int, tuple[float, float]]] = []
    for run in group.runs:
        placed = [(r["step"], run.place(r, axis), _value(group, r, chart.key)) for r in getattr(run, chart.records)]
        by_step.append({step: (x, y) for step, x, y in placed if x is not None and y is not None and abs(y) < DRAWN})
    steps = sorted(set.intersection(*map(set, by_step)))
    if not steps:
        return None
    x, y, low, high = [], [], [], []
    size = -(-len(steps) // MOST_POINTS)
    for first in range(0, len(steps), size):
        part = steps[first : first + size]
        places, values = ([fmean(found[step][n] for step in part) for found in by_step] for n in (0, 1))
        x.append(fmean(places))
        y.append(fmean(values))
        low.append(min(values))
        high.append(max(values))
    band = {"low": low, "high": high} if len(group.runs) > 1 else {}
    marked = chart.records == "evaluations"
    return drawing.Line(style, x, y, **band, marked=marked, label=group.label, reference=group.is_baseline)


@dataclass(frozen=True)
class _Chart:
    name: str
    title: str
    caption: str
    records: str
    key: str
    y_label: str
    log: bool = False


CHARTS = (
    _Chart("loss", "Validation loss", "", "evaluations", "eval_loss", "nats per token"),
    _Chart("perplexity", "Validation perplexity", "", "evaluations", "eval_perplexity", "perplexity", log=True),
    _Chart("accuracy", "Validation accuracy", "", "evaluations", "eval_accuracy", "part predicted right"),
    _Chart(
        "training",
        "Training loss of the next token",
        "It is taken with dropout, where there is any.",
        "training",
        "next_token_loss",
        "nats per token",
    ),
)
AXIS_NAMES = {"tokens": "tokens", "steps": "steps", "time": "time", "flops": "FLOPs"}
AXIS_LABELS = {
    "tokens": "training tokens",
    "steps": "optimizer steps",
    "time": "seconds of training",
    "flops": "training FLOPs",
}


@dataclass(frozen=True)
class ShownChart:
    """A chart of the page: an `<svg>` for each axis that it can be drawn against."""

    title: str
    caption: str
    by_axis: dict[str, Markup]


@dataclass(frozen=True)
class Curves:
    """The section of the curves.

    Attributes:
        axes: axis -> its name.
        legend: the style of each group, and what it stands for.
        notes: how the charts are to be read.
        charts: those that could be drawn.
    """

    axes: dict[str, str]
    legend: list[tuple[drawing.Style, str]]
    notes: list[str]
    charts: list[ShownChart]


def curves_of(groups: Sequence[Group]) -> Curves:
    """Return the curves of `groups`, each with a style of its own in all charts."""
    styles = drawing.styles([group.is_baseline for group in groups])
    styled = list(zip(groups, styles, strict=True))
    charts = [
        ShownChart(chart.title, chart.caption, drawn)
        for chart, shown in [*((chart, styled) for chart in CHARTS), *_charts_of_streams(styled)]
        if (drawn := _against_each_axis(chart, shown))
    ]
    notes = []
    if any(len(group.runs) > 1 for group in groups):
        notes.append(
            "Where there are several runs, the line is their mean, and the band reaches from the least to the greatest."
        )
    if len(groups) > drawing.MOST_TOGETHER:
        notes.append("A chart of more than six lines has a panel for each, in which the baseline's line stands too.")
    if len({group.machine for group in groups}) > 1:
        notes.append("Against time, compare the curves of runs on the same machine only.")
    legend = [(style, group.label + _runs_of(group)) for group, style in zip(groups, styles, strict=True)]
    return Curves(AXIS_NAMES, legend, notes, charts)


def _charts_of_streams(
    styled: list[tuple[Group, drawing.Style]],
) -> list[tuple[_Chart, list[tuple[Group, drawing.Style]]]]:
    """Return the charts of further streams and of losses over several, each with the groups that stand in it."""
    groups = [group for group, _ in styled]
    found = []
    for n, stream in enumerate(streams_of(groups)):
        key, y_label = f"eval_{stream.name}_perplexity", f"{stream.name} perplexity"
        chart = _Chart(
            f"stream-{n}", f"{stream.title}: perplexity", stream.caveat, "evaluations", key, y_label, log=True
        )
        found.append((chart, [(group, style) for group, style in styled if stream in group.streams]))
    for n, streams in enumerate(dict.fromkeys(group.streams for group in groups if group.streams)):
        title = f"Training loss of next token and {' and '.join(stream.name for stream in streams)} together"
        caption = "The mean over the predictions of all streams, weighed as in the loss that is trained."
        chart = _Chart(f"training-together-{n}", title, caption, "training", "loss", "nats per prediction")
        found.append((chart, [(group, style) for group, style in styled if group.streams == streams]))
    return found


def _against_each_axis(chart: _Chart, shown: list[tuple[Group, drawing.Style]]) -> dict[str, Markup]:
    unigrams = {run.unigram_perplexity for group, _ in shown for run in group.runs}
    level = unigrams.pop() if chart.key == "eval_perplexity" and len(unigrams) == 1 else None
    found = {}
    for axis in AXES:
        drawn = (_curve(group, axis, chart, style) for group, style in shown)
        if lines := [line for line in drawn if line is not None]:
            with drawing.look():
                figure, hovers = drawing.chart(lines, AXIS_LABELS[axis], chart.y_label, chart.log, level)
            label = f"{chart.title} against {AXIS_NAMES[axis]}"
            found[axis] = Markup(drawing.svg(figure, f"{chart.name}-{axis}", label, hovers))
    return found


def _runs_of(group: Group) -> str:
    return f" ({len(group.runs)} runs)" if len(group.runs) > 1 else ""
