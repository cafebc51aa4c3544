"""Rows of text to rows of token ids, and those to blocks."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..words import counted
from .arrow import Tokens, count_tokens, flat_ids, row_lengths, rows_in_batch, write_blocks
from .names import DataError
from .pieces import tokenise_pieces, tokenizer_digest
from .sources import Source
from .tokenizers import encode, separator_id, train_tokenizer, vocabulary_size

if TYPE_CHECKING:
    import datasets
    import transformers


Tokenise = Callable[[list[str | None]], list[list[int]]]  # texts to the ids of each


def tokenise_parts(
    dataset: str,
    source: Source,
    tokenizer: transformers.PreTrainedTokenizerBase | None,
    tokenizer_name: str,
    block_size: int,
    folder: Path,
    num_proc: int | None,
) -> tuple[Tokens, Tokens, transformers.PreTrainedTokenizerBase]:
    """Tokenise both parts, after holding out the last rows where the source has one part only.

    Text is tokenised in pieces that are kept in `folder`; those of an earlier call are used.
    """

    def tokenise_with(trained: transformers.PreTrainedTokenizerBase) -> Tokenise | None:
        if not source.is_text:
            return None
        return _tokenise(trained, tokenizer_name, separator_id(source.separator, trained, tokenizer_name))

    def ids_of(part: datasets.Dataset, trained: transformers.PreTrainedTokenizerBase) -> Tokens:
        tokenise = tokenise_with(trained)
        if tokenise is None:
            return Tokens([(part, len(part))])
        identity = f"{tokenizer_digest(trained)} {source.separator}"
        return tokenise_pieces(part, tokenise, identity, folder, num_proc)

    if source.validation is not None:
        trained = tokenizer or train_tokenizer(source.train)
        train, validation = (ids_of(part, trained) for part in (source.train, source.validation))
        if min(count_tokens(part, enough=block_size) for part in (train, validation)) < block_size:
            fits = min(count_tokens(train), count_tokens(validation))
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
        needed = _last_rows(rows, tokenise_with(trained), block_size)
        if needed <= held or needed >= len(rows):
            break
        held = needed
    tokens = ids_of(rows, trained)
    train, validation = tokens.select(0, len(rows) - held), tokens.select(len(rows) - held, len(rows))
    if needed > held or count_tokens(train, enough=block_size) < block_size:
        # The tokens in the last 1, 2, ... rows: there are few.
        reversed_totals = np.cumsum(np.concatenate([row_lengths(table) for table in tokens.tables()])[::-1])
        ends = reversed_totals[first_held - 1 : -1]
        fits = int(np.minimum(ends, reversed_totals[-1] - ends).max())
        raise _too_little(dataset, train, validation, block_size, fits)
    return train, validation, trained


def _last_rows(rows: datasets.Dataset, tokenise: Tokenise | None, block_size: int) -> int:
    """Return how many of the last rows hold a block; one more than there are if all of them do not.

    Reads, and tokenises where `tokenise` is given, as few rows as tell it.
    """
    total, stop, size = 0, len(rows), 1
    while stop:
        start = max(0, stop - size)
        table = rows.select(range(start, stop)).with_format("arrow")[:]
        lengths = [len(ids) for ids in tokenise(table["text"].to_pylist())] if tokenise else row_lengths(table)
        totals = total + np.cumsum(lengths[::-1])
        if totals[-1] >= block_size:
            return len(rows) - stop + int(np.searchsorted(totals, block_size)) + 1
        total, stop, size = int(totals[-1]), start, min(2 * size, rows_in_batch(rows))
    return len(rows) + 1


def _too_little(dataset: str, train: Tokens, validation: Tokens, block_size: int, fits: int) -> DataError:
    cure = f"use --block_size {fits} or less, or give more text" if fits >= 2 else "give more text"
    return DataError(
        f"--dataset {dataset}: too little for a training and a validation block of {block_size}, with "
        f"{count_tokens(train):,} and {counted(count_tokens(validation), 'token')}; {cure}"
    )


def tokenise_rows(
    rows: datasets.Dataset,
    tokenizer: transformers.PreTrainedTokenizerBase,
    tokenizer_name: str,
    scratch: Path,
    num_proc: int | None,
    separator: int | None = None,
) -> datasets.Dataset:
    """Turn rows of text into rows of ids below the tokenizer's `vocabulary_size`, in parallel where that pays.

    After each row that is not empty comes the id `separator`, if there is one.
    """
    folder = Path(tempfile.mkdtemp(dir=scratch))  # new, so that no other tokenizer's ids are there
    return tokenise_pieces(rows, _tokenise(tokenizer, tokenizer_name, separator), "", folder, num_proc).dataset()


def _tokenise(
    tokenizer: transformers.PreTrainedTokenizerBase, tokenizer_name: str, separator: int | None = None
) -> Tokenise:
    vocab_size = vocabulary_size(tokenizer)

    def tokenise(texts: list[str | None]) -> list[list[int]]:
        rows = encode(tokenizer, tokenizer_name, [text or "" for text in texts])  # JSON lines may lack the field
        largest = max(map(max, filter(None, rows)), default=0)
        if largest >= vocab_size:
            raise DataError(
                f"--tokenizer {tokenizer_name}: gives the id {largest}, which none of its "
                f"tokens has (the largest is {vocab_size - 1}); give a tokenizer whose unk token is in its vocabulary"
            )
        if separator is not None:
            rows = [[*ids, separator] if ids else ids for ids in rows]
        return rows

    return tokenise


def cut_blocks(
    tokens: Tokens, block_size: int, vocab_size: int, rows_per_batch: int | None, folder: Path
) -> tuple[int, int]:
    """Concatenate rows, cut them into blocks of S ids and write these into `folder`, one row a block.

    With `rows_per_batch` this happens within consecutive batches of so many rows, counted from the first, and each
    batch's remainder is dropped. Otherwise the rows are one stream, and only the remainder at its very end is dropped.
    One process does this in order, whatever tokenised the rows: sharding would move the batches' boundaries.

    Returns:
        The number of blocks, and that of the rows' tokens.
    """
    dtype = "uint16" if vocab_size <= 2**16 else "int32"
    count = 0

    def blocks() -> Iterator[np.ndarray]:
        nonlocal count
        carried, row = np.empty(0, dtype), 0
        for table in tokens.tables():
            while len(table):
                left = rows_per_batch - row % rows_per_batch if rows_per_batch else len(table)
                ids = flat_ids(table[:left]).astype(dtype)
                count += len(ids)
                row += len(table[:left])
                table = table[left:]
                ids = np.concatenate([carried, ids])
                whole = len(ids) // block_size * block_size
                carried = ids[whole:].copy()
                if rows_per_batch and row % rows_per_batch == 0:
                    carried = np.empty(0, dtype)
                if whole:
                    yield ids[:whole]

    return write_blocks(blocks(), tokens.nbytes, block_size, dtype, folder), count


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
