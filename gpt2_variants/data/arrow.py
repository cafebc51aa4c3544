"""Token ids in Arrow tables, and as streams that are never held whole."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets


BYTES_PER_BATCH = 4 << 20  # of rows handed to the tokenizer, or cut into blocks, at a time
ROWS_PER_BATCH = 10_000  # at most, for rows may be empty
BYTES_PER_FILE = 500 << 20  # of blocks, at least, before the next file is begun
MOST_FILES = 256  # about, of blocks: a run has all of them open


def flat_ids(table: Any) -> np.ndarray:
    """Return the ids of an Arrow table's column `input_ids`, all rows one after the other, shape (tokens,)."""
    return table["input_ids"].combine_chunks().flatten().to_numpy(zero_copy_only=False)


def row_lengths(table: Any) -> np.ndarray:
    """Return the number of ids in each row of an Arrow table, int64, shape (rows,)."""
    import pyarrow.compute as pc

    return pc.fill_null(pc.list_value_length(table["input_ids"]), 0).to_numpy().astype(np.int64)


def rows_in_batch(rows: datasets.Dataset) -> int:
    """Return how many rows make a few megabytes: a row may be a line or a book."""
    bytes_per_row = rows.data.nbytes / max(1, rows.data.num_rows)
    return int(np.clip(BYTES_PER_BATCH / max(1.0, bytes_per_row), 1, ROWS_PER_BATCH))


class Tokens:
    """Rows of token ids, read as a stream, from a data set or from files of Arrow batches one after the other.

    Files are read, not mapped: what was read does not stay in the resident set, and one file is open at a time.
    """

    def __init__(self, sources: list[tuple[datasets.Dataset | Path, int]], rows: range | None = None) -> None:
        """Take sources with the number of rows in each; of all these rows, counted from 0, those in `rows`."""
        self._sources = sources
        self._rows = range(sum(count for _, count in sources)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def select(self, start: int, stop: int) -> Tokens:
        """Return the rows `start` to `stop` - 1."""
        return Tokens(self._sources, self._rows[start:stop])

    @property
    def nbytes(self) -> int:
        """About as many bytes as the rows take."""
        sizes = (
            source.stat().st_size if isinstance(source, Path) else source.data.nbytes for source, _ in self._sources
        )
        return sum(sizes) * len(self) // max(1, sum(count for _, count in self._sources))

    def tables(self) -> Iterator[Any]:
        """Give the rows in order, as Arrow tables with the column `input_ids`, a few megabytes each."""
        end = 0
        for source, count in self._sources:
            first, end = end, end + count
            if end <= self._rows.start or first >= self._rows.stop:
                continue
            if not isinstance(source, Path):
                inside = range(max(0, self._rows.start - first), min(count, self._rows.stop - first))
                yield from source.select(inside).with_format("arrow").iter(batch_size=rows_in_batch(source))
                continue
            for table in read_tables(source):
                skipped = max(0, self._rows.start - first)
                wanted = table[skipped : max(skipped, self._rows.stop - first)]
                first += len(table)
                if len(wanted):
                    yield wanted

    def dataset(self) -> datasets.Dataset:
        """Return the rows as a data set that maps the files; rows that came as a data set come back as it."""
        from datasets import Dataset, Features, List, Value, concatenate_datasets

        parts = [Dataset.from_file(str(s)) if isinstance(s, Path) else s for s, count in self._sources if count]
        if not parts:
            return Dataset.from_dict({"input_ids": []}, features=Features({"input_ids": List(Value("int32"))}))
        return concatenate_datasets(parts).select(self._rows)


def read_tables(file: Path) -> Iterator[Any]:
    """Read a file's Arrow batches one by one, as tables.

    Raises:
        pyarrow.ArrowInvalid, OSError: it is not whole.
    """
    import pyarrow as pa

    with pa.OSFile(str(file)) as stream, pa.ipc.open_stream(stream) as batches:
        for batch in batches:
            yield pa.Table.from_batches([batch])


def count_tokens(tokens: Tokens, enough: int | None = None) -> int:
    """Return the number of ids in all rows, or in the first ones that have `enough` together."""
    total = 0
    for table in tokens.tables():
        total += int(row_lengths(table).sum())
        if enough is not None and total >= enough:
            break
    return total


def write_blocks(blocks: Iterable[np.ndarray], nbytes: int, block_size: int, dtype: str, folder: Path) -> int:
    """Write blocks as a folder that `datasets.load_from_disk` opens, in files of 500 MB or more.

    Args:
        blocks: arrays of whole blocks one after the other, shape (a multiple of S,), of type `dtype`.
        nbytes: about as many bytes as there will be; decides how large a file becomes.
        block_size: S, ids in a block.
        dtype: `uint16` or `int32`.
        folder: a new one.

    Returns:
        The number of blocks.

    Raises:
        OSError: the folder exists or cannot be written.
    """
    import pyarrow as pa
    import xxhash
    from datasets import DatasetInfo, Features, List, Value

    folder.mkdir(parents=True)
    features = Features({"input_ids": List(Value(dtype), length=block_size)})
    digest = xxhash.xxh3_64(str(features).encode())
    schema, arrays = features.arrow_schema, iter(blocks)
    written = 0
    files: list[Path] = []
    for ids in arrays:
        files.append(folder / f"part-{len(files)}")
        size = 0
        with pa.ipc.new_stream(str(files[-1]), schema) as stream:
            for each in itertools.chain([ids], arrays):
                digest.update(each.tobytes())
                column = pa.FixedSizeListArray.from_arrays(pa.array(each), block_size)
                stream.write_batch(pa.record_batch([column], schema=schema))
                written += len(column)
                size += each.nbytes
                if size >= max(BYTES_PER_FILE, nbytes // MOST_FILES):
                    break
    names = [f"data-{number:05d}-of-{len(files):05d}.arrow" for number in range(len(files))]
    for file, name in zip(files, names, strict=True):
        file.rename(folder / name)
    state: dict[str, Any] = {
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
    }
    state |= {"_data_files": [{"filename": name} for name in names], "_fingerprint": digest.hexdigest(), "_split": None}
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True), encoding="utf-8")
    DatasetInfo(features=features).write_to_directory(str(folder))
    return written
