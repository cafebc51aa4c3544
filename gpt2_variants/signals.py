"""The signals that a training, or a comparison, answers by saving what it has before it ends."""

import contextlib
import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType


def that_stop() -> tuple[signal.Signals, ...]:
    """Return SIGINT, SIGTERM and those of three more that would end this process as it is.

    They are SIGHUP, which a terminal sends that is closed, and SIGUSR1 and SIGUSR2, which queues send some time before
    they end a job. One that is ignored, as under `nohup`, or has a handler already, keeps its meaning.
    """
    more = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    return (signal.SIGINT, signal.SIGTERM, *(number for number in more if signal.getsignal(number) == signal.SIG_DFL))


@contextlib.contextmanager
def handled(
    numbers: Iterable[int], handler: Callable[[int, FrameType | None], None] | signal.Handlers
) -> Iterator[None]:
    """Have `handler` answer these signals while inside, in the main thread, the only one that can set handlers."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)  # None: it was not set by Python
