"""Digests of files, and stamps that spare reading a file again that has not changed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FORMAT = 1  # of a file of stamps
STAMPS = ".stamps"
SETTLED_NS = 2 * 10**9  # a file changed later than this before it was read may change again with the same times


def file_digest(file: Path) -> str:
    """Return the XXH3 digest of a file's bytes, 32 hex digits. Raises OSError."""
    import xxhash

    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def file_digests(files: Sequence[Path], source: Path, cache: Path, suffix: str = STAMPS) -> list[str]:
    """Return the digests of a source's files, reading those only that changed since an earlier call.

    What a file's status was when it was read is kept beside its digest, in one file of the cache for each source.
    Processes may call this at once: the last one's stamps stay. Stamps that cannot be read or kept are done without.

    Args:
        files: the files, of any size.
        source: the file or folder that they belong to.
        cache: folder where the stamps are kept.
        suffix: of the file of stamps.

    Raises:
        OSError: a file cannot be read.
    """
    place = str(source.absolute())
    stamps_file = _stamps_file(source, cache, suffix)
    known = _read_stamps(stamps_file, place)
    stamps, digests = {}, []
    for file in files:
        path, status = str(file.absolute()), _status(file)
        stamp = known.get(path)
        if stamp is None or stamp[:-1] != status:
            begun = time.time_ns()
            stamp = [*status, file_digest(file)]
            is_settled = max(status[1], status[2]) < begun - SETTLED_NS and _status(file) == status
        else:
            is_settled = True
        if is_settled:
            stamps[path] = stamp
        digests.append(str(stamp[-1]))
    if stamps != known:
        _write_stamps(stamps_file, place, stamps)
    return digests


def known_digests(files: Sequence[Path], source: Path, cache: Path, suffix: str = STAMPS) -> list[str | None]:
    """Return the digests that `file_digests` keeps of files that have not changed since; None of others. Reads none.

    Raises:
        OSError: a file is not there.
    """
    known = _read_stamps(_stamps_file(source, cache, suffix), str(source.absolute()))
    found = [(known.get(str(file.absolute())), _status(file)) for file in files]
    return [stamp[-1] if stamp is not None and stamp[:-1] == status else None for stamp, status in found]


def remember_digests(files: Sequence[Path], digests: Sequence[str], source: Path, cache: Path, suffix: str) -> None:
    """Keep the digests of files that this process has just written, as `file_digests` keeps those that it reads."""
    stamps = {str(file.absolute()): [*_status(file), digest] for file, digest in zip(files, digests, strict=True)}
    _write_stamps(_stamps_file(source, cache, suffix), str(source.absolute()), stamps)


def _stamps_file(source: Path, cache: Path, suffix: str) -> Path:
    # The nodes of a cluster may see one file system under other device numbers: each keeps its own stamps.
    name = hashlib.sha256(f"{source.stat().st_dev} {source.absolute()}".encode()).hexdigest()[:32]
    return cache / f"{name}{suffix}"


def _status(file: Path) -> list[Any]:
    """Return what changes with a file's content: ctime too, since mtime can be set back."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def _read_stamps(file: Path, place: str) -> dict[str, list[Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["source"] != place:
            return {}
        found = {path: list(stamp) for path, stamp in content["files"].items()}
        is_whole = all(len(stamp) == 6 and len(bytes.fromhex(stamp[-1])) == 16 for stamp in found.values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}  # none yet, or damaged: the files are read again
    return found if is_whole else {}


def _write_stamps(file: Path, place: str, stamps: dict[str, list[Any]]) -> None:
    content = json.dumps({"format": FORMAT, "source": place, "files": stamps})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(prefix=file.stem, suffix=".aside", dir=file.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(content)
            os.replace(aside, file)
        finally:
            Path(aside).unlink(missing_ok=True)
    except OSError:  # a cache for reading only, or full: the next start reads the files again
        pass
