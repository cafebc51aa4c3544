"""The page's HTML, from the templates beside this file: everything that is not `Markup` is escaped."""

import functools
from importlib import resources
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from .. import drawing

TEMPLATES = resources.files(__package__) / "templates"


class ShownFigure(NamedTuple):
    """A figure of the page; `legend`: (style, label) of its lines, where it has labels and no legend within."""

    title: str
    caption: str
    svg: Markup
    legend: list[tuple[drawing.Style, str]]


def shown(name: str, title: str, caption: str, drawn: drawing.Drawn) -> ShownFigure:
    """Return a figure for the page; `name` is unlike that of all its other figures."""
    svg = Markup(drawing.svg(drawn.figure, name, title, drawn.hovers))
    return ShownFigure(title, caption, svg, drawing.legend_of(drawn.figure))


def render(**parts: Any) -> str:
    """Return the page of `parts`, which are the variables of page.html.j2."""
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "sort.js"))
    own = {"colours": Markup(drawing.stylesheet()), "style": Markup(style), "script": Markup(script)}
    return _environment().get_template("page.html.j2").render(**own, **parts)


@functools.cache
def _environment() -> jinja2.Environment:
    def load(name: str) -> str:
        return (TEMPLATES / name).read_text(encoding="utf-8")

    return jinja2.Environment(
        loader=jinja2.FunctionLoader(load),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
