"""`data`: what would be trained on: files, column, splits, blocks as text."""

import argparse

from ..faults import UsageError
from .command import Command
from .shared_options import add_number, add_reading, number, reading_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `data`."""
    parser.add_argument("dataset", metavar="SOURCE", help="what --dataset takes for training")
    parser.add_argument(
        "--tokenizer", metavar="NAME", default="builtin", help="a folder, a Hub id, or builtin (default: builtin)"
    )
    add_number(parser, "--block_size", "1024", "tokens per block")
    add_reading(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print what would be trained on.

    Raises:
        UsageError: an option has no such value, or the source cannot be read.
    """
    from ..data import check_source, load
    from ..data.preview import describe

    faults: list[str] = []
    block_size = number(arguments, "block_size", int, lambda v: v >= 2, "at least 2 is needed", faults)
    reading = reading_of(arguments, faults)
    faults += check_source(arguments.dataset, arguments.tokenizer, reading)
    if faults:
        raise UsageError(faults)
    print(describe(load(arguments.dataset, arguments.tokenizer, block_size, reading=reading)))


COMMAND = Command(
    "data",
    "SOURCE [options]",
    "what would be trained on: files, column, splits, blocks as text",
    add_arguments,
    run,
)
