"""How every figure looks: its colours, its text and its size."""

import importlib.util
import re
from pathlib import Path
from typing import Any

from ..faults import UsageError

SIZE = (5.2, 3.3)  # inches: as wide as a phone, so that text is not scaled down there

# name -> (light, dark); the series are Okabe and Ito's palette, which the colour-blind can tell apart
COLOURS: dict[str, tuple[str, str]] = {
    "ink": ("#1f2328", "#e6e6e3"),
    "faint": ("#d5d8dc", "#42474d"),
    "muted": ("#6a7078", "#9aa1a9"),
    "box": ("#fefefe", "#1e2125"),  # what a figure stands on
    "c0": ("#0072b2", "#56b4e9"),
    "c1": ("#d55e00", "#ff8c42"),
    "c2": ("#009e73", "#2fd0a5"),
    "c3": ("#b3478f", "#e79ccb"),
    "c4": ("#a87b00", "#f0c04a"),
    "c5": ("#5e4fa2", "#b3a7f0"),
}
INK, FAINT, MUTED, BOX = (COLOURS[name][0] for name in ("ink", "faint", "muted", "box"))
PALETTE = tuple(light for name, (light, _) in COLOURS.items() if re.fullmatch(r"c\d", name))


def need_matplotlib() -> None:
    """Raise `UsageError` where there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(["the report's charts need matplotlib, which is not installed: pip install matplotlib"])


def new_axes(size: tuple[float, float] = SIZE, fitted: bool = False) -> tuple[Any, Any]:
    """Return an empty matplotlib figure and its axes; draw in them under `look()`.

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


def new_panels(count: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """Return an empty figure with `count` panels on common axes, and their axes, row by row; draw under `look()`.

    Args:
        width: of the figure, in inches.
        height: of a panel, in inches.
    """
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    total = 0.6 + rows * height
    figure = Figure(figsize=(width, total))
    figure.subplots_adjust(left=0.15, right=0.985, bottom=0.55 / total, top=1 - 0.25 / total, hspace=0.28, wspace=0.08)
    found = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes in found[count:]:
        axes.set_visible(False)
    if rows > 1:  # above a place that is left empty the numbers of the axis stand where the column ends
        for axes in found[count - columns : count]:
            axes.tick_params(labelbottom=True)
    return figure, found[:count]


def look() -> Any:
    """Return the context in which figures are drawn and saved."""
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


def png(figure: Any, path: Path) -> None:
    """Save the figure as a PNG on white."""
    with look():
        figure.savefig(path, dpi=150, facecolor="white")
