"""Figures by matplotlib, as PNGs and as SVGs that a page colours: one drawing serves light and dark.

Everything is drawn in the colours of `COLOURS`, which are those of a light page; in an SVG each is replaced by the
page's variable of its name.
"""

from .lines import Line, Style, chart, styles, unit
from .look import COLOURS, FAINT, INK, MUTED, PALETTE, look, need_matplotlib, new_axes, png
from .svg import stylesheet, svg, swatch

__all__ = [
    "COLOURS",
    "FAINT",
    "INK",
    "MUTED",
    "PALETTE",
    "Line",
    "Style",
    "chart",
    "look",
    "need_matplotlib",
    "new_axes",
    "png",
    "styles",
    "stylesheet",
    "svg",
    "swatch",
    "unit",
]
