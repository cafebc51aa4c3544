"""Charts of lines over a common axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .look import INK, MUTED, PALETTE, new_axes

DASHES = ("solid", "dashed", "dotted", "dashdot")
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Style:
    """How a group's lines look, in every chart."""

    colour: str
    dash: str = "solid"
    marker: str = "o"
    width: float = 1.8


@dataclass(frozen=True)
class Line:
    """A line of a chart, and the band around it.

    Attributes:
        style: of the line.
        x, y: its points.
        low, high: of the band, as long as `y`; None: no band.
        marked: the points are shown.
    """

    style: Style
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    marked: bool = True


def styles(baselines: Sequence[bool]) -> list[Style]:
    """One for each group: the baselines in ink, the others in the palette, then again with other dashes."""
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


def chart(lines: Sequence[Line], x_label: str, y_label: str, log: bool = False, level: float | None = None) -> Any:
    """A figure of `lines` over a common axis.

    Args:
        log: the y-axis is logarithmic.
        level: a dotted horizontal line, of the unigram model.
    """
    figure, axes = new_axes()
    for line in lines:
        style = line.style
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=style.colour, alpha=0.2, linewidth=0)
        marker = {"marker": style.marker, "markersize": 4.5} if line.marked else {}
        width = style.width if line.marked else style.width * 0.7
        axes.plot(line.x, line.y, color=style.colour, linestyle=style.dash, linewidth=width, **marker)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(True)
    axes.set_xlim(left=0)
    if level is not None:
        axes.axhline(level, color=MUTED, linestyle="dotted", linewidth=1.2)
        at_right = {"xycoords": ("axes fraction", "data"), "xytext": (-2, -3), "textcoords": "offset points"}
        axes.annotate("unigram model", (1, level), **at_right, size=11, ha="right", va="top", color=MUTED)
    if log:
        _log_axis(axes)
    return figure


def _log_axis(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    few = high / low < 8  # a decade's 1, 2 and 5 would be one tick or two
    axes.yaxis.set_major_locator(MaxNLocator(6) if few else LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def unit(axis: str, largest: float) -> tuple[float, str]:
    """What the values of an axis (`report.AXES`) up to `largest` are divided by, and the axis's label."""
    if axis == "steps":
        return 1, "optimizer steps"
    if axis == "time":
        seconds, name = next(
            ((s, n) for s, n in ((3600, "hours"), (60, "minutes")) if largest >= 3 * s), (1, "seconds")
        )
        return seconds, f"{name} of training"
    if axis == "tokens":
        scales = ((1e9, "thousand million tokens"), (1e6, "million tokens"), (1e3, "thousand tokens"))
        return next(((scale, name) for scale, name in scales if largest >= scale), (1, "tokens"))
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    return 10.0**exponent, "training FLOPs, 10" + str(exponent).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
