"""`generate`: continue a prompt with an exported model."""

import argparse
import math
import sys

from ..faults import UsageError
from .command import Command
from .shared_options import add_model, add_number, number, open_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `generate`."""
    add_model(parser)
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="what to continue")
    add_number(parser, "--max_new_tokens", "60", "tokens to add; with --show_surprise it may be 0: the prompt alone")
    add_number(parser, "--temperature", "0.8", "divides the logits; 0 takes the most probable token", metavar="X")
    add_number(parser, "--top_k", "40", "sample from this many most probable tokens; 0: from all")
    add_number(parser, "--seed", "0", "seed of the sampling")
    parser.add_argument(
        "--show_surprise",
        action="store_true",
        help="also print how surprising each token is, in nats: given its past, and as each further stream of the "
        "variant predicts it",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print a prompt with its continuation.

    Raises:
        UsageError: an option has no such value, or the model cannot be opened.
    """
    from ..inference import surprise_table

    faults: list[str] = []
    least = 0 if arguments.show_surprise else 1
    options = {
        "max_new_tokens": (int, lambda v: v >= least, f"at least {least} is needed"),
        # Logits divided by less would overflow.
        "temperature": (float, lambda v: v == 0 or 1e-3 <= v < math.inf, "0, or 0.001 and more, is allowed"),
        "top_k": (int, lambda v: v >= 0, "0 or more is needed"),
        "seed": (int, lambda v: 0 <= v < 2**32, "0 to 4294967295 is allowed"),
    }
    numbers = {name: number(arguments, name, *rule, faults) for name, rule in options.items()}
    try:
        saved = open_model(arguments)
        prompt = saved.encode(arguments.prompt)
        if numbers["max_new_tokens"] == 0 and prompt.shape[1] < 2:
            faults.append("--show_surprise: the prompt is one token; at least 2 are needed, or --max_new_tokens 1")
    except UsageError as err:
        faults += err.lines
    if faults:
        raise UsageError(faults)
    if numbers["max_new_tokens"]:
        ids = saved.generate(prompt, **numbers, stream=True)
        if ids.shape[1] == saved.config.n_positions < prompt.shape[1] + numbers["max_new_tokens"]:
            print(f"note: stopped at the model's {saved.config.n_positions} positions", file=sys.stderr)
    else:
        ids = prompt
    if arguments.show_surprise:
        print(f"\n{surprise_table(saved, ids, prompt.shape[1])}")


COMMAND = Command(
    "generate",
    "--model FOLDER --prompt TEXT [options]",
    "continue a prompt with an exported model",
    add_arguments,
    run,
)
