"""Why something failed, in words: what a disk refused, and why a run ended."""

import errno
import re
from collections.abc import Iterator

from .faults import RunError


def disk_error(error: BaseException) -> tuple[int, str | None] | None:
    """Return the number, as in `errno`, of what a disk refused and the file, where it is known; else None.

    The errors that led to `error` are looked at too, and what libraries that are not Python's say of one.
    """
    for found in _chain(error):
        number = found.errno if isinstance(found, OSError) else None
        if number is None and (told := re.search(r"\(os error (\d+)\)|\[[Ee]rrno (\d+)\]", str(found))):
            number = int(told[1] or told[2])
        if number in _REFUSED:
            name = getattr(found, "filename", None)
            return number, name if isinstance(name, str) else None
    return None


def disk_fault(error: BaseException) -> str | None:
    """Return what a disk refused, as `disk_error` finds it, in words with the cure; None of any other error."""
    if (found := disk_error(error)) is None:
        return None
    number, name = found
    what, cure = _REFUSED[number]
    return f"{what}{f' ({name})' if name else ''}; {cure}"


def reason_of(error: BaseException) -> str:
    """Why a run ended by `error`, in a line, for its record."""
    if isinstance(error, RunError):
        return str(error)
    return disk_fault(error) or f"{type(error).__name__}: {error}".splitlines()[0]


_REFUSED = {
    errno.ENOSPC: ("the disk is full", "make room"),
    errno.EDQUOT: ("the disk quota is used up", "make room, or ask for more"),
    errno.EFBIG: ("a file may not become as large as is needed", "raise the limit (ulimit -f)"),
    errno.EROFS: ("the disk can only be read", "mount it for writing"),
    errno.EACCES: ("permission was denied", "give the permission"),
    errno.EPERM: ("permission was denied", "give the permission"),
    errno.EIO: ("the disk failed", "see what the system says of it (dmesg)"),
}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
