"""File formats: by which suffix they go, how a file is checked, and how its rows are read.

Every format reads exactly the bytes of the file it is given, whatever its name looks like.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np

from .names import DataError

SAMPLE_BYTES = 64 * 1024
CHUNK_CHARACTERS = 4 << 20  # of text read at a time
ROWS_AT_ONCE = 1000
LLM_C_MAGIC: dict[int, Any] = {20240520: "<u2", 20240801: "<u4"}  # of the header of llm.c's token files, 1 KiB


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        kind: what a row is: a line of text ("lines"), an object with columns ("rows"), or token ids ("ids").
        read: (path, encoding) -> lists of rows: strings, dicts, or arrays of ids.
        is_binary: whether it is no text, and cannot be compressed from outside.
    """

    kind: str
    read: Callable[[Path, str | None], Iterator[list[Any]]]
    is_binary: bool = False


def open_text(path: Path, encoding: str | None) -> IO[str]:
    """Return a file's text, decompressed by its suffix, without a byte order mark, and with newlines as line ends."""
    opener = COMPRESSIONS.get(path.suffix.lower())
    stream = opener(path) if opener else path.open("rb")
    return io.TextIOWrapper(stream, encoding="utf-8-sig" if encoding is None else encoding)


def _open_zst(path: Path) -> Any:
    import zstandard  # type: ignore[import-not-found,unused-ignore]  # an extra that need not be there

    return io.BufferedReader(zstandard.open(path, "rb"))


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zst,
}


def _lines(path: Path, encoding: str | None) -> Iterator[list[str]]:
    with open_text(path, encoding) as text:
        while chunk := text.read(CHUNK_CHARACTERS):
            yield io.StringIO(chunk + text.readline()).readlines()


def _objects(path: Path, encoding: str | None) -> Iterator[list[Any]]:
    """Return the values of a file of JSON: one a line, or in an array, or one after the other over several lines."""
    with open_text(path, encoding) as text:
        first = next((line for line in text if line.strip()), "")
    try:
        by_lines = not first.lstrip().startswith("[") and json.loads(first) is not None
    except json.JSONDecodeError:
        by_lines = False
    yield from _in_lists(_json_lines(path, encoding) if by_lines else _json_values(path, encoding))


def _json_lines(path: Path, encoding: str | None) -> Iterator[Any]:
    with open_text(path, encoding) as text:
        for number, line in enumerate(text, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path.name}, line {number}: no JSON: {error.msg}") from None


def _json_values(path: Path, encoding: str | None) -> Iterator[Any]:
    with open_text(path, encoding) as text:
        content = text.read().strip()
    decoder, place = json.JSONDecoder(), 0
    while place < len(content):
        try:
            value, place = decoder.raw_decode(content, place)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name}, line {error.lineno}: no JSON: {error.msg}") from None
        yield from value if isinstance(value, list) else [value]
        while place < len(content) and (content[place].isspace() or content[place] == ","):
            place += 1


def _records(delimiter: str) -> Callable[[Path, str | None], Iterator[list[Any]]]:
    def read(path: Path, encoding: str | None) -> Iterator[list[Any]]:
        csv.field_size_limit(sys.maxsize)
        with open_text(path, encoding) as text:
            text.reconfigure(newline="")  # type: ignore[attr-defined]  # line ends within quotes are the csv module's
            rows = csv.DictReader(text, delimiter=delimiter, strict=True)
            yield from _in_lists(_without_surplus(path, rows))

    return read


def _without_surplus(path: Path, rows: csv.DictReader) -> Iterator[dict[str, Any]]:
    for row in rows:
        if None in row:
            raise ValueError(f"{path.name}, line {rows.line_num}: has more fields than the header")
        yield row


def _parquet(path: Path, _: str | None) -> Iterator[list[Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
            yield batch.to_pylist()


def _npy(path: Path, _: str | None) -> Iterator[list[np.ndarray]]:
    ids = np.load(path, mmap_mode="r", allow_pickle=False)
    if ids.dtype.kind not in "iu":
        raise ValueError(f"{path.name} holds {ids.dtype}, and token ids are integers")
    yield from _in_pieces(ids.reshape(-1))


def _bin(path: Path, _: str | None) -> Iterator[list[np.ndarray]]:
    """Read nanoGPT's uint16 without a header, or llm.c's with one, which tells the number of ids and their size."""
    ids: Any
    head = np.fromfile(path, dtype="<i4", count=3)
    if len(head) == 3 and int(head[0]) in LLM_C_MAGIC:
        ids = np.memmap(path, dtype=LLM_C_MAGIC[int(head[0])], mode="r", offset=1024)
        if len(ids) != head[2]:
            raise ValueError(f"{path.name} holds {len(ids):,} ids, and its header says {head[2]:,}")
    else:
        ids = np.memmap(path, dtype="<u2", mode="r")
    yield from _in_pieces(ids)


def _in_pieces(ids: np.ndarray) -> Iterator[list[np.ndarray]]:
    for start in range(0, len(ids), CHUNK_CHARACTERS):
        yield [np.asarray(ids[start : start + CHUNK_CHARACTERS])]


def _in_lists(rows: Iterator[Any]) -> Iterator[list[Any]]:
    held: list[Any] = []
    for row in rows:
        held.append(row)
        if len(held) == ROWS_AT_ONCE:
            yield held
            held = []
    if held:
        yield held


_TEXT, _JSON = Format("lines", _lines), Format("rows", _objects)
FORMATS: dict[str, Format] = {
    **dict.fromkeys((".txt", ".text", ".tokens", ".raw"), _TEXT),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), _JSON),
    ".csv": Format("rows", _records(",")),
    ".tsv": Format("rows", _records("\t")),
    ".parquet": Format("rows", _parquet, is_binary=True),
    ".npy": Format("ids", _npy, is_binary=True),
    ".bin": Format("ids", _bin, is_binary=True),
}
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".npy", ".bin")  # those that messages name


def suffix_of(path: Path) -> str:
    """Return the suffix that tells a file's kind, with that of its compression: `.jsonl.gz`."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() + suffix if suffix in COMPRESSIONS else suffix


def format_of(path: Path) -> Format | None:
    """Return the format of a file by its name; None if it is none that is read."""
    suffix, compression = suffix_of(path), path.suffix.lower()
    if compression in COMPRESSIONS:
        inner = FORMATS.get(suffix.removesuffix(compression))
        return inner if inner is not None and not inner.is_binary else None
    return FORMATS.get(suffix)


def content_fault(file: Path, encoding: str | None) -> str | None:
    """Tell whether a file plainly is not what its suffix says, from samples of its beginning, middle and end."""
    suffix = file.suffix.lower()
    if suffix in COMPRESSIONS:
        if suffix == ".zst" and find_spec("zstandard") is None:
            return "zstandard is not installed; pip install zstandard, or decompress it"
        return None
    size = file.stat().st_size
    found = format_of(file)
    with file.open("rb") as stream:
        if suffix == ".parquet":
            head = stream.read(4)
            stream.seek(max(0, size - 4))
            whole = size == 0 or head == stream.read() == b"PAR1"
            return None if whole else "not a whole Parquet file (PAR1 mark missing); write it again or give another"
        if encoding is not None or (found is not None and found.is_binary):
            return None
        for start in sorted({0, max(0, size // 2), max(0, size - SAMPLE_BYTES)}):
            stream.seek(start)
            sample = stream.read(SAMPLE_BYTES)
            if start == 0 and sample.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return "UTF-16, by its first bytes; give --encoding utf-16"
            if (nul := sample.find(b"\0")) >= 0:
                return f"binary, not text (NUL byte at offset {start + nul}); give UTF-8 text, or its --encoding"
            # A window may begin within a character (at most 3 continuation bytes) and end within one (final=False).
            skipped = next((i for i in range(min(4, len(sample))) if sample[i] & 0xC0 != 0x80), 0) if start else 0
            try:
                codecs.getincrementaldecoder("utf-8")().decode(sample[skipped:], final=start + len(sample) == size)
            except UnicodeDecodeError as error:
                at = start + skipped + error.start
                return f"not UTF-8 (byte {at}); give its --encoding, such as latin-1, or convert it with iconv"
    return None


def rows_of(path: Path, encoding: str | None) -> Iterator[list[Any]]:
    """Give a file's rows in lists, as its format reads them. Raises what that raises; `DataError` for no format."""
    found = format_of(path)
    if found is None:
        raise DataError(f"{path}: is of no kind that is read")
    return found.read(path, encoding)
