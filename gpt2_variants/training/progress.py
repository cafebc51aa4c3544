"""How far a run is, on the terminal."""

import sys
from typing import Any

from ..measuring import duration

# tqdm's, without the time that it estimates from steps: evaluations and the first step would be in it
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} steps{postfix}"


class Progress:
    """A bar on a terminal; in a log file a line per logging step, without carriage returns."""

    def __init__(self, step: int, total: int, shown: bool):
        self._bar = None
        self._shown, self._total = shown, total
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=step, bar_format=BAR, dynamic_ncols=True)

    def show(self, step: int, loss: float, tokens_per_second: float | None, tokens_left: int) -> None:
        """Report a logging step; without a speed, as of a first step, the loss alone."""
        text = f"loss {loss:.4f}"
        if tokens_per_second is not None:
            text += f", {tokens_per_second:,.0f} tokens/s"
            text += f", {duration(tokens_left / tokens_per_second)} left" if tokens_left else ""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(text)
        elif self._shown:
            print(f"step {step}/{self._total}: {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Print a line beside the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._shown:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._bar is not None:
            self._bar.close()
