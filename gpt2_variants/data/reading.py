"""How a source is to be read, beyond what it says itself."""

from __future__ import annotations

import codecs
from dataclasses import asdict, dataclass
from typing import Any

HELD_OUT = 0.05  # of the rows, where a source has no split of its own
END_OF_TEXT_WORD, NO_SEPARATOR = "eos", "none"  # what --document_separator can be beside a text


@dataclass(frozen=True)
class Reading:
    """Options of reading; None is what the source itself says.

    Attributes:
        text_column: the column that holds the text, a nested one as in `a.b`.
        encoding: of text files, by Python's names.
        document_separator: what stands after each document of a row-wise source: `eos`, `none`, or a text that the
            tokenizer has as one token. None: `eos` for row-wise sources, nothing for plain text and WikiText.
        validation_dataset: a source of its own to validate on, as a value of `--dataset`.
        validation_split_percentage: the part of the rows, in percent, that is held out where there is no other.
    """

    text_column: str | None = None
    encoding: str | None = None
    document_separator: str | None = None
    validation_dataset: str | None = None
    validation_split_percentage: float | None = None

    def identity(self) -> dict[str, Any]:
        """Return what is asked for, for the key of prepared data; empty if nothing is."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def faults(self) -> list[str]:
        """Return what is wrong with the options by themselves, a line each."""
        lines = []
        if self.encoding is not None:
            try:
                codecs.lookup(self.encoding)
            except LookupError:
                lines.append(f"--encoding {self.encoding}: Python knows no such encoding; utf-8, utf-16, latin-1, ...")
        percent = self.validation_split_percentage
        if percent is not None and not 0 < percent < 100:
            lines.append(f"--validation_split_percentage {percent:g}: more than 0 and less than 100 is needed")
        if percent is not None and self.validation_dataset is not None:
            lines.append("--validation_split_percentage: has no effect beside --validation_dataset; leave it out")
        return lines
