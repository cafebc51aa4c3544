"""Text is tokenised in pieces, each kept in a file of its own: a build that is killed goes on after the last of them.

A file's name begins with the digest of all that decides what is in it: the text itself, its place among the rows, the
tokenizer and the libraries' versions. So no piece of another text or tokenizer is ever taken for it. It ends with the
digest of its content, so that a damaged one is not taken either.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from . import arrow
from .arrow import Tokens, read_tables
from .digests import file_digest
from .names import DataError, brief
from .progress import Progress

if TYPE_CHECKING:
    import datasets
    import transformers

BYTES_PER_PIECE = 4 << 20  # of text, at least: so that several processes have enough of them to share
MOST_PIECES = 256  # about, of a part: `Tokens.dataset` has all their files open at once
BYTES_PER_PROCESS = 8 << 20  # less text than this does not pay for starting a process
BYTES_IN_THIS_PROCESS = 64 << 20  # more text than this would stay in this process's resident set


class KilledError(DataError):
    """A process that tokenised was killed; the finished pieces can be gone on from."""


@dataclass(frozen=True)
class _Work:
    rows: datasets.Dataset  # of text
    tokenise: Callable[[list[str | None]], list[list[int]]]
    identity: str
    folder: Path

    def write(self, start: int, stop: int) -> tuple[str, bool]:
        """Tokenise rows into a file of the folder, unless it is there; its name, and whether it was not there."""
        import pyarrow as pa
        import xxhash
        from datasets import Features, List, Value

        digest = xxhash.xxh3_128(f"{self.identity} {start} {stop} ".encode())
        rows = self.rows.select(range(start, stop))
        batches = [range(first, end) for first, end, _ in row_ranges(rows, arrow.BYTES_PER_BATCH, arrow.ROWS_PER_BATCH)]
        rows = rows.with_format("arrow")
        for batch in batches:
            _add_rows(digest, rows[batch]["text"])
        for file in sorted(self.folder.glob(f"{digest.hexdigest()}-*.arrow")):
            if file.stem.endswith(f"-{file_digest(file)}") and _is_whole(file, stop - start):
                return file.name, False
            file.unlink(missing_ok=True)  # damaged since it was written
        kind = pa.list_(pa.int32())
        schema = Features({"input_ids": List(Value("int32"))}).arrow_schema
        handle, aside = tempfile.mkstemp(suffix=".aside", dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as stream:
                with pa.ipc.new_stream(stream, schema) as writer:
                    for batch in batches:
                        ids = self.tokenise(rows[batch]["text"].to_pylist())
                        writer.write_batch(pa.record_batch([pa.array(ids, kind)], schema=schema))
                stream.flush()
                os.fsync(stream.fileno())  # so that not even a power cut leaves the name without the content
            file = self.folder / f"{digest.hexdigest()}-{file_digest(Path(aside))}.arrow"
            os.replace(aside, file)
        finally:
            Path(aside).unlink(missing_ok=True)
        return file.name, True


def tokenise_pieces(
    rows: datasets.Dataset,
    tokenise: Callable[[list[str | None]], list[list[int]]],
    identity: str,
    folder: Path,
    num_proc: int | None,
) -> Tokens:
    """Tokenise rows of text piece by piece, each in a process of its own where there is much text.

    Args:
        rows: with the column `text`, of strings or null.
        tokenise: gives the ids of each text, within int32.
        identity: of `tokenise`: equal ones give equal ids of equal texts.
        folder: where the pieces are kept, for this call alone meanwhile; those of an earlier call are used.
        num_proc: processes at a time; by default as many as there are cores and the amount of text pays for.

    Raises:
        KilledError: one of the processes was killed.
        DataError: whatever `tokenise` raises, too.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    size = rows.data.nbytes
    if num_proc is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_proc = min(cores, size // BYTES_PER_PROCESS)
    work = _Work(rows, tokenise, identity, folder)
    # Elsewhere every process would have to import all libraries again, which takes longer than a small piece.
    can_fork = sys.platform == "linux"
    in_processes = can_fork and (num_proc > 1 or size > BYTES_IN_THIS_PROCESS)

    def divide() -> list[tuple[int, int, int]]:
        return list(row_ranges(rows, max(BYTES_PER_PIECE, size // MOST_PIECES)))

    ((_, ranges),) = _in_processes([divide], 1) if in_processes else [(0, divide())]
    calls: list[Callable[[], Any]] = [partial(work.write, start, stop) for start, stop, _ in ranges]
    results = _in_processes(calls, max(1, num_proc)) if in_processes else ((i, call()) for i, call in enumerate(calls))
    progress = Progress("tokenising", sum(nbytes for _, _, nbytes in ranges))
    files = [folder] * len(ranges)
    try:
        for number, (name, is_new) in results:
            files[number] = folder / name
            progress.add(ranges[number][2], is_new)
    finally:
        results.close()  # ends the processes, where one failed
        for half in folder.glob("*.aside"):  # of those that were ended on the way
            half.unlink()
        progress.close()
    return Tokens([(file, stop - start) for file, (start, stop, _) in zip(files, ranges, strict=True)])


def tokenizer_digest(tokenizer: transformers.PreTrainedTokenizerBase) -> str:
    """Return a digest of all that a tokenizer is made of, and of the versions of the libraries that run it."""
    import tokenizers
    import transformers
    import xxhash

    digest = xxhash.xxh3_128(f"{tokenizers.__version__} {transformers.__version__} {type(tokenizer)}".encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                content = file.read_bytes()
                digest.update(f"{file.name} {len(content)} ".encode())
                digest.update(content)
    return digest.hexdigest()


def row_ranges(rows: datasets.Dataset, most_bytes: int, most_rows: int | None = None) -> Iterator[tuple[int, int, int]]:
    """Divide rows of text: give (first row, row after the last, bytes), each of about `most_bytes`.

    A range ends with the row that fills it up. With `most_rows` it has at most so many. Only the rows' lengths are
    read.
    """
    import pyarrow.compute as pc

    start = row = before = total = 0  # before: the bytes of the rows before `start`
    for table in rows.with_format("arrow").iter(batch_size=most_rows or arrow.ROWS_PER_BATCH):
        ends = total + np.cumsum(pc.fill_null(pc.binary_length(table["text"]), 0).to_numpy(), dtype=np.int64)
        while (full := int(np.searchsorted(ends, before + most_bytes))) < len(ends):
            yield start, row + full + 1, int(ends[full]) - before
            start, before = row + full + 1, int(ends[full])
        row, total = row + len(ends), int(ends[-1])
        if most_rows and start < row:
            yield start, row, total - before
            start, before = row, total
    if start < row:
        yield start, row, total - before


def _add_rows(digest: Any, column: Any) -> None:
    """Feed a digest with a column of strings: their lengths, -1 for null, and their bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # The cast gives every kind of string column one layout; it copies offsets only.
    for chunk in column.cast(pa.large_string()).chunks:
        digest.update(pc.fill_null(pc.binary_length(chunk), -1).to_numpy().tobytes())
        _, offsets, content = chunk.buffers()
        if content is not None:
            ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            digest.update(memoryview(content)[ends[0] : ends[-1]])


def _is_whole(file: Path, rows: int) -> bool:
    import pyarrow as pa

    try:
        return sum(len(table) for table in read_tables(file)) == rows
    except (OSError, pa.ArrowException):
        return False


def _in_processes(calls: list[Callable[[], Any]], most: int) -> Generator[tuple[int, Any], None, None]:
    """Call each in a process of its own, at most so many at a time: (number, answer), in the order they come in.

    What a process has mapped and allocated goes with it. One whose parent is killed ends after its call.
    """
    context = multiprocessing.get_context("fork")
    waiting = iter(enumerate(calls))
    running: dict[Connection, tuple[int, Any]] = {}
    try:
        while True:
            while len(running) < most and (following := next(waiting, None)) is not None:
                number, call = following
                mine, sender = context.Pipe(duplex=False)
                process = context.Process(target=_answer, args=(call, sender), daemon=True)
                process.start()
                sender.close()  # the process has its own: when that closes, the receiver's end is reached
                running[mine] = (number, process)
            if not running:
                return
            for receiver in cast(list[Connection], wait(list(running))):
                number, process = running[receiver]
                try:
                    answer = receiver.recv()
                except EOFError:
                    process.join()
                    raise KilledError(
                        f"tokenising: one of its processes was killed (exit code {process.exitcode}), for want of "
                        "memory perhaps; give the same command again, it goes on after what is done"
                    ) from None
                process.join()
                receiver.close()
                del running[receiver]
                if isinstance(answer, BaseException):
                    raise answer
                yield number, answer
    finally:
        for mine, (_, process) in running.items():
            process.terminate()
            process.join()
            mine.close()


def _answer(call: Callable[[], Any], sender: Connection) -> None:
    """Call and send what came of it, an exception too."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a training process has its own handlers,
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # and it alone says what Ctrl-C ends
    answer: Any
    try:
        answer = call()
    except Exception as error:  # whatever it is, the parent raises it
        answer = error
    with suppress(OSError):  # the parent may be gone
        try:
            sender.send(answer)
        except OSError:
            raise
        except Exception:  # it cannot be pickled
            sender.send(RuntimeError(brief(answer)))
