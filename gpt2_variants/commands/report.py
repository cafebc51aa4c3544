"""`report`: runs beside one another: figures, curves, what the models learned."""

import argparse
from pathlib import Path

from .command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report`."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        type=Path,
        nargs="+",
        help="run folders, such as runs/gpt2 runs/duo_predict, or model folders",
    )
    parser.add_argument(
        "--output_dir",
        metavar="FOLDER",
        type=Path,
        help="where report.html and report.md go (default: report/ in the folder that all lie in)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the report on the runs, and print its table; of a single run its summary and its plot."""
    from ..report import plot, summary, write

    report = write(arguments.runs, arguments.output_dir)
    if len(arguments.runs) > 1:
        print(report.terminal, end="\n\n")
    elif (arguments.runs[0] / "run.json").exists():
        print(summary(arguments.runs[0]))
        print(f"plot        {plot(arguments.runs[0])}")
    print(f"page        {report.page}")
    print(f"table       {report.table}")


COMMAND = Command(
    "report",
    "RUN [RUN ...] [--output_dir FOLDER]",
    "runs beside one another: figures, curves, what the models learned",
    add_arguments,
    run,
)
