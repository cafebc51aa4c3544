"""Local files: which of them are read, in which split, and how."""

from __future__ import annotations

import codecs
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .. import network
from .names import FILE_KINDS, LEGAL_DATASETS, DataError, brief, is_saved_folder

if TYPE_CHECKING:
    import datasets


SPLIT_NAMES = {name: name for name in ("train", "validation", "test")}
SPLIT_NAMES |= dict.fromkeys(("valid", "val", "dev"), "validation")
SAMPLE_BYTES = 64 * 1024


def data_files(path: Path) -> list[Path]:
    """The readable files under `path` (itself, if it is a file), sorted by their path; hidden ones are left out."""
    if path.is_file():
        return [path]
    found = (file for file in path.rglob("*") if file.suffix.lower() in FILE_KINDS and file.is_file())
    visible = (file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))
    return sorted(visible, key=lambda file: file.relative_to(path).as_posix())


def content_fault(file: Path) -> str | None:
    """Tell whether a file plainly is not what its suffix says, from samples of its beginning, middle and end."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if file.suffix.lower() == ".parquet":
            head = stream.read(4)
            stream.seek(max(0, size - 4))
            whole = size == 0 or head == stream.read() == b"PAR1"
            return None if whole else "not a whole Parquet file (PAR1 mark missing); write it again or give another"
        for start in sorted({0, max(0, size // 2), max(0, size - SAMPLE_BYTES)}):
            stream.seek(start)
            sample = stream.read(SAMPLE_BYTES)
            if (nul := sample.find(b"\0")) >= 0:
                return f"binary, not text (NUL byte at offset {start + nul}); give UTF-8 text"
            # A window may begin within a character (at most 3 continuation bytes) and end within one (final=False).
            skipped = next((i for i in range(min(4, len(sample))) if sample[i] & 0xC0 != 0x80), 0) if start else 0
            try:
                codecs.getincrementaldecoder("utf-8")().decode(sample[skipped:], final=start + len(sample) == size)
            except UnicodeDecodeError as error:
                return f"not UTF-8 (byte {start + skipped + error.start}); convert it, e.g. `iconv -f latin1 -t utf-8`"
    return None


def _files_by_split(path: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Group the files of a folder by the split that their name, or a folder's above them, begins with.

    Names count only where one of them says train, as in `train-00000.parquet` or `train/a.txt`: nobody means to train
    on the `test.txt` beside a `train.txt`. Otherwise all files are the train split. The key "" holds files of no
    split.
    """
    splits: dict[str, list[Path]] = {}
    for file in files:
        parts = file.relative_to(path).parts if file != path else ()
        words = (re.split(r"[^a-z]", part.lower(), maxsplit=1)[0] for part in parts)
        split = next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "")
        splits.setdefault(split, []).append(file)
    return splits if "train" in splits else {"train": files}


def split_fault(path: Path, files: list[Path]) -> str | None:
    """Say which file of a folder belongs to no split, where others are named after one; None if there is none."""
    stray = _files_by_split(path, files).get("")
    if not stray:
        return None
    return (
        f"some files are named train, but {stray[0].relative_to(path)} is named neither train, validation nor test; "
        "rename it after its split or move it away"
    )


def read_local(dataset: str, path: Path, scratch: Path) -> dict[str, datasets.Dataset]:
    """Read a file, a folder of files, or one saved by `datasets`: split -> rows.

    Raises:
        DataError: it cannot be read.
    """
    import datasets

    try:
        with network.offline(True):
            if is_saved_folder(path):
                saved = datasets.load_from_disk(str(path))
                return saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            by_split = _files_by_split(path, data_files(path))
            return {split: _read_files(dataset, files, scratch) for split, files in by_split.items()}
    except DataError:
        raise
    except Exception as error:  # the readers wrap Arrow's, pandas' and Unicode errors in various ways
        reason = brief(error.__cause__ or error)
        raise DataError(f"--dataset {dataset}: cannot be read ({reason}); {LEGAL_DATASETS}") from error


def _read_files(dataset: str, files: list[Path], scratch: Path) -> datasets.Dataset:
    """Read files in their order, runs of the same kind together."""
    from datasets import Dataset, concatenate_datasets

    rows = []
    filled = (file for file in files if file.stat().st_size)
    for kind, run in itertools.groupby(filled, key=lambda file: FILE_KINDS[file.suffix.lower()]):
        paths = [str(file) for file in run]
        if kind == "text":
            part = Dataset.from_text(paths, cache_dir=str(scratch), keep_linebreaks=True)
        elif kind == "json":
            part = Dataset.from_json(paths, cache_dir=str(scratch))
        else:
            part = Dataset.from_parquet(paths, cache_dir=str(scratch))
        rows.append(one_column(dataset, part))
    if len({tuple(part.column_names) for part in rows}) > 1:
        raise DataError(f"--dataset {dataset}: some files hold text, others token ids; give one kind only")
    return concatenate_datasets(rows)


def one_column(dataset: str, rows: datasets.Dataset) -> datasets.Dataset:
    """Keep the column to train on, named `text` or `input_ids`. Text is preferred: it fits every tokenizer."""
    from datasets import LargeList, List, Value

    kinds = rows.features
    strings = [name for name, kind in kinds.items() if getattr(kind, "dtype", None) in ("string", "large_string")]
    ids = kinds.get("input_ids")
    if "text" in strings:
        column = "text"
    elif isinstance(ids, (List, LargeList)) and isinstance(ids.feature, Value) and "int" in ids.feature.dtype:
        return rows.select_columns(["input_ids"])
    elif len(strings) == 1:
        column = strings[0]
    else:
        raise DataError(
            f"--dataset {dataset}: it is not clear which of the columns {', '.join(kinds)} to train on; give a column "
            "`text`, a single column of strings, or `input_ids` (lists of token ids)"
        )
    rows = rows.select_columns([column]).rename_columns({column: "text"} if column != "text" else {})
    return rows if rows.features["text"].dtype == "string" else rows.cast_column("text", Value("string"))
