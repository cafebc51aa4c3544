"""Figures by matplotlib, as PNGs and as SVGs that a page colours: one drawing serves light and dark.

Everything is drawn in the colours of `COLOURS`, which are those of a light page; in an SVG each is replaced by the
page's variable of its name.
"""

import html
import importlib.util
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .faults import UsageError

SIZE = (5.2, 3.3)  # inches: as wide as a phone, so that text is not scaled down there

# name -> (light, dark); the series are Okabe and Ito's palette, which the colour-blind can tell apart
COLOURS: dict[str, tuple[str, str]] = {
    "ink": ("#1f2328", "#e6e6e3"),
    "faint": ("#d5d8dc", "#42474d"),
    "muted": ("#6a7078", "#9aa1a9"),
    "c0": ("#0072b2", "#56b4e9"),
    "c1": ("#d55e00", "#ff8c42"),
    "c2": ("#009e73", "#2fd0a5"),
    "c3": ("#b3478f", "#e79ccb"),
    "c4": ("#a87b00", "#f0c04a"),
    "c5": ("#5e4fa2", "#b3a7f0"),
}
INK, FAINT, MUTED = (COLOURS[name][0] for name in ("ink", "faint", "muted"))
PALETTE = tuple(light for name, (light, _) in COLOURS.items() if re.fullmatch(r"c\d", name))
DASHES = ("solid", "dashed", "dotted", "dashdot")
MARKERS = ("o", "s", "^", "D", "v", "P")
SWATCH_DASHES = {"solid": "", "dashed": "6 3", "dotted": "2 3", "dashdot": "6 2 2 2"}


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


def need_matplotlib() -> None:
    """Raise `UsageError` where there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(["the report's charts need matplotlib, which is not installed: pip install matplotlib"])


def new_axes(size: tuple[float, float] = SIZE, fitted: bool = False) -> tuple[Any, Any]:
    """An empty matplotlib figure and its axes; draw in them under `look()`.

    Args:
        size: in inches.
        fitted: margins are made to fit what is drawn, which takes twice the time; else they have room for numbers and
            a label on the left and below.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained" if fitted else None)
    if not fitted:
        figure.subplots_adjust(left=0.18, right=0.965, bottom=0.175, top=0.96)
    return figure, figure.subplots()


def look() -> Any:
    """The context in which figures are drawn and saved."""
    import matplotlib

    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "gpt2_variants",  # the same page for the same runs
        "font.size": 12,
        "axes.labelsize": 12,
        "xtick.labelsize": 11,
        "ytick.labelsize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": MUTED,
        "axes.facecolor": "none",
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "grid.color": FAINT,
        "grid.linewidth": 0.7,
    }
    return matplotlib.rc_context(settings)


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


def svg(figure: Any, name: str, label: str) -> str:
    """The figure as an `<svg>` for a page: transparent, with the page's colours, no size of its own.

    Args:
        name: of letters and dashes, unlike that of every other figure of the page; begins each id in the figure.
        label: what the figure shows, for who cannot see it.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with look():
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', text)
    for variable, (light, _) in COLOURS.items():
        text = text.replace(light, f"var(--{variable})")
    text = re.sub(r'(<svg [^>]*?)width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def png(figure: Any, path: Path) -> None:
    """Save the figure as a PNG on white."""
    with look():
        figure.savefig(path, dpi=150, facecolor="white")


def swatch(style: Style) -> str:
    """A short piece of a line of `style`, as an `<svg>` for a legend."""
    variable = next(name for name, (light, _) in COLOURS.items() if light == style.colour)
    shapes = {
        "o": '<circle cx="14" cy="6" r="3.5"/>',
        "s": '<rect x="10.8" y="2.8" width="6.4" height="6.4"/>',
        "^": '<path d="M14 2L18 9.5H10z"/>',
        "D": '<path d="M14 1.5L18.5 6L14 10.5L9.5 6z"/>',
        "v": '<path d="M14 10L18 2.5H10z"/>',
        "P": '<path d="M12.5 2h3v2.5h2.5v3h-2.5v2.5h-3v-2.5h-2.5v-3h2.5z"/>',
    }
    dash = SWATCH_DASHES[style.dash]
    return (
        f'<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true" style="color:var(--{variable})">'
        f'<path d="M0 6H28" stroke="currentColor" stroke-width="{style.width}" stroke-dasharray="{dash}"/>'
        f'<g fill="currentColor">{shapes[style.marker]}</g></svg>'
    )


def stylesheet() -> str:
    """The variables of `COLOURS`, for light and dark."""
    light, dark = ("".join(f"--{name}:{pair[n]};" for name, pair in COLOURS.items()) for n in (0, 1))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
