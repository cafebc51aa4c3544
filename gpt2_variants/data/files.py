"""Which files of a folder are read, in which split, and which are not and why."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ..words import counted
from .formats import SUFFIXES, content_fault, format_of, suffix_of

SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# What lies beside data and is none, by its name without suffixes: any file, and JSON alone.
ABOUT = frozenset("readme license licence copying notice changelog citation requirements".split())
ABOUT_JSON = frozenset(
    "meta metadata dataset_info dataset_infos dataset_dict state config manifest package stats".split()
)


@dataclass(frozen=True)
class Selection:
    """The files that a path names.

    Attributes:
        splits: split -> its files, by their path; "" of none, where others are named after one.
        left_out: (path, why not) of each file that is not read.
        conflict: a file that is named after several splits, if there is one.
    """

    splits: dict[str, list[Path]]
    left_out: list[tuple[str, str]] = field(default_factory=list)
    conflict: str | None = None

    @property
    def unused(self) -> list[str]:
        """The splits that are not read, since there is one to validate on."""
        return sorted(self.splits.keys() - {"train", "validation"}) if "validation" in self.splits else []

    @property
    def used(self) -> dict[str, list[Path]]:
        """Split -> its files, of the splits that are read."""
        return {split: files for split, files in self.splits.items() if split not in self.unused}

    @property
    def files(self) -> list[Path]:
        """All that belong to the source."""
        return [file for files in self.splits.values() for file in files]


def listed(files: list[Path]) -> str:
    """Return files in words: how many, of which kinds, of how many bytes."""
    kinds = Counter(suffix_of(file) for file in files)
    size = sum(file.stat().st_size for file in files)
    shown = ", ".join(f"{count} {suffix}" for suffix, count in sorted(kinds.items()))
    return f"{counted(len(files), 'file')} ({shown}; {counted(size, 'byte')})"


def split_of(name: str) -> str | None:
    """Return the split that a split's or a file's name tells by its words, as `my_valid.txt` does; else None.

    Raises:
        ValueError: several do.
    """
    found = {SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_WORDS}
    if len(found) > 1:
        raise ValueError(f"is named after several splits, {' and '.join(sorted(found))}")
    return found.pop() if found else None


def select(path: Path) -> Selection:
    """Find what is to be read at `path`, a file or a folder with all that is below it, links to folders too.

    Names tell splits where one of them says train, as in `train-00000.parquet` or `train/a.txt`: nobody means to train
    on the `test.txt` beside a `train.txt`. Where all say the same other split, they are trained on.
    """
    if path.is_file():
        return Selection({"train": [path]})
    files, left_out = _walk(path)
    splits: dict[str, list[Path]] = {}
    for file in files:
        relative = file.relative_to(path)
        try:
            split = split_of("/".join(relative.parts)) or ""
        except ValueError as error:
            return Selection({"train": files}, left_out, f"{relative} {error}; rename it, or move it away")
        splits.setdefault(split, []).append(file)
    if len(splits) == 1:
        return Selection({"train": files}, left_out)
    return Selection(splits, left_out)


def _walk(root: Path) -> tuple[list[Path], list[tuple[str, str]]]:
    """Return all readable files below `root`, sorted by path; and those that are not read."""
    files: list[Path] = []
    left_out: list[tuple[str, str]] = []
    seen: dict[str, str] = {}
    for folder, folders, names in os.walk(root, followlinks=True):
        place = Path(folder)
        real, relative = os.path.realpath(folder), place.relative_to(root).as_posix()
        if real in seen:  # a link to a folder that is read already, or in a circle
            left_out.append((relative, f"is the same folder as {seen[real]}"))
            folders.clear()
            continue
        seen[real] = relative
        hidden = [name for name in (*folders, *names) if name.startswith(".")]
        left_out += [((place / name).relative_to(root).as_posix(), "is hidden") for name in hidden]
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                file = place / name
                if why := _why_not(file):
                    left_out.append((file.relative_to(root).as_posix(), why))
                else:
                    files.append(file)
    return sorted(files, key=lambda file: file.relative_to(root).as_posix()), sorted(left_out)


def _why_not(file: Path) -> str | None:
    if not file.exists():
        return "is a link to nothing"
    if not file.is_file():
        return "is no ordinary file"
    name = file.name.lower().split(".", 1)[0]
    if name in ABOUT or name.startswith("readme") or (name in ABOUT_JSON and file.suffix.lower() == ".json"):
        return "is about the data, by its name"
    if format_of(file) is None:
        return f"is of a kind that is not read ({suffix_of(file) or 'no suffix'})"
    return "is empty" if file.stat().st_size == 0 else None


def selection_fault(path: Path, selection: Selection, encoding: str | None) -> str | None:
    """Return what is wrong with the files at `path`, as far as names and samples tell; None if nothing is."""
    files = selection.files
    if not files:
        if not any(path.iterdir()):
            return "the folder is empty"
        if selection.left_out and all(why in ("is empty", "is hidden") for _, why in selection.left_out):
            return "all its files are empty; give one that holds text"
        named = f" ({selection.left_out[0][0]} {selection.left_out[0][1]})" if selection.left_out else ""
        return f"the folder holds no {', '.join(SUFFIXES)} file{named}"
    if path.is_file() and path.stat().st_size == 0:
        return "the file is empty; give one that holds text"
    for file in files:
        if fault := content_fault(file, encoding):
            return fault if file == path else f"{file.relative_to(path)}: {fault}"
    if selection.conflict is not None:
        return selection.conflict
    names = selection.splits.keys()
    if names == {"train"} or ("train" in names and "" not in names):
        return None
    stray = selection.splits[""][0].relative_to(path) if "" in names else None
    if "train" in names:
        return (
            f"some files are named train, but {stray} is named neither train, validation nor test; rename it after its "
            "split or move it away"
        )
    split = next(name for name in names if name)
    other = stray or next(file for name in names if name != split for file in selection.splits[name]).relative_to(path)
    return (
        f"{selection.splits[split][0].relative_to(path)} is named {split}, but no file is named train; name {other} "
        "train, or move one of them away"
    )
