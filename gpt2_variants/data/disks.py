"""What a disk refuses while data are prepared: named as that, and not blamed on the data."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..reasons import disk_error, disk_fault
from .names import DataError

ONLY_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextmanager
def disk_named(folder: Path, variable: str) -> Iterator[None]:
    """While inside, a disk that is full or cannot be written raises a `DataError` that says so, and the cure.

    Args:
        folder: where what is prepared goes.
        variable: of the environment, which names another place.
    """
    try:
        yield
    except Exception as error:
        found = disk_error(error)
        if found is None:
            raise
        number, name = found
        here = name is None or Path(name).absolute().is_relative_to(folder.absolute())
        if not here and number in ONLY_OF_WRITING:  # of a library's own cache, such as the Hub's
            raise DataError(f"{name}: cannot be written: {disk_fault(error)}") from error
        if not here or (name is None and number not in ONLY_OF_WRITING):
            raise  # what is read is another's
        raise DataError(
            f"the prepared data cannot be written to {folder}: {disk_fault(error)}, or set {variable} to a folder on "
            "another disk"
        ) from error
