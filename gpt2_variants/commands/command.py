"""What a command is: its name, its help, its arguments and the function that runs it."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command of `python -m gpt2_variants`.

    Attributes:
        name: what is typed.
        usage: what follows the name, in short.
        help: what it does, for the list of commands; without a full stop.
        add_arguments: adds its arguments to its parser.
        run: does it; the exit code, None for 0. It raises `UsageError` for faults in what was asked.
        takes_options_of_training: what its parser does not know is handed to it as `rest`, and all words as `words`.
    """

    name: str
    usage: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    takes_options_of_training: bool = False
