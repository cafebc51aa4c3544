"""How far a long pass over the data is."""

from __future__ import annotations

import sys
import time

SECONDS_BETWEEN_LINES = 10.0  # in a log, which nobody wants a line a second in; what takes less time says nothing
MB = 10**6


class Progress:
    """Tell on stderr how much of a pass is done: a bar on a terminal, else a line at most every ten seconds."""

    def __init__(self, what: str, total: int) -> None:
        """Begin a pass named `what`, as in "tokenising", over `total` bytes."""
        import datasets

        self._what, self._total = what, total
        self._done = self._new = 0
        self._start = self._told = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = datasets.utils.tqdm(total=total, desc=what.capitalize(), unit="B", unit_scale=True)

    def add(self, size: int, is_new: bool = True) -> None:
        """Count `size` bytes as done; those that an earlier run did (`is_new` false) do not count for the speed."""
        self._done += size
        self._new += size if is_new else 0
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(size)
        elif now - self._told >= SECONDS_BETWEEN_LINES:
            self._told = now
            self._say(now - self._start)

    def close(self) -> None:
        """End the pass; a bar stays on the terminal."""
        if self._bar is not None:
            self._bar.close()

    def _say(self, seconds: float) -> None:
        line = f"{self._what}: {self._done / MB:,.0f} of {self._total / MB:,.0f} MB"
        if self._done > self._new:
            line += f", {(self._done - self._new) / MB:,.0f} of them by an earlier run"
        if self._new and seconds > 0:
            speed = self._new / seconds
            line += f", {speed / MB:,.2f} MB/s, {_time(max(0, self._total - self._done) / speed)} left"
        print(line, file=sys.stderr, flush=True)


def _time(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
