"""What is wrong with what was asked for, told in lines."""


class UsageError(ValueError):
    """What is wrong with what was asked: one clear line each, in `lines`."""

    def __init__(self, lines: list[str]):
        super().__init__("\n".join(lines))
        self.lines = lines
