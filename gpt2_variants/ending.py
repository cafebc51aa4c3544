"""The end of a process: its exit code, and nothing after it."""

import atexit
import os
import select
import sys
import threading
from collections.abc import Callable
from typing import IO, NoReturn


def end_with(main: Callable[[], int]) -> NoReturn:
    """Call `main`, and end the process with the exit code that it returns: the last act of a script.

    What Python does at an end is done: threads that are not daemons are waited for, what is registered with `atexit`
    is called, and what was printed is written. An exception that nobody caught is told, with exit code 1. Only the
    interpreter is not taken apart: a thread of a library that asks for the GIL meanwhile is ended by force by CPython
    before 3.14, which C++ answers with "terminate called without an active exception" and SIGABRT, after all the work
    was done. Of Gloo's threads, which no call joins, each drops its last reference to a collective that way.

    Where the reader of the output has gone, as with `| head`, the exit code is 1, and nothing is said.
    """
    code = _code_of(main)
    threading._shutdown()  # type: ignore[attr-defined]  # as `Py_FinalizeEx` does, and in its order
    atexit._run_exitfuncs()
    os._exit(_written(code))


def _code_of(main: Callable[[], int]) -> int:
    try:
        return main()
    except SystemExit as end:  # of argparse's --help
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BrokenPipeError:
        if not any(map(_has_lost_its_reader, (sys.stdout, sys.stderr))):
            sys.excepthook(*sys.exc_info())  # it is of another pipe
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1


def _written(code: int) -> int:
    """Write what was printed; `code`, or 1 where that was to be 0 and not all could be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            code = code or 1
        except OSError as err:
            code = code or 1
            if stream is sys.stdout:
                print(f"error: the output could not be written: {err}", file=sys.stderr)
    return code


def _has_lost_its_reader(stream: IO[str]) -> bool:
    """Return whether `stream` is a pipe that nobody can read any more."""
    asked = select.poll()
    asked.register(stream, select.POLLOUT)
    return any(event & select.POLLERR for _, event in asked.poll(0))
