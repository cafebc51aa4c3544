"""The folders that commands make and runs live in."""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import IO, Any

LOCK = ".lock"
CHECKPOINTS = "checkpoints"
MANIFEST = "manifest.json"  # of each checkpoint
METRICS = "metrics.jsonl"
TEMPORARY = ".tmp-"  # what a checkpoint's folder is called while it is written, or removed
# What a start leaves that ended before its first step, beside empty files and folders.
_BEGUN = (LOCK, ".run.json.tmp", ".ds_config.json.tmp", f".{METRICS}.tmp")


def write_aside(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all, also when the machine dies meanwhile; its folder is made.

    The file is written beside its place, put on the disk, and renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)  # on a full disk its room is needed
        raise
    sync(path.parent)  # the rename itself


def sync(folder: Path) -> None:
    """Put on the disk what a folder names."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def remove_aside(folder: Path) -> None:
    """Remove a folder, so that under its name it is whole or gone whenever the process dies.

    It is renamed first, to a name that begins with `TEMPORARY`.
    """
    aside = folder.with_name(f"{TEMPORARY}removed-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside)


def _free_name(path: Path) -> Path:
    """Return `NAME.damaged-001`, or the next number that is free."""
    taken = [int(end) for other in path.parent.glob(f"{path.name}.damaged-*") if (end := other.name[-3:]).isdigit()]
    return path.with_name(f"{path.name}.damaged-{max(taken, default=0) + 1:03d}")


def copied_aside(path: Path) -> Path:
    """Copy a damaged file to `NAME.damaged-001`, or the next free number, whole or not at all; its new name."""
    copy, aside = path.with_name(f".{path.name}.tmp"), _free_name(path)
    shutil.copy2(path, copy)
    os.replace(copy, aside)
    return aside


def kept_aside(path: Path) -> Path:
    """Rename a damaged file or folder to `NAME.damaged-001`, or the next free number; its new name."""
    aside = _free_name(path)
    os.rename(path, aside)
    return aside


def holds_checkpoints(folder: Path) -> bool:
    """Return whether a run's folder holds a checkpoint, whole or not."""
    return any((folder / CHECKPOINTS).glob(f"step-*/{MANIFEST}"))


def holds_run(folder: Path) -> bool:
    """Return whether a folder is that of a run: by its `run.json`, or by a checkpoint in it."""
    return (folder / "run.json").exists() or holds_checkpoints(folder)


def only_leftovers(folder: Path) -> bool:
    """Return whether a folder holds nothing but what a start of ours leaves that ended before its first step."""
    return all(_is_leftover(path) for path in folder.iterdir())


def _is_leftover(path: Path) -> bool:
    if path.is_symlink():
        return False
    if path.is_dir():
        return path.name == CHECKPOINTS and all(
            child.name.startswith((TEMPORARY, ".latest.")) for child in path.iterdir()
        )
    return path.name in _BEGUN or (path.name == METRICS and holds_nothing(path))


def holds_nothing(file: Path) -> bool:
    """Return whether a file is empty, or holds blanks alone, or the zeros that a machine leaves which crashed."""
    with file.open("rb") as stream:
        return all(not block.strip(b"\0 \r\n") for block in iter(lambda: stream.read(1 << 16), b""))


def checksum_of(value: Any) -> str:
    """Return the SHA-256 of a value of JSON, however it is laid out as text."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()).hexdigest()


def read_manifest_of(checkpoint: Path) -> dict[str, Any]:
    """Return the manifest in a checkpoint's folder, without its checksum.

    Raises:
        FileNotFoundError: there is none.
        OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError: it is damaged.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    checksum = manifest.pop("sha256", None)  # versions of before kept none
    if checksum is not None and checksum != checksum_of(manifest):
        raise ValueError("its checksum differs")
    return manifest


def new_folder_faults(folder: Path) -> list[str]:
    """Return what stands in the way of making `folder`: it exists, or its place cannot be written."""
    if folder.exists():
        return [f"--output_dir {folder}: exists already; give a new folder"]
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        return [f"--output_dir {folder}: {parent} cannot be written; give another folder"]
    return []


class FolderLock:
    """Keeps a second run out of a run's folder while this process lives."""

    def __init__(self, folder: Path):
        self._path = folder / LOCK
        self._file: IO[str] | None = None

    def acquire(self) -> str | None:
        """Lock the folder, which is made if need be; a fault, if another process holds it. The kernel unlocks it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            return f"--output_dir {self._path.parent}: {holder} is training there; wait for it, or give another folder"
        except OSError as err:
            print(
                f"{self._path.parent}: cannot be locked ({err.strerror}); see that no other run uses it",
                file=sys.stderr,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        self._file = file
        return None

    def release(self) -> None:
        """Let others in, before this process ends."""
        if self._file is not None:
            self._file.close()
            self._file = None
