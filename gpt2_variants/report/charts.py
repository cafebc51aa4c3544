"""The curves of a report, one chart for each figure, drawn against tokens, steps, time and FLOPs."""

import dataclasses
import html
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from .. import drawing
from .groups import Group
from .runs import AXES
from .tables import INFILL

MOST_POINTS = 200  # of a curve of training losses; more are averaged, which a chart this small shows as well


def _curve(group: Group, axis: str, records: str, key: str, style: drawing.Style) -> drawing.Line | None:
    """The mean of `key` over the group's runs, at the steps that all of them logged, and its band."""
    by_step: list[dict[int, tuple[float, float]]] = []
    for run in group.runs:
        logged = [(r, run.place(r, axis)) for r in getattr(run, records) if r.get(key) is not None]
        by_step.append({r["step"]: (place, r[key]) for r, place in logged if place is not None})
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
    return drawing.Line(style, x, y, **band, marked=records == "evaluations")


@dataclass(frozen=True)
class _Chart:
    name: str
    title: str
    caption: str
    records: str
    key: str
    y_label: str
    log: bool = False
    of_infill: bool = False  # groups with infill, and their figures of it


CHARTS = (
    _Chart("loss", "Validation loss", "", "evaluations", "eval_loss", "nats per token"),
    _Chart("perplexity", "Validation perplexity", "", "evaluations", "eval_perplexity", "perplexity", log=True),
    _Chart("accuracy", "Validation accuracy", "", "evaluations", "eval_accuracy", "part predicted right"),
    _Chart("training", "Training loss", "", "training", "loss", "nats per token"),
    _Chart(
        "infill",
        "Infill perplexity: has seen the right neighbour",
        INFILL,
        "evaluations",
        "eval_infill_perplexity",
        "infill perplexity",
        log=True,
        of_infill=True,
    ),
    _Chart(
        "training-both",
        "Training loss of next token and infill together",
        "The mean over both streams, half of which has seen the right neighbour.",
        "training",
        "loss",
        "nats per prediction",
        of_infill=True,
    ),
)
AXIS_NAMES = {"tokens": "tokens", "steps": "steps", "time": "time", "flops": "FLOPs"}


def charts_html(groups: Sequence[Group], styles: Sequence[drawing.Style]) -> str:
    """The section of the curves; empty where nothing can be drawn. `styles`: of each group."""
    figures = []
    for chart in CHARTS:
        shown = list(zip(groups, styles, strict=True))
        if chart.of_infill or chart.key == "loss":
            shown = [(group, style) for group, style in shown if group.has_infill == chart.of_infill]
        drawn = []
        for axis in AXES:
            found = (_curve(group, axis, chart.records, chart.key, style) for group, style in shown)
            lines = [line for line in found if line is not None]
            if not lines:
                continue
            scale, x_label = drawing.unit(axis, max(max(line.x) for line in lines))
            lines = [dataclasses.replace(line, x=[x / scale for x in line.x]) for line in lines]
            unigrams = {run.unigram_perplexity for group, _ in shown for run in group.runs}
            level = unigrams.pop() if chart.key == "eval_perplexity" and len(unigrams) == 1 else None
            with drawing.look():
                figure = drawing.chart(lines, x_label, chart.y_label, chart.log, level)
            svg = drawing.svg(figure, f"{chart.name}-{axis}", f"{chart.title} against {AXIS_NAMES[axis]}")
            drawn.append(f'<div class="on-{axis}">{svg}</div>')
        if drawn:
            caption = f"<p>{html.escape(chart.caption)}</p>" if chart.caption else ""
            title = f"<figcaption><h3>{html.escape(chart.title)}</h3>{caption}</figcaption>"
            figures.append(f"<figure>{title}{''.join(drawn)}</figure>")
    if not figures:
        return ""
    radios = "".join(
        f'<input type="radio" name="axis" id="axis-{axis}"{" checked" if n == 0 else ""}>'
        f'<label for="axis-{axis}">{AXIS_NAMES[axis]}</label>'
        for n, axis in enumerate(AXES)
    )
    legend = "".join(
        f"<li>{drawing.swatch(style)}{html.escape(group.label)}{_runs_of(group)}</li>"
        for group, style in zip(groups, styles, strict=True)
    )
    words = "A line of several runs is their mean, and the band reaches from the least of them to the greatest."
    many = f"<p>{words}</p>" if any(len(group.runs) > 1 for group in groups) else ""
    if len({group.machine for group in groups}) > 1:
        many += "<p>Against time the curves compare between runs on the same machine only.</p>"
    return (
        f'<section class="curves"><h2>Curves</h2><ul class="legend">{legend}</ul>{many}'
        f'<span class="against">against</span>{radios}<div class="grid">{"".join(figures)}</div></section>'
    )


def _runs_of(group: Group) -> str:
    return f" ({len(group.runs)} runs)" if len(group.runs) > 1 else ""
