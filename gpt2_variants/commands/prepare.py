"""`prepare`: tokenise and cut a data set once, for a folder or the Hub."""

import argparse
from pathlib import Path

from ..faults import UsageError
from .command import Command
from .shared_options import READING, add_number, add_reading, number, reading_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `prepare`."""
    parser.add_argument(
        "--dataset", metavar="NAME", required=True, help="what training takes: a file, a folder, a Hub id, builtin, ..."
    )
    parser.add_argument("--tokenizer", metavar="NAME", required=True, help="a folder, a Hub id, or builtin")
    add_number(parser, "--block_size", "1024", "tokens per block; training with another cuts the blocks anew")
    add_reading(parser)
    parser.add_argument("--output_dir", metavar="FOLDER", type=Path, help="a new folder, which --dataset takes")
    parser.add_argument("--push_to_hub", action="store_true", help="push the blocks to the Hugging Face Hub")
    parser.add_argument("--hub_dataset_id", metavar="NAME", help="name, or namespace/name, on the Hub")
    parser.add_argument("--hub_private", action="store_true", help="keep it private")


def run(arguments: argparse.Namespace) -> int:
    """Prepare a data set; 1 where a push failed, else 0.

    Raises:
        UsageError: an option has no such value, or the source cannot be read.
    """
    from ..prepared_data import Request, faults, prepare

    lines: list[str] = []
    block_size = number(arguments, "block_size", int, lambda v: v >= 2, "at least 2 is needed", lines)
    given = {name: value for name, value in vars(arguments).items() if name not in ("command", *READING)}
    request = Request(**given | {"block_size": block_size, "reading": reading_of(arguments, lines)})
    lines += faults(request)
    if lines:
        raise UsageError(lines)
    return prepare(request)


COMMAND = Command(
    "prepare",
    "--dataset NAME --tokenizer NAME [options]",
    "tokenise and cut a data set once, for a folder or the Hub",
    add_arguments,
    run,
)
