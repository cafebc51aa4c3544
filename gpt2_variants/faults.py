"""What is wrong with what was asked for, and what failed though nothing was: told in lines."""


class UsageError(ValueError):
    """What is wrong with what was asked: one clear line each, in `lines`."""

    def __init__(self, lines: list[str]):
        super().__init__("\n".join(lines))
        self.lines = lines


class RunError(RuntimeError):
    """What could not be done for no fault in what was asked, such as writing to a full disk: one clear line."""
