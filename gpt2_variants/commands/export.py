"""`export`: make a model folder of a checkpoint, on the CPU."""

import argparse
from pathlib import Path

from .command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`."""
    parser.add_argument(
        "--checkpoint",
        metavar="FOLDER",
        type=Path,
        required=True,
        help="a run's folder (its newest whole checkpoint), or a checkpoint",
    )
    parser.add_argument("--output_dir", metavar="FOLDER", type=Path, required=True, help="a new folder")


def run(arguments: argparse.Namespace) -> None:
    """Make a model folder of a checkpoint."""
    from ..hub import export_checkpoint

    checkpoint = export_checkpoint(arguments.checkpoint, arguments.output_dir)
    print(f"exported {checkpoint} to {arguments.output_dir}")


COMMAND = Command(
    "export",
    "--checkpoint FOLDER --output_dir FOLDER",
    "make a model folder of a checkpoint, on the CPU",
    add_arguments,
    run,
)
