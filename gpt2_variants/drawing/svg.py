"""Figures as SVGs that a page colours."""

import html
import io
import re
from typing import Any

from .lines import Style
from .look import COLOURS, look

SWATCH_DASHES = {"solid": "", "dashed": "6 3", "dotted": "2 3", "dashdot": "6 2 2 2"}


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
