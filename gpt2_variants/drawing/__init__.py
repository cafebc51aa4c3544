"""Figures by matplotlib, as PNGs and as SVGs that a page colours: one drawing serves light and dark.

Everything is drawn in the colours of `COLOURS`, which are those of a light page; in an SVG each is replaced by the
page's variable of its name.
"""

from .forest import SIGNS, Row, forest
from .lines import MOST_TOGETHER, Drawn, Line, Style, chart, legend_of, styles
from .look import COLOURS, FAINT, INK, MUTED, PALETTE, look, need_matplotlib, new_axes, new_panels, png
from .svg import stylesheet, svg

__all__ = [
    "COLOURS",
    "FAINT",
    "INK",
    "MOST_TOGETHER",
    "MUTED",
    "PALETTE",
    "SIGNS",
    "Drawn",
    "Line",
    "Row",
    "Style",
    "chart",
    "forest",
    "legend_of",
    "look",
    "need_matplotlib",
    "new_axes",
    "new_panels",
    "png",
    "styles",
    "stylesheet",
    "svg",
]
