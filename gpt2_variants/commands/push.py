"""`push`: push a finished run's model/ to the Hugging Face Hub."""

import argparse
from pathlib import Path

from ..faults import UsageError
from .command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `push`."""
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder, such as runs/duo_predict")
    parser.add_argument(
        "--hub_model_id",
        metavar="NAME",
        help="name, or namespace/name (default: the run's, else its folder's name)",
    )
    parser.add_argument("--hub_private", action="store_true", default=None, help="keep it private")


def run(arguments: argparse.Namespace) -> int:
    """Push a finished run's model; 1 where the push failed, else 0.

    Raises:
        UsageError: the run or the repository's name is not fit for it.
    """
    from ..hub import publish, push_faults

    asked = arguments.run, arguments.hub_model_id, arguments.hub_private
    if faults := push_faults(*asked):
        raise UsageError(faults)
    return publish(*asked)


COMMAND = Command(
    "push",
    "RUN [options]",
    "push a finished run's model/ to the Hugging Face Hub",
    add_arguments,
    run,
)
