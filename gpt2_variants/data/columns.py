"""Which column of a row-wise source is trained on: one that plainly holds the text, or token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .names import DataError
from .reading import Reading

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

TEXT, IDS = "text", "ids"
# Names by which other data sets call their text, where there is no `text`.
OTHER_NAMES = ("content", "document", "article", "body", "story", "raw_content", "page", "paragraph", "sentence")


@dataclass(frozen=True)
class Column:
    """What is taken of each row.

    Attributes:
        name: of the column, a nested one as in `a.b`.
        kind: TEXT or IDS.
        why: in words, where it is not called `text` or `input_ids`; else "".
    """

    name: str
    kind: str
    why: str = ""


def kinds_in(rows: list[dict[str, Any]]) -> dict[str, str]:
    """Column -> what it holds in `rows`: TEXT, IDS, or what else in words; columns that hold nothing are left out."""
    found: dict[str, str] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None:
                kind = _kind(value)
                found[name] = kind if found.get(name, kind) == kind else "different things"
    return found


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return TEXT
    if isinstance(value, list):
        is_ids = value and all(item is None or (type(item) is int) for item in value)
        return IDS if is_ids or not value else "lists"
    return "objects" if isinstance(value, dict) else "numbers"


def kinds_of(features: datasets.Features) -> dict[str, str]:
    """Return what `kinds_in` does, by the features of a data set."""
    from datasets import LargeList, List, Value

    def kind(feature: Any) -> str:
        if isinstance(feature, Value):
            return TEXT if feature.dtype in ("string", "large_string", "string_view") else "numbers"
        if isinstance(feature, (List, LargeList)):
            return IDS if isinstance(feature.feature, Value) and "int" in feature.feature.dtype else "lists"
        return "objects" if isinstance(feature, dict) else "other things"

    return {name: kind(feature) for name, feature in features.items()}


def choose(where: str, kinds: dict[str, str], example: Any, reading: Reading, has_header: bool = False) -> Column:
    """Return the column to train on.

    Args:
        where: names the source, for the error.
        kinds: of `kinds_in` or `kinds_of`.
        example: a row, for the error.
        reading: may name the column.
        has_header: whether the names come from a first line that may be none, as in CSV.

    Raises:
        DataError: none is plainly the text, or the one that was named holds none.
    """
    texts = [name for name, kind in kinds.items() if kind == TEXT]
    asked = reading.text_column
    if asked is not None:
        top, *below = asked.split(".")
        if asked in texts or (below and kinds.get(top) == "objects"):
            return Column(asked, TEXT, "asked for")
        held = f"holds {kinds[asked]}" if asked in kinds else "is not there"
        raise DataError(f"--text_column {asked}: {held} in {where}, whose columns are {_listed(kinds)}; name another")
    if "text" in texts:
        return Column("text", TEXT)
    if "text" not in kinds:
        if kinds.get("input_ids") == IDS:
            return Column("input_ids", IDS)
        known = [name for name in OTHER_NAMES if name in texts]
        if len(known) == 1:
            return Column(known[0], TEXT, "the only one with a name for texts")
        if len(texts) == len(kinds) == 1 and not has_header:
            return Column(texts[0], TEXT, "the only one")
    shown = " ".join(repr(example).split())
    raise DataError(
        f"{where}: it is not clear which of the columns {_listed(kinds)} to train on (a row: {shown[:160]}); name it "
        "by --text_column, or give a column `text`, or `input_ids` (lists of token ids)"
    )


def _listed(kinds: dict[str, str]) -> str:
    names = ", ".join(kinds)
    odd = [f"{name} holds {kind}" for name, kind in kinds.items() if kind not in (TEXT, IDS)]
    return names + (f"; {', '.join(odd)}" if odd else "")


def value_of(row: dict[str, Any], name: str) -> str:
    """Return the text of a row in a column, a nested one by its path; "" where it is null or missing.

    Raises:
        ValueError: it is no text.
    """
    value: Any = row
    if name in row:
        value = row[name]
    else:
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"its column {name} holds {value!r:.80}, and no text")
    return value


@dataclass
class Dropped:
    """How many positions of rows of ids were dropped, and why."""

    masked: int = 0
    unlabelled: int = 0
    null: int = 0

    def __str__(self) -> str:
        parts = [
            (self.masked, "with attention_mask 0"),
            (self.unlabelled, "with the label -100"),
            (self.null, "of null"),
        ]
        return ", ".join(f"{count:,} {what}" for count, what in parts if count)


def clean_ids(table: pa.Table, dropped: Dropped) -> pa.Table:
    """Return the rows of `input_ids` without positions that are null, masked, or labelled -100; `dropped` counts them.

    `attention_mask` and `labels` count where they are lists as long as the ids.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table["input_ids"].combine_chunks()
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)
    values = column.flatten()
    null = values.is_null().to_numpy(zero_copy_only=False)
    keep = ~null
    dropped.null += int(null.sum())
    for name, unwanted, counter in (("attention_mask", 0, "masked"), ("labels", -100, "unlabelled")):
        if name in table.column_names and pa.types.is_nested(table[name].type):
            beside = table[name].combine_chunks()
            if (pc.fill_null(pc.list_value_length(beside), 0).to_numpy() != lengths).any():
                raise DataError(f"{name} and input_ids differ in length in some row; make them again")
            wrong = keep & (beside.flatten().fill_null(unwanted).to_numpy(zero_copy_only=False) == unwanted)
            setattr(dropped, counter, getattr(dropped, counter) + int(wrong.sum()))
            keep &= ~wrong
    row = np.repeat(np.arange(len(lengths)), lengths)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row[keep], minlength=len(lengths)))])
    try:
        kept = values.filter(pa.array(keep)).cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise DataError(f"an id is larger than any model's vocabulary ({error})") from error
    return pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), kept)})
