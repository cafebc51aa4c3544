"""Token ids in Arrow tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets


BYTES_PER_BATCH = 4 << 20  # of rows handed to the tokenizer, or cut into blocks, at a time


def flat_ids(table: Any) -> np.ndarray:
    """The ids of an Arrow table's column `input_ids`, all rows one after the other, shape (tokens,)."""
    return table["input_ids"].combine_chunks().flatten().to_numpy(zero_copy_only=False)


def row_lengths(tokens: datasets.Dataset) -> np.ndarray:
    """Return the number of ids in each row, int64, shape (rows,)."""
    import pyarrow.compute as pc

    column = tokens.with_format("arrow")[:]["input_ids"]
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)


def count_tokens(tokens: datasets.Dataset) -> int:
    """Return the number of ids in all rows."""
    return int(row_lengths(tokens).sum())


def rows_in_batch(rows: datasets.Dataset) -> int:
    """As many rows as make a few megabytes: a row may be a line or a book."""
    bytes_per_row = rows.data.nbytes / max(1, rows.data.num_rows)
    return int(np.clip(BYTES_PER_BATCH / max(1.0, bytes_per_row), 1, 10_000))
