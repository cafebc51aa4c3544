"""Whether prepared data are as they were written: their `info.json` holds a checksum of every file, and of itself.

Each file is read for it once, as long as its status stays as it was (`digests.file_digests`).
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..folders import checksum_of
from .digests import file_digest, file_digests, known_digests, remember_digests

INFO = "info.json"
PARTS = ("tokenizer", "train", "validation")
VERIFIED = ".verified"  # the suffix of the file that keeps what was verified
_NEEDED = {"dataset": str, "tokenizer": str, "fingerprint": str, "summary": str, "unigram_perplexity": float}


def write_info(folder: Path, info: dict[str, Any]) -> None:
    """Write `info` as the `info.json` of `folder`, with checksums of all its `PARTS`: aside, then renamed.

    With it the folder is complete.
    """
    files = sorted(path for part in PARTS for path in (folder / part).rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): [path.stat().st_size, file_digest(path)] for path in files}
    info = {**info, "files": digests}
    aside = folder / "info.aside"
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps({**info, "checksum": checksum_of(info)}, indent=2) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(folder / INFO)


def read_info(folder: Path) -> dict[str, Any]:
    """Return what the `info.json` of `folder` says.

    Raises:
        ValueError: it is missing or damaged; in words.
    """
    try:
        info = json.loads((folder / INFO).read_bytes().decode("utf-8"))
    except OSError as error:
        raise ValueError(f"{INFO} is missing or cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{INFO} is no JSON") from error
    if not isinstance(info, dict) or any(not isinstance(info.get(name), kind) for name, kind in _NEEDED.items()):
        raise ValueError(f"{INFO} lacks what it must say")
    info.setdefault("notes", [])
    if "checksum" in info or "files" in info:
        checksum = info.pop("checksum", None)
        if checksum != checksum_of(info):
            raise ValueError(f"{INFO} is damaged (its checksum differs)")
    return info


def fault_of(folder: Path, cache: Path) -> str | None:
    """Say what is wrong with the prepared data in `folder`; None where nothing is. Reads what has changed since.

    Of data that a version of before has prepared, without checksums, `info.json` alone is looked at.

    Args:
        cache: where stamps of the files are kept, if it can be written.
    """
    try:
        files = read_info(folder).get("files", {})
        for name, (size, _) in files.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
        digests = file_digests([folder / name for name in files], folder, cache, VERIFIED) if files else []
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    damaged = [name for (name, (_, digest)), found in zip(files.items(), digests, strict=True) if found != digest]
    return f"{damaged[0]} is damaged (its checksum differs)" if damaged else None


def is_known_whole(folder: Path, cache: Path) -> bool:
    """Return whether the data in `folder` are known to be whole without reading them."""
    try:
        files = read_info(folder).get("files")
        if files is None:
            return False
        digests = known_digests([folder / name for name in files], folder, cache, VERIFIED)
    except (OSError, ValueError):
        return False
    return digests == [digest for _, digest in files.values()]


def put_in_place(building: Path, prepared: Path) -> None:
    """Rename the complete folder `building` to `prepared`, in the place of a damaged one, and keep that it is whole."""
    damaged = prepared.with_name(prepared.name + ".damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    if prepared.exists():
        prepared.rename(damaged)
    building.rename(prepared)
    shutil.rmtree(damaged, ignore_errors=True)
    files = read_info(prepared).get("files", {})
    digests = [digest for _, digest in files.values()]
    remember_digests([prepared / name for name in files], digests, prepared, prepared.parent, VERIFIED)
