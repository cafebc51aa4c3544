"""The folders that commands make and runs live in."""

import fcntl
import os
import platform
import sys
from pathlib import Path
from typing import IO

LOCK = ".lock"


def write_aside(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, whole or not at all, also when the machine dies meanwhile; its folder is made.

    The file is written beside its place, put on the disk, and renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def new_folder_faults(folder: Path) -> list[str]:
    """What stands in the way of making `folder`: it exists, or its place cannot be written."""
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
