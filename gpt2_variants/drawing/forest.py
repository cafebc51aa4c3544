"""Forest plots: differences from a baseline, each with its interval, around a line at zero."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .lines import Drawn
from .look import BOX, INK, MUTED, PALETTE, SIZE, new_axes

ROW_HEIGHT = 0.52  # inches: a line of text, and below it the interval
SIGNS = {  # word -> colour, marker, filled: no word is told by its colour alone
    "better": (PALETTE[2], "o", True),
    "worse": (PALETTE[1], "s", True),
    "undecided": (PALETTE[0], "o", False),
    "too few seeds": (MUTED, "", False),  # of which none is drawn
}


@dataclass(frozen=True)
class Row:
    """A difference of a forest plot.

    Attributes:
        label: of what.
        value: the difference; below 0 is better.
        low, high: its interval; None where there is none, and then no mark is drawn.
        word: of `SIGNS`.
        hover: what it says when it is pointed at.
    """

    label: str
    value: float
    low: float | None
    high: float | None
    word: str
    hover: str


def forest(rows: Sequence[Row], x_label: str, zero: str) -> Drawn:
    """Draw a row for each difference; `zero` is what the line at 0 is of."""
    from matplotlib.ticker import MaxNLocator

    top, bottom = 0.28, 0.55  # inches, for the name of the line at zero and for the axis
    height = top + bottom + ROW_HEIGHT * len(rows)
    figure, axes = new_axes((SIZE[0], height))
    figure.subplots_adjust(left=0.06, right=0.94, top=1 - top / height, bottom=bottom / height)
    axes.axvline(0, color=INK, linewidth=1.4)
    axes.annotate(
        zero, (0, 1), xycoords=("data", "axes fraction"), xytext=(0, 3), textcoords="offset points", ha="center"
    )
    hovers: dict[str, str | list[str]] = {}
    for number, row in enumerate(rows):
        colour, marker, filled = SIGNS[row.word]
        place = number + 0.32
        _say(axes, row, number)
        if row.low is None or row.high is None:
            continue
        axes.plot([row.low, row.high], [place, place], color=colour, linewidth=2.2, gid=f"interval{number}")
        hovers[f"interval{number}"] = row.hover
        face = colour if filled else BOX
        axes.plot(
            [row.value], [place], marker, color=colour, markerfacecolor=face, markersize=8, mew=1.8, gid=f"row{number}"
        )
        hovers[f"row{number}"] = [row.hover]
    axes.set(ylim=(len(rows) - 0.25, -0.5), xlabel=x_label)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.spines["left"].set_visible(False)
    axes.yaxis.set_visible(False)
    axes.grid(True, axis="x")
    return Drawn(figure, hovers)


def _say(axes: Any, row: Row, number: int) -> None:
    """Write the row's label at the left and its word at the right, above the interval."""
    label = row.label if len(row.label) <= 44 else f"{row.label[:43]}…"
    beside = {"xycoords": ("axes fraction", "data"), "va": "center", "size": 11}
    behind = {"facecolor": BOX, "edgecolor": "none", "pad": 1.0}  # so that no line crosses it
    axes.annotate(label, (0.005, number - 0.18), ha="left", bbox=behind, **beside)
    axes.annotate(row.word, (0.995, number - 0.18), ha="right", color=SIGNS[row.word][0], **beside)
