"""`check`: whether a variant keeps what every variant promises."""

import argparse
import dataclasses
import json

from ..faults import UsageError
from ..ranks import use_accelerator
from .command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `check`."""
    parser.add_argument(
        "variant", metavar="NAME|FILE", help="a variant of the package, or a file or module of your own"
    )
    parser.add_argument(
        "--quick", action="store_true", help="take some 20 seconds: fewer positions, modes and promises"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Ask a variant what every variant promises; 1 where a promise is broken, else 0.

    Raises:
        UsageError: no such variant, or its file cannot be used.
    """
    use_accelerator()  # a library that saves models imports DeepSpeed, which would warn amid the answers
    from ..contract import BROKEN, Subject, ask, keeps_all, listed
    from ..variant_code import VariantError, find

    try:
        subject = Subject(find(arguments.variant), arguments.quick)
    except VariantError as err:
        raise UsageError([str(err)]) from err
    answers = []
    for answer in ask(subject):
        answers.append(answer)
        if not arguments.json:
            print(listed(answer), flush=True)
    kept = keeps_all(answers)
    if arguments.json:
        about = {"variant": subject.variant.name, "quick": arguments.quick, "kept": kept}
        print(json.dumps({**about, "promises": [dataclasses.asdict(answer) for answer in answers]}))
    else:
        broken, seconds = sum(answer.state == BROKEN for answer in answers), sum(a.seconds for a in answers)
        print(f"\n{subject.variant.name}: {f'{broken} broken' if broken else 'nothing broken'}, {seconds:.0f} s")
    return 0 if kept else 1


COMMAND = Command(
    "check",
    "NAME|FILE [--quick] [--json]",
    "whether a variant keeps what every variant promises",
    add_arguments,
    run,
)
