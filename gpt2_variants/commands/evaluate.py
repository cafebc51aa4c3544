"""`evaluate`: perplexity of a model on a text."""

import argparse
import json
import math
from typing import Any

from ..faults import UsageError
from ..words import counted
from .command import Command
from .shared_options import add_model, add_number, number, open_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `evaluate`."""
    add_model(parser)
    parser.add_argument(
        "--dataset", metavar="NAME", required=True, help="what training takes: a file, a folder, a Hub id, builtin, ..."
    )
    parser.add_argument(
        "--split",
        choices=("validation", "train", "all"),
        metavar="validation|train|all",
        help="validation, train: the blocks a training run on this --dataset would use; all: everything (default: all "
        "of a single file, else validation)",
    )
    parser.add_argument(
        "--block_size", metavar="N", help="tokens per window (default: what the model was trained with)"
    )
    parser.add_argument(
        "--stride",
        metavar="N",
        help="tokens from one window to the next (default: the block size, as in training; less gives each token more "
        "context)",
    )
    add_number(parser, "--batch_size", "8", "windows per forward pass")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        metavar="float32|bfloat16",
        help="dtype of the weights (default: float32)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Print a model's figures on a text.

    Raises:
        UsageError: an option has no such value, or the model or the text cannot be read.
    """
    from ..data import check_source
    from ..evaluation import describe
    from ..inference import evaluate_dataset

    faults: list[str] = []
    saved, most, allowed = None, math.inf, "2 or more is allowed"
    try:
        saved = open_model(arguments, arguments.dtype)
        most = saved.config.n_positions
        allowed = f"2 to the model's {most} positions is allowed"
    except UsageError as err:
        faults += err.lines
    faults += check_source(arguments.dataset, tokenizer=None)
    batch_size = number(arguments, "batch_size", int, lambda v: v >= 1, "at least 1 is needed", faults)
    block_size: Any = saved and saved.block_size
    if arguments.block_size is not None:
        block_size = number(arguments, "block_size", int, lambda v: 2 <= v <= most, allowed, faults)
    stride = block_size
    if arguments.stride is not None:
        longest = block_size or math.inf
        what = (
            f"1 to the block size{f' of {block_size}' if block_size else ''} is allowed, so that no token is left out"
        )
        stride = number(arguments, "stride", int, lambda v: 1 <= v <= longest, what, faults)
    if faults or saved is None:
        raise UsageError(faults)
    facts = evaluate_dataset(saved, arguments.dataset, arguments.split, block_size, stride, batch_size)
    if arguments.json:
        print(json.dumps(facts))
        return
    first, *others = describe(facts, saved.streams)
    print(f"model       {arguments.model}, {arguments.dtype} on {facts['device']}")
    print(f"text        {arguments.dataset}, {facts['split']}: {counted(facts['num_tokens'], 'token')}")
    print(f"windows     {facts['num_windows']:,} of {facts['window_size']} tokens, stride {stride}")
    print(f"next token  {first}")
    print("\n".join(others), end="\n" if others else "")


COMMAND = Command(
    "evaluate",
    "--model FOLDER --dataset NAME [options]",
    "perplexity of a model on a text",
    add_arguments,
    run,
)
