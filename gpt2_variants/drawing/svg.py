"""Figures as SVGs that a page colours, with what their parts say when they are pointed at."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from .look import COLOURS, look

NAMESPACE = re.compile(r"\{.*\}")  # of a tag or an attribute, as ElementTree writes it
VARIABLES = {light: f"var(--{name})" for name, (light, _) in COLOURS.items()}


def svg(figure: Any, name: str, label: str, hovers: Mapping[str, str | Sequence[str]] | None = None) -> str:
    """Return the figure as an `<svg>` for a page: transparent, with the page's colours, no size of its own.

    Args:
        name: of letters and dashes, unlike that of every other figure of the page; begins each id in the figure.
        label: what the figure shows, for who cannot see it.
        hovers: gid of an artist -> what it says when it is pointed at, or what each of its markers says.

    Raises:
        ValueError: an artist of `hovers` is not in the figure, or has another number of markers.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with look():
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if NAMESPACE.sub("", child.tag) in ("metadata", "style"):
                parent.remove(child)
    _add_hovers(root, hovers or {})
    for element in root.iter():
        # a page of HTML knows an svg's tags without their namespaces
        element.tag = NAMESPACE.sub("", element.tag)
        attributes = {NAMESPACE.sub("", key): value for key, value in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({key: _own(key, value, name) for key, value in attributes.items()})
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib |= {"role": "img", "aria-label": label}
    root.tail = None
    return ElementTree.tostring(root, encoding="unicode")


def _add_hovers(root: ElementTree.Element, hovers: Mapping[str, str | Sequence[str]]) -> None:
    by_id = {element.get("id"): element for element in root.iter()}
    for gid, said in hovers.items():
        if gid not in by_id:
            raise ValueError(f"{gid}: no artist of the figure has this gid")
        element = by_id[gid]
        if isinstance(said, str):
            _add_title(element, said)
            continue
        # a line's markers stand in groups of their own; what its path uses are none
        markers = [use for use in element.iter() if NAMESPACE.sub("", use.tag) == "use"]
        if len(markers) != len(said):
            raise ValueError(f"{gid}: has {len(markers)} markers, and {len(said)} texts")
        for marker, text in zip(markers, said, strict=True):
            _add_title(marker, text)


def _add_title(element: ElementTree.Element, text: str) -> None:
    title = ElementTree.Element("title")
    title.text = text
    element.insert(0, title)


def _own(key: str, value: str, name: str) -> str:
    """Return an attribute's value with its ids begun by `name`, and its colours those of the page."""
    if key == "id":
        return f"{name}-{value}"
    if key == "href" and value.startswith("#"):  # else it is an image, held as data
        return f"#{name}-{value.removeprefix('#')}"
    if key == "style":
        pairs = (declaration.split(":", 1) for declaration in value.split(";") if declaration.strip())
        return ";".join(f"{k.strip()}:{_own(k.strip(), v.strip(), name)}" for k, v in pairs)
    if value.startswith("url(#"):
        return f"url(#{name}-{value.removeprefix('url(#')}"
    return VARIABLES.get(value.lower(), value)


def stylesheet() -> str:
    """Return the variables of `COLOURS`, for light and dark."""
    light, dark = ("".join(f"--{name}:{pair[n]};" for name, pair in COLOURS.items()) for n in (0, 1))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"
