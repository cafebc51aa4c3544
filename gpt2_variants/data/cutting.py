"""Rows of text to rows of token ids, and those to blocks."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .arrow import count_tokens, flat_ids, row_lengths, rows_in_batch
from .names import DataError
from .sources import Source
from .tokenizers import encode, separator_id, train_tokenizer, vocabulary_size

if TYPE_CHECKING:
    import datasets
    import transformers


BYTES_PER_PROCESS = 8 << 20  # less text than this does not pay for starting a process


def tokenise_parts(
    dataset: str,
    source: Source,
    tokenizer: transformers.PreTrainedTokenizerBase | None,
    tokenizer_name: str,
    block_size: int,
    scratch: Path,
    num_proc: int | None,
) -> tuple[datasets.Dataset, datasets.Dataset, transformers.PreTrainedTokenizerBase]:
    """Tokenise both parts, after holding out the last rows where the source has one part only."""
    if source.validation is not None:
        trained = tokenizer or train_tokenizer(source.train)
        separator = separator_id(source.separator, trained, tokenizer_name)
        train, validation = (
            tokenise_rows(part, trained, tokenizer_name, scratch, num_proc, separator) if source.is_text else part
            for part in (source.train, source.validation)
        )
        fits = min(count_tokens(train), count_tokens(validation))
        if fits < block_size:
            raise _too_little(dataset, train, validation, block_size, fits)
        return train, validation, trained

    rows = source.train
    if len(rows) < 2:
        raise DataError(
            f"--dataset {dataset}: has {len(rows)} row (line), and whole rows are held out for validation; break the "
            "text into lines, or give a validation split"
        )
    held = first_held = max(1, round(source.held_out * len(rows)))
    while True:
        # Only their tokens tell whether these rows give a block; a tokenizer trained on the rest changes with them.
        trained = tokenizer or train_tokenizer(rows.select(range(len(rows) - held)))
        separator = separator_id(source.separator, trained, tokenizer_name)
        tokens = rows
        if source.is_text:
            tokens = tokenise_rows(rows, trained, tokenizer_name, scratch, num_proc, separator)
        reversed_totals = np.cumsum(row_lengths(tokens)[::-1])  # tokens in the last 1, 2, ... rows
        needed = int(np.searchsorted(reversed_totals, block_size)) + 1
        if needed <= held or needed >= len(rows):
            break
        held = needed
    validation = tokens.select(range(len(rows) - held, len(rows)))
    train = tokens.select(range(len(rows) - held))
    if needed > held or count_tokens(train) < block_size:
        ends = reversed_totals[first_held - 1 : -1]
        fits = int(np.minimum(ends, reversed_totals[-1] - ends).max())
        raise _too_little(dataset, train, validation, block_size, fits)
    return train, validation, trained


def _too_little(
    dataset: str, train: datasets.Dataset, validation: datasets.Dataset, block_size: int, fits: int
) -> DataError:
    cure = f"use --block_size {fits} or less, or give more text" if fits >= 2 else "give more text"
    return DataError(
        f"--dataset {dataset}: too little for a training and a validation block of {block_size}, with "
        f"{count_tokens(train):,} and {count_tokens(validation):,} tokens; {cure}"
    )


def tokenise_rows(
    rows: datasets.Dataset,
    tokenizer: transformers.PreTrainedTokenizerBase,
    tokenizer_name: str,
    scratch: Path,
    num_proc: int | None,
    separator: int | None = None,
) -> datasets.Dataset:
    """Rows of text to rows of ids below the tokenizer's `vocabulary_size`, row by row, in parallel where that pays.

    After each row that is not empty comes the id `separator`, if there is one.
    """
    from datasets import Features, List, Value

    vocab_size = vocabulary_size(tokenizer)

    def tokenise(batch: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
        texts = [text or "" for text in batch["text"]]  # JSON lines may lack the field
        rows = encode(tokenizer, tokenizer_name, texts)
        largest = max(map(max, filter(None, rows)), default=0)
        if largest >= vocab_size:
            raise DataError(
                f"--tokenizer {tokenizer_name}: gives the id {largest}, which none of its "
                f"tokens has (the largest is {vocab_size - 1}); give a tokenizer whose unk token is in its vocabulary"
            )
        if separator is not None:
            rows = [[*ids, separator] if ids else ids for ids in rows]
        return {"input_ids": rows}

    if num_proc is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_proc = min(cores, rows.data.nbytes // BYTES_PER_PROCESS)
    return rows.map(
        tokenise,
        batched=True,
        batch_size=rows_in_batch(rows),
        num_proc=num_proc if num_proc > 1 else None,
        remove_columns=rows.column_names,
        features=Features({"input_ids": List(Value("int32"))}),
        cache_file_name=str(Path(tempfile.mkdtemp(dir=scratch), "tokens.arrow")),
        new_fingerprint="tokens",  # spares hashing the tokenizer; the file is read by this build alone
        desc="Tokenising",
    )


def cut_blocks(
    tokens: datasets.Dataset, block_size: int, vocab_size: int, rows_per_batch: int | None, scratch: Path
) -> datasets.Dataset:
    """Concatenate rows and cut them into blocks of S ids, one row a block.

    With `rows_per_batch` this happens within consecutive batches of so many rows, counted from the first, and each
    batch's remainder is dropped. Otherwise the rows are one stream, and only the remainder at its very end is dropped.
    One process does this in order, whatever tokenised the rows: sharding would move the batches' boundaries.
    """
    import pyarrow as pa
    from datasets import Features, List, Value

    dtype = "uint16" if vocab_size <= 2**16 else "int32"
    carried = np.empty(0, dtype)

    def cut(table: pa.Table) -> pa.Table:
        nonlocal carried
        ids = np.concatenate([carried, flat_ids(table).astype(dtype)])
        whole = len(ids) // block_size * block_size
        if rows_per_batch is None:
            carried = ids[whole:].copy()
        return pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids[:whole]), block_size)})

    blocks = tokens.with_format("arrow").map(
        cut,
        batched=True,
        batch_size=rows_per_batch or rows_in_batch(tokens),
        remove_columns=tokens.column_names,
        features=Features({"input_ids": List(Value(dtype), length=block_size)}),
        cache_file_name=str(Path(tempfile.mkdtemp(dir=scratch), "blocks.arrow")),
        new_fingerprint="blocks",
        desc="Cutting into blocks",
    )
    return blocks.with_format(None)


def check_tokens(
    dataset: str,
    source: Source,
    tokenizer_name: str,
    tokenizer: transformers.PreTrainedTokenizerBase | None,
) -> None:
    """Refuse token ids that the tokenizer cannot have made."""
    if tokenizer is None:
        raise DataError(
            f"--tokenizer builtin: is trained on text, but --dataset {dataset} holds token ids already; give the "
            "--tokenizer that made them"
        )
    vocab_size = vocabulary_size(tokenizer)
    largest = smallest = 0
    for part in source.parts:
        for table in part.with_format("arrow").iter(batch_size=rows_in_batch(part)):
            if table["input_ids"].combine_chunks().flatten().null_count:
                raise DataError(f"--dataset {dataset}: holds null among its token ids; make it again without")
            ids = flat_ids(table)
            # As Python's integers: numpy compares an int64 with a uint64 as floats.
            largest, smallest = max(largest, int(ids.max(initial=0))), min(smallest, int(ids.min(initial=0)))
    if largest >= vocab_size or smallest < 0:
        wrong = largest if largest >= vocab_size else smallest
        raise DataError(
            f"--tokenizer {tokenizer_name}: has {vocab_size} entries, but --dataset {dataset} holds the token id "
            f"{wrong}; give the --tokenizer that made these ids"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Show the progress of `datasets` on a terminal only, and let each process tokenise with one thread."""
    import datasets

    environment, parallelism = os.environ, os.environ.get("TOKENIZERS_PARALLELISM")
    bars_shown = not datasets.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism; threads in each would compete
    try:
        yield
    finally:
        if bars_shown:
            datasets.enable_progress_bars()
        # `Dataset.map` leaves a copy in its place: changes undone in the one would stay in the other
        os.environ = environment  # noqa: B003
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if parallelism is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = parallelism
