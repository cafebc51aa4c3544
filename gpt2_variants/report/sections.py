"""A section that a command adds to the page of a report."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .tables import Table, plain


class Figure(NamedTuple):
    """A figure of a section.

    Attributes:
        name: of letters, digits and dashes; no two figures of a page have the same.
        title: a few words.
        caption: what it shows; may be empty.
        figure: a matplotlib figure, drawn under `drawing.look()`.
    """

    name: str
    title: str
    caption: str
    figure: Any


@dataclass(frozen=True)
class Section:
    """What a command that makes runs has to say of them.

    Attributes:
        title: its heading.
        paragraphs: plain text.
        tables: of the report's kind.
        figures: `Figure`s, or tuples of their four values.
    """

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[tuple[str, str, str, Any]] = ()

    def markdown(self) -> list[str]:
        """Return its parts as Markdown; of a figure its title and caption."""
        parts = [f"## {plain(self.title)}", *map(plain, self.paragraphs)]
        parts += [table.markdown().rstrip() for table in self.tables]
        return parts + [plain(f"{title}. {caption}".strip()) for _, title, caption, _ in self.figures]
