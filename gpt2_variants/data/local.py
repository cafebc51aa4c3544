"""Rows of local files and of data sets: one column, text or token ids, and what was taken, dropped or left unread."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arrow import BYTES_PER_BATCH
from .columns import IDS, TEXT, Column, Dropped, choose, clean_ids, kinds_in, kinds_of, value_of
from .formats import format_of, rows_of, suffix_of
from .names import DataError, brief
from .reading import Reading

if TYPE_CHECKING:
    import datasets

IDS_PER_ROW = 8192  # of a stream of ids, so that rows can be held out


@dataclass
class Rows:
    """The rows of one split.

    Attributes:
        data: one column, `text` (strings) or `input_ids` (lists of ids).
        is_documents: whether a row is a document, not a line of one.
        notes: what was taken and what was dropped, in words.
    """

    data: datasets.Dataset
    is_documents: bool
    notes: list[str] = field(default_factory=list)

    @property
    def is_text(self) -> bool:
        """Whether the rows are text."""
        return self.data.column_names == ["text"]


def read_files(dataset: str, files: list[Path], reading: Reading, scratch: Path) -> Rows:
    """Read files in their order, each exactly, into rows on the disk.

    Raises:
        DataError: a file cannot be read, or it is not clear what of it is the text.
    """
    chosen = {file: _column_in(dataset, file, reading) for file in files}
    kinds = {column.kind for column in chosen.values()}
    if len(kinds) > 1:
        raise DataError(f"--dataset {dataset}: some files hold text, others token ids; give one kind only")
    if not kinds:
        raise DataError(f"--dataset {dataset}: its files hold no rows; give some that hold text")
    is_text, dropped = kinds == {TEXT}, Dropped()
    tables = _text_tables(dataset, chosen, reading) if is_text else _id_tables(dataset, chosen, reading, dropped)
    rows = _on_disk(tables, is_text, scratch)
    notes = sorted({f"text from the column {c.name}, {c.why}" for c in chosen.values() if c.why})
    if str(dropped):
        notes.append(f"dropped {dropped}")
    is_documents = is_text and all(format_of(file).kind == "rows" for file in chosen)  # type: ignore[union-attr]
    return Rows(rows, is_documents, notes)


def _column_in(dataset: str, file: Path, reading: Reading) -> Column:
    """Choose the column of a file, by its first rows."""
    found = format_of(file)
    if found is not None and found.kind != "rows":
        if reading.text_column is not None:
            raise DataError(f"--text_column {reading.text_column}: {file.name} has no columns; leave it out")
        return Column("", TEXT if found.kind == "lines" else IDS)
    try:
        first = next(rows_of(file, reading.encoding), [])
    except Exception as error:  # the readers raise Arrow's, csv's, Unicode's and compressors' errors
        raise _unreadable(dataset, file, error) from error
    if first and all(isinstance(row, str) for row in first):
        return Column("", TEXT)
    objects = [row for row in first if isinstance(row, dict)]
    if len(objects) < len(first):
        raise DataError(f"--dataset {dataset}: {file.name} has rows without columns, such as {first[0]!r:.80}")
    if not (kinds := kinds_in(objects)):
        return Column(reading.text_column or "text", TEXT)
    has_header = suffix_of(file).startswith((".csv", ".tsv"))
    return choose(f"--dataset {dataset}: {file.name}", kinds, objects[0], reading, has_header)


def _text_tables(dataset: str, chosen: dict[Path, Column], reading: Reading) -> Iterator[Any]:
    import pyarrow as pa

    for file, column in chosen.items():
        for rows in _rows(dataset, file, reading):
            try:
                texts = [row if isinstance(row, str) else value_of(row, column.name) for row in rows]
            except ValueError as error:
                raise DataError(f"--dataset {dataset}: {file.name} has a row of another kind: {error}") from error
            yield pa.table({"text": pa.array(texts, pa.string())})


def _id_tables(dataset: str, chosen: dict[Path, Column], reading: Reading, dropped: Dropped) -> Iterator[Any]:
    import pyarrow as pa

    for file, column in chosen.items():
        for rows in _rows(dataset, file, reading):
            if column.name:
                names = ("input_ids", "attention_mask", "labels")
                present = [name for name in names if all(isinstance(row.get(name), list) for row in rows)]
                table = pa.table({name: pa.array([row[name] for row in rows]) for name in present})
                yield clean_ids(table, dropped)
            else:
                pieces = [row[i : i + IDS_PER_ROW] for row in rows for i in range(0, len(row), IDS_PER_ROW)]
                yield pa.table({"input_ids": pa.array(pieces, pa.list_(pa.int64()))})


def _rows(dataset: str, file: Path, reading: Reading) -> Iterator[list[Any]]:
    try:
        yield from rows_of(file, reading.encoding)
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(dataset, file, error) from error


def _unreadable(dataset: str, file: Path, error: Exception) -> DataError:
    cure = "; give its --encoding" if isinstance(error, UnicodeError) else "; correct it, or leave it out"
    return DataError(f"--dataset {dataset}: {file.name} cannot be read ({brief(error)}){cure}")


def _on_disk(tables: Iterator[Any], is_text: bool, scratch: Path) -> datasets.Dataset:
    """Return the rows of Arrow tables, written as they come, and memory-mapped."""
    import pyarrow as pa
    from datasets import Dataset

    schema = pa.schema({"text": pa.string()} if is_text else {"input_ids": pa.list_(pa.int64())})
    path = Path(tempfile.mkdtemp(dir=scratch), "rows.arrow")
    held: list[Any] = []
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for table in itertools.chain(tables, [None]):
            held += [] if table is None else [table.cast(schema)]
            # in batches of some size: opening a file reads the head of each, which would map all of many small ones
            if held and (table is None or sum(part.nbytes for part in held) >= BYTES_PER_BATCH):
                writer.write_table(pa.concat_tables(held).combine_chunks())
                held = []
    return Dataset.from_file(str(path))


def one_column(dataset: str, rows: datasets.Dataset, reading: Reading, scratch: Path) -> Rows:
    """Return the rows of a data set with the column that is trained on alone, chosen as in a file.

    Raises:
        DataError: it is not clear which column that is.
    """
    kinds = kinds_of(rows.features)
    column = choose(f"--dataset {dataset}", kinds, rows[0] if len(rows) else {}, reading)
    notes = [f"text from the column {column.name}, {column.why}"] if column.why else []
    if column.kind == TEXT:
        if column.name not in rows.column_names:
            rows = rows.flatten()
            if column.name not in rows.column_names:
                raise DataError(f"--text_column {column.name}: is not there; the columns are {', '.join(kinds)}")
        rows = rows.select_columns([column.name])
        rows = rows.rename_columns({column.name: "text"} if column.name != "text" else {})
        from datasets import Value

        if rows.features["text"].dtype != "string":
            rows = rows.cast_column("text", Value("string"))
        return Rows(rows, True, notes)
    beside = [name for name in ("attention_mask", "labels") if kinds.get(name) == IDS]
    rows = rows.select_columns(["input_ids", *beside])
    dropped = Dropped()
    if beside or _has_null(rows):
        tables = (clean_ids(table, dropped) for table in rows.with_format("arrow").iter(batch_size=1000))
        kept = _on_disk(tables, is_text=False, scratch=scratch)
        if str(dropped):
            return Rows(kept, False, [f"dropped {dropped}"])
    return Rows(rows.select_columns(["input_ids"]), False)


def _has_null(rows: datasets.Dataset) -> bool:
    batches = rows.with_format("arrow").iter(batch_size=1000)
    return any(table["input_ids"].combine_chunks().flatten().null_count for table in batches)
