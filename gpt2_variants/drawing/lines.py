"""Charts of lines over a common axis: together where they are few, else each beside the baseline in a panel."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .look import COLOURS, INK, MUTED, PALETTE, SIZE, new_axes, new_panels

DASHES = ("solid", "dashed", "dotted", "dashdot")
LINE_STYLES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dashdot"}  # as matplotlib gives them
MARKERS = ("o", "s", "^", "D", "v", "P")
MOST_TOGETHER = 6  # lines in one chart: of more, one hides another
COLUMNS = 2  # of panels, on a figure as wide as a phone
PANEL_HEIGHT = 1.65  # inches


@dataclass(frozen=True)
class Style:
    """How a group's lines look, in every chart."""

    colour: str
    dash: str = "solid"
    marker: str = "o"
    width: float = 1.8

    @property
    def variable(self) -> str:
        """The name of its colour in `COLOURS`."""
        return next(name for name, (light, _) in COLOURS.items() if light == self.colour)


@dataclass(frozen=True)
class Line:
    """A line of a chart, and the band around it.

    Attributes:
        style: of the line.
        x, y: its points.
        low, high: of the band, as long as `y`; None: no band.
        marked: the points are shown.
        label: what the line is of.
        reference: the other lines are held against it.
    """

    style: Style
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    marked: bool = True
    label: str = ""
    reference: bool = False


class Drawn(NamedTuple):
    """A matplotlib figure, and what its parts say when they are pointed at: gid -> text, or a text for each marker."""

    figure: Any
    hovers: dict[str, str | list[str]]


def styles(baselines: Sequence[bool]) -> list[Style]:
    """Return a style for each group: baselines in ink, others in the palette, then again with other dashes."""
    found, counts = [], {True: 0, False: 0}
    for baseline in baselines:
        n = counts[baseline]
        counts[baseline] += 1
        if baseline:
            found.append(Style(INK, DASHES[n % len(DASHES)], "o", 2.2))
        else:
            dash = DASHES[n // len(PALETTE) % len(DASHES)]
            found.append(Style(PALETTE[n % len(PALETTE)], dash, MARKERS[(n + 1) % len(MARKERS)]))
    return found


def chart(lines: Sequence[Line], x_label: str, y_label: str, log: bool = False, level: float | None = None) -> Drawn:
    """Draw `lines` over a common axis, the numbers of which are thousands (k), millions (M) and so on.

    More than `MOST_TOGETHER` lines get a panel each, all on the same axes, in which the references stand too.

    Args:
        log: the y-axis is logarithmic.
        level: a dotted horizontal line, of the unigram model.
    """
    hovers: dict[str, str | list[str]] = {}
    if len(lines) <= MOST_TOGETHER:
        figure, axes = new_axes()
        _draw(axes, lines, "line", x_label, y_label, hovers)
        axes.set(xlabel=x_label, ylabel=y_label)
        if level is not None:
            axes.axhline(level, color=MUTED, linestyle="dotted", linewidth=1.2)
            at_right = {"xycoords": ("axes fraction", "data"), "xytext": (-2, 3), "textcoords": "offset points"}
            axes.annotate("unigram model", (1, level), **at_right, size=11, ha="right", va="bottom", color=MUTED)
        _scale(axes, log, few=6)
        return Drawn(figure, hovers)
    references = [line for line in lines if line.reference]
    others = [line for line in lines if not line.reference]
    figure, panels = new_panels(len(others), COLUMNS, SIZE[0], PANEL_HEIGHT)
    for number, (line, axes) in enumerate(zip(others, panels, strict=True)):
        _draw(axes, [*references, line], f"panel{number}-line", x_label, y_label, hovers)
        title = line.label if len(line.label) <= 26 else f"{line.label[:25]}…"
        axes.set_title(title, size=10, color=line.style.colour, loc="left", pad=3)
        axes.tick_params(labelsize=9)
        if level is not None:
            axes.axhline(level, color=MUTED, linestyle="dotted", linewidth=1.2)
    _scale(panels[0], log, few=3)  # the axes are shared
    figure.supxlabel(x_label, size=11)
    figure.supylabel(y_label, size=11, x=0.01)
    return Drawn(figure, hovers)


def legend_of(figure: Any) -> list[tuple[Style, str]]:
    """Return the labelled lines of a figure that has no legend of its own, drawn in the colours of `COLOURS`."""
    found = []
    for axes in figure.axes:
        lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
        if axes.get_legend() is None:
            for line in lines:
                dash, marker = LINE_STYLES.get(line.get_linestyle(), "solid"), line.get_marker()
                found.append((Style(line.get_color(), dash, marker if marker in MARKERS else "o"), line.get_label()))
    return found


def _draw(
    axes: Any, lines: Sequence[Line], name: str, x_label: str, y_label: str, hovers: dict[str, str | list[str]]
) -> None:
    for number, line in enumerate(lines):
        style = line.style
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=style.colour, alpha=0.2, linewidth=0)
        marker = {"marker": style.marker, "markersize": 4.5} if line.marked else {}
        width = style.width if line.marked else style.width * 0.7
        gid = f"{name}{number}"
        axes.plot(line.x, line.y, color=style.colour, linestyle=style.dash, linewidth=width, gid=gid, **marker)
        if line.marked:
            points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
            hovers[gid] = [f"{line.label}: {y:.5g} {y_label} at {_place(x)} {x_label}" for x, y in points]
        else:
            hovers[gid] = line.label
    axes.grid(True)


def _place(x: float) -> str:
    return f"{x:,.0f}" if x < 1e9 else f"{x:.4g}"


def _scale(axes: Any, log: bool, few: int) -> None:
    """Set the ticks of axes whose lines are drawn."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep="\N{THIN SPACE}"))
    axes.xaxis.set_major_locator(MaxNLocator(few))
    if not log:
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    narrow = high / low < 8  # a decade's 1, 2 and 5 would be one tick or two
    axes.yaxis.set_major_locator(MaxNLocator(few) if narrow else LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
