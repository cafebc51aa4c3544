"""Prepared data: made once, then memory-mapped."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..words import counted
from .arrow import flat_ids, read_tables
from .blocks import BlockDataset, unigram_perplexity
from .checks import local_faults
from .cutting import check_tokens, cut_blocks, quiet, tokenise_parts, tokenise_rows
from .disks import disk_named
from .identities import dataset_identity, tokenizer_identity
from .names import DataError, brief, default_cache
from .pieces import KilledError
from .reading import HELD_OUT, NO_SEPARATOR, Reading
from .sources import WIKITEXT_ROWS_PER_BATCH, Source, file_notes, held_out_by_characters, read_source
from .tokenizers import (
    line_note,
    open_tokenizer,
    separator_id,
    vocabulary_digest,
    vocabulary_size,
)
from .verified import fault_of, is_known_whole, put_in_place, read_info, write_info

if TYPE_CHECKING:
    import transformers


FORMAT = 3
"""Version of the prepared data; raise it whenever the same source would give other blocks."""


@dataclass(frozen=True)
class Data:
    """A source, tokenised and cut into blocks.

    Attributes:
        train: blocks to train on.
        validation: blocks never trained on.
        tokenizer: what turned text into ids.
        vocab_size: `vocabulary_size(tokenizer)`; every id is below it.
        fingerprint: hex digest of the training blocks, in order, and the vocabulary. Equal content gives equal
            fingerprints on every machine and by every path to it; resuming with another one would train on other
            data.
        unigram_perplexity: that of `blocks.unigram_perplexity`.
        summary: one line on the kind of source, its validation part, rows, tokens and blocks; it names no path.
        description: the summary with the names of source and tokenizer, for logs.
        notes: what is to be known of the reading: the files that were read and that were not, the column taken.
    """

    train: BlockDataset
    validation: BlockDataset
    tokenizer: transformers.PreTrainedTokenizerBase
    vocab_size: int
    fingerprint: str
    unigram_perplexity: float
    summary: str
    description: str
    notes: tuple[str, ...] = ()


def load(
    dataset: str,
    tokenizer: str,
    block_size: int,
    *,
    reading: Reading | None = None,
    cache_dir: Path | None = None,
    num_proc: int | None = None,
) -> Data:
    """Tokenise a source and cut it into blocks, or open what an earlier call prepared.

    Any number of processes may call this at once: one prepares while the others wait for its lock. Rows are
    concatenated; after each document of a row-wise source stands the tokenizer's end-of-text, of lines nothing. A
    source with a `validation` (or else `test`) split is evaluated on that; of others the last 5 % of rows are held out,
    or more where those give no whole block.

    What came from the Hub is prepared once and then no longer looked up there: delete its folder in the cache to get a
    newer version. The words `builtin` and `wikitext-103` win over files of that name; write `./builtin` for those.

    Args:
        dataset: `wikitext-103`, `builtin`, a local file or folder, or a Hub id, `id` or `id:config`.
        tokenizer: `builtin` (a byte-level BPE of up to 4,000 entries, trained on the training part), a folder or a
            Hub id.
        block_size: S, tokens per block, at least 2.
        reading: how the source is to be read, beyond what it says itself.
        cache_dir: where prepared data live; default $GPT2_VARIANTS_CACHE, else ~/.cache/gpt2_variants.
        num_proc: processes to tokenise with; by default as many as there are cores and the amount of text pays for.

    Raises:
        DataError: with one line a fault, if the source or tokenizer cannot be had, do not fit together, or give no
            block.
    """
    reading = reading or Reading()
    if faults := local_faults(dataset, tokenizer, reading):
        raise DataError("\n".join(faults))
    if block_size < 2:
        raise DataError(f"--block_size {block_size}: a block needs at least 2 tokens, one to read and one to predict")
    identity = {
        "format": FORMAT,
        "dataset": dataset_identity(dataset, cache_dir),
        "tokenizer": tokenizer_identity(tokenizer),
        "block_size": block_size,
        "held_out": HELD_OUT,
        **({"reading": asked} if (asked := reading.identity()) else {}),
    }
    if reading.validation_dataset is not None:
        identity["reading"] |= {"validation_dataset": dataset_identity(reading.validation_dataset, cache_dir)}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    cache = Path(cache_dir or default_cache())
    prepared = cache / key
    if not is_known_whole(prepared, cache):

        def prepare() -> None:
            _prepare(prepared, dataset, tokenizer, block_size, num_proc, reading)

        _make_whole(prepared, prepare, block_size)
    return _open(prepared, dataset, tokenizer)


def _make_whole(prepared: Path, prepare: Callable[[], None], block_size: int) -> None:
    """Verify the folder `prepared`; where it is damaged or not there, make it by `prepare`. One process at a time.

    Raises:
        DataError: it is damaged, and the cache cannot be written.
    """
    from filelock import FileLock

    cache = prepared.parent
    lock = FileLock(cache / f"{prepared.name}.lock")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        why = fault_of(prepared, cache)
        if why is None:
            return  # a cache to read from only
        damaged = f"the prepared data in it are damaged ({why}), and " if prepared.exists() else ""
        raise DataError(
            f"the cache of prepared data, {cache}: {damaged}it cannot be written ({brief(error)}); set "
            "GPT2_VARIANTS_CACHE to a folder that can"
        ) from error
    try:
        why = fault_of(prepared, cache) or _fault_of_older(prepared, block_size)
        if why is None:  # another process may have been faster
            return
        if prepared.exists():
            print(f"{prepared}: the prepared data are damaged: {why}; they are prepared anew", file=sys.stderr)
        with disk_named(cache, "GPT2_VARIANTS_CACHE"):
            prepare()
    finally:
        lock.release()


def _fault_of_older(prepared: Path, block_size: int) -> str | None:
    """Say what is wrong with data of a version that kept no checksums, by their fingerprint; they get them then."""
    info = read_info(prepared)
    if "files" in info:
        return None
    try:
        tokenizer = open_tokenizer(str(prepared / "tokenizer"))
        whole = info["fingerprint"] == _fingerprint(prepared / "train", block_size, vocabulary_digest(tokenizer))
        for part in ("train", "validation"):
            _open_blocks(prepared / part)
    except Exception as error:  # whatever the libraries raise on a damaged file
        return brief(error)
    if not whole:
        return "the fingerprint of its blocks differs"
    with suppress(OSError):  # of a full disk: it is verified in the same way the next time
        write_info(prepared, info)
    return None


def load_tokens(
    dataset: str, tokenizer: str, block_size: int, split: str, reading: Reading | None = None
) -> np.ndarray:
    """Return a source as one stream of token ids, to evaluate on.

    Args:
        dataset: as for `load`.
        tokenizer: a folder or a Hub id.
        block_size: of the training run that `split` refers to.
        split: `validation` or `train`, the blocks `load` gives, one after the other; or `all`, every token of the
            source (its validation part last, where it has one of its own), which is not kept in the cache.
        reading: as for `load`.

    Returns:
        (number of tokens,) ids of an integer type.

    Raises:
        DataError: as for `load`.
    """
    if split != "all":
        return getattr(load(dataset, tokenizer, block_size, reading=reading), split).tokens()
    if faults := local_faults(dataset, tokenizer, reading):
        raise DataError("\n".join(faults))
    with disk_named(Path(tempfile.gettempdir()), "TMPDIR"), tempfile.TemporaryDirectory() as scratch, quiet():
        opened = open_tokenizer(tokenizer)
        source = read_source(dataset, opened, block_size, Path(scratch), reading)
        parts = source.parts
        if source.is_text:
            separator = separator_id(source.separator, opened, tokenizer)
            parts = [tokenise_rows(part, opened, tokenizer, Path(scratch), None, separator) for part in parts]
        else:
            check_tokens(dataset, source, tokenizer, opened)
        # int64: numpy would make floats of an int64 and a uint64 part
        return np.concatenate([flat_ids(part.with_format("arrow")[:]).astype(np.int64) for part in parts])


def _open_blocks(folder: Path) -> BlockDataset:
    from datasets import Dataset

    return BlockDataset(Dataset.load_from_disk(str(folder)))


def _open(prepared: Path, dataset: str, tokenizer_name: str) -> Data:
    info = read_info(prepared)
    tokenizer = open_tokenizer(str(prepared / "tokenizer"))
    vocab_size = vocabulary_size(tokenizer)
    return Data(
        train=_open_blocks(prepared / "train"),
        validation=_open_blocks(prepared / "validation"),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        fingerprint=info["fingerprint"],
        unigram_perplexity=info["unigram_perplexity"],
        summary=info["summary"],
        # The names are those of this call: the same content may have been prepared under others.
        description=f"{dataset}: {info['summary']}; tokenizer {tokenizer_name}, {vocab_size:,} entries",
        # Those on the files are of this call too: others of the same content may lie beside other files.
        notes=(*file_notes(dataset), *info["notes"]),
    )


def _fingerprint(folder: Path, block_size: int, vocabulary: str) -> str:
    digest = hashlib.sha256(f"{block_size} {vocabulary}".encode())
    for file in sorted(folder.glob("*.arrow")):
        for table in read_tables(file):
            digest.update(flat_ids(table).astype("<i4").tobytes())
    return digest.hexdigest()


def _prepare(
    prepared: Path, dataset: str, tokenizer_name: str, block_size: int, num_proc: int | None, reading: Reading
) -> None:
    """Build the folder `prepared`: aside, then moved, so that it is complete or absent. The caller holds its lock.

    Of a killed build the finished pieces of tokens are used; a failed one leaves nothing.
    """
    building = prepared.with_name(prepared.name + ".building")
    pieces, scratch = building / "pieces", building / "scratch"
    if fault_of(building, building.parent):
        _remove_all_but(pieces, building)
        scratch.mkdir(parents=True)
        is_kept = False
        try:
            info = _build(building, pieces, scratch, dataset, tokenizer_name, block_size, num_proc, reading)
            write_info(building, info)  # with it the build is complete, but for what is removed now
            is_kept = True
        except KilledError:
            is_kept = True
            _remove_all_but(pieces, building)
            raise
        finally:
            if not is_kept:
                shutil.rmtree(building, ignore_errors=True)
    for done in (pieces, scratch):
        shutil.rmtree(done, ignore_errors=True)
    put_in_place(building, prepared)


def _remove_all_but(pieces: Path, building: Path) -> None:
    """Remove what a killed build left, but for its whole pieces."""
    for leftover in (*building.glob("*"), *pieces.glob("*.aside")):
        if leftover.is_dir() and leftover != pieces:
            shutil.rmtree(leftover, ignore_errors=True)
        elif leftover != pieces:
            leftover.unlink(missing_ok=True)


def _build(
    building: Path,
    pieces: Path,
    scratch: Path,
    dataset: str,
    tokenizer_name: str,
    block_size: int,
    num_proc: int | None,
    reading: Reading,
) -> dict[str, Any]:
    """Write blocks and tokenizer into `building`; what info.json will say."""
    with quiet():
        tokenizer = None if tokenizer_name == "builtin" else open_tokenizer(tokenizer_name)
        source = held_out_by_characters(read_source(dataset, tokenizer, block_size, scratch, reading))
        if not source.is_text:
            check_tokens(dataset, source, tokenizer_name, tokenizer)
        train, validation, tokenizer = tokenise_parts(
            dataset, source, tokenizer, tokenizer_name, block_size, pieces, num_proc
        )

        vocab_size = vocabulary_size(tokenizer)
        counts = []
        for part, rows in (("train", train), ("validation", validation)):
            blocks, tokens = cut_blocks(rows, block_size, vocab_size, source.rows_per_batch, building / part)
            if not blocks:
                raise DataError(
                    f"--dataset {dataset}: no {WIKITEXT_ROWS_PER_BATCH:,} rows of its {part} part hold "
                    f"{block_size} tokens; choose a smaller --block_size"
                )
            counts.append(f"{part} {counted(len(rows), 'row')}, {counted(tokens, 'token')}, {counted(blocks, 'block')}")
        tokenizer.save_pretrained(str(building / "tokenizer"))
        train_blocks, validation_blocks = (_open_blocks(building / part) for part in ("train", "validation"))
        said = _said_of_text(source, tokenizer, tokenizer_name)
    read = ", ".join([source.origin, f"{source.validated_on} for validation", *said])
    return {
        "dataset": dataset,
        "tokenizer": tokenizer_name,
        "fingerprint": _fingerprint(building / "train", block_size, vocabulary_digest(tokenizer)),
        "summary": f"{read}; blocks of {block_size} tokens; {'; '.join(counts)}",
        "unigram_perplexity": unigram_perplexity(train_blocks, validation_blocks, vocab_size),
        "notes": [*source.notes, *said],
    }


def _said_of_text(source: Source, tokenizer: transformers.PreTrainedTokenizerBase, name: str) -> list[str]:
    """Return how the text is joined, where that is not as it stands in the source, in words."""
    if not source.is_text:
        return []
    if source.separator != NO_SEPARATOR:
        if separator_id(source.separator, tokenizer, name) is None:
            return ["no separator between documents, since the tokenizer has no end-of-text"]
        return [f"{source.separator} after each document"]
    note = line_note(tokenizer)
    return [note] if note else []
