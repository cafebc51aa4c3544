"""Work of hours that does not end because nobody reads any more what it says."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO)  # a pipe without a reader, as of a `tee` that has ended; a terminal that was closed


@contextlib.contextmanager
def goes_on_unheard() -> Iterator[None]:
    """Let `sys.stdout` and `sys.stderr` drop, while inside, what their pipe or terminal takes no more.

    What stands in their places already, such as a notebook's streams, stays.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _steady(sys.stdout, sys.__stdout__), _steady(sys.stderr, sys.__stderr__)
    try:
        yield
    finally:
        used = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = before
        for stream in used:
            with contextlib.suppress(AttributeError, ValueError):  # there is none, or it was closed
                stream.flush()


def _steady(stream: TextIO, of_the_process: TextIO | None) -> TextIO:
    if stream is not of_the_process or not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    raw = _Steady(stream.fileno(), "w", closefd=False)
    # by lines also into a file, where what libraries write by the stream that was there before stands between them
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors, line_buffering=True)


class _Steady(io.FileIO):
    """A file descriptor that becomes the null device's when nobody is left to read from it."""

    def write(self, content: Any, /) -> int:
        try:
            return super().write(content)
        except OSError as err:
            if err.errno not in GONE:
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # so that it takes what libraries write past Python too
            os.close(null)
            return memoryview(content).nbytes
