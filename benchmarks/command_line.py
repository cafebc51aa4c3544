"""What the command lines of the benchmarks share: numbers that are checked together, faults told a line each."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from gpt2_variants.faults import UsageError
from gpt2_variants.variant_code import VariantError, find

Plan = TypeVar("Plan")


class Parser(argparse.ArgumentParser):
    """A parser that raises `UsageError` where argparse would end the process. Options are never abbreviated."""

    def __init__(self, description: str | None, epilog: str | None = None):
        super().__init__(
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str):
        """Raise `UsageError` with that message."""
        raise UsageError([f"{message} (see --help)"])


class Checks:
    """Checks of what was given; collects a line for each fault.

    Attributes:
        lines: the faults so far.
    """

    def __init__(self):
        self.lines: list[str] = []

    def whole(self, option: str, text: str | int, least: int = 1) -> int:
        """Return the number that `text` is; where it is not a whole one from `least`, a fault, and `least`."""
        if str(text).isascii() and str(text).isdigit() and int(text) >= least:
            return int(text)
        self.lines.append(f"--{option} {text}: a whole number from {least} is needed")
        return least

    def probability(self, option: str, text: str) -> float:
        """Return the number from 0 to below 1 that `text` is; else a fault, and 0."""
        try:
            number = float(text)
        except ValueError:
            number = -1.0
        if 0 <= number < 1:
            return number
        self.lines.append(f"--{option} {text}: a number from 0 to below 1 is needed")
        return 0.0

    def of(self, option: str, given: list[str], known: tuple[str, ...]) -> list[str]:
        """`given` without repetitions; a fault where one of them is not `known`."""
        if unknown := [name for name in given if name not in known]:
            self.lines.append(f"--{option} {' '.join(unknown)}: not known; of {', '.join(known)}")
        return list(dict.fromkeys(given))

    def variants(self, given: list[str]) -> list[str]:
        """Return the variants among `given`, of the package or of a file, once each; all else becomes a fault."""
        found = []
        for name in dict.fromkeys(given):
            try:
                find(name)
                found.append(name)
            except VariantError as err:
                self.lines.append(f"--variants {err}")
        return found

    def folder(self, option: str, path: Path | None) -> Path | None:
        """`path`; a fault where it is something else than a folder or nothing yet."""
        if path is not None and path.exists() and not path.is_dir():
            self.lines.append(f"--{option} {path}: is a file; a folder is needed")
        return path

    def done(self) -> None:
        """Raise `UsageError` if there were any."""
        if self.lines:
            raise UsageError(self.lines)


def say(text: str) -> None:
    """Tell how the measurement goes: a line on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


def carry_out(parse: Callable[[list[str] | None], Plan], argv: list[str] | None, measure: Callable[[Plan], int]) -> int:
    """`measure` what `parse` makes of `argv`; its exit code, or 2 after a line on stderr for each fault."""
    try:
        plan = parse(argv)
    except UsageError as err:
        for line in err.lines:
            print(f"error: {line}", file=sys.stderr)
        return 2
    return measure(plan)
