"""The small commands: `python -m gpt2_variants list | generate | evaluate | export | prepare | report`."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .data import DataError
from .run import Faults


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise Faults([f"{message} (see --help)"])


def make_parser() -> argparse.ArgumentParser:
    """The parser. Numbers stay strings: the commands convert them, so that all faults are told at once."""
    parser = _Parser(prog="python -m gpt2_variants", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))

    commands.add_parser("list", help="the variants that can be trained")

    generate = commands.add_parser("generate", help="continue a prompt with an exported model", allow_abbrev=False)
    _add_model(generate)
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max_new_tokens", default="60", help="60; 0 with --show_surprise: the prompt alone")
    generate.add_argument("--temperature", default="0.8", help="0.8; 0 takes the most probable token")
    generate.add_argument("--top_k", default="40", help="sample from so many most probable tokens (40); 0: from all")
    generate.add_argument("--seed", default="0", help="of the sampling (0)")
    generate.add_argument(
        "--show_surprise",
        action="store_true",
        help="then print how surprising each token is, in nats: given its past, and for duo_predict also given its "
        "past and its right neighbour",
    )

    evaluate = commands.add_parser("evaluate", help="perplexity of a model on a text", allow_abbrev=False)
    _add_model(evaluate)
    evaluate.add_argument("--dataset", required=True, help="as for training: a file, a folder, a Hub id, builtin, ...")
    evaluate.add_argument(
        "--split",
        choices=("validation", "train", "all"),
        help="validation, train: the blocks a training run on this --dataset would use; all: everything (default: all "
        "of a single file, else validation)",
    )
    evaluate.add_argument("--block_size", help="tokens per window (default: what the model was trained with)")
    evaluate.add_argument(
        "--stride",
        help="tokens from one window to the next (default: the block size, as in training; less gives each token more "
        "context)",
    )
    evaluate.add_argument("--batch_size", default="8", help="windows per forward pass (8)")
    evaluate.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    export = commands.add_parser("export", help="make a model folder of a checkpoint, on the CPU", allow_abbrev=False)
    export.add_argument(
        "--checkpoint", type=Path, required=True, help="a run's folder (its newest whole checkpoint), or a checkpoint"
    )
    export.add_argument("--output_dir", type=Path, required=True, help="a new folder")

    prepare = commands.add_parser(
        "prepare", help="tokenise and cut a data set once, for a folder or the Hub", allow_abbrev=False
    )
    prepare.add_argument("--dataset", required=True, help="as for training: a file, a folder, a Hub id, builtin, ...")
    prepare.add_argument("--tokenizer", required=True, help="a folder, a Hub id, or builtin")
    prepare.add_argument(
        "--block_size",
        default="1024",
        help="tokens per block (1024); training with another one cuts the blocks anew, as one stream of tokens",
    )
    prepare.add_argument("--output_dir", type=Path, help="a new folder, which --dataset takes")
    prepare.add_argument("--push_to_hub", action="store_true", help="push it to the Hugging Face Hub")
    prepare.add_argument("--hub_dataset_id", help="name, or namespace/name, on the Hub")
    prepare.add_argument("--hub_private", action="store_true", help="nobody else sees it on the Hub")

    report = commands.add_parser("report", help="a run's figures, and its plot anew")
    report.add_argument("runs", type=Path, nargs="+", help="run folders, such as runs/duo_predict")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="a model folder, such as runs/duo_predict/model")
    parser.add_argument("--tokenizer", help="a folder or a Hub id (default: the model's folder)")


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code: 0, 1 for a push that failed, 2 for faults in what was asked, 130 after Ctrl-C."""
    try:
        arguments = make_parser().parse_args(argv)
        code = COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
    except (Faults, DataError, FileNotFoundError) as err:
        print("\n".join(f"error: {line}" for line in str(err).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone, as with `| head`; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code or 0


def _number(arguments, name: str, kind: type, ok: Callable[[Any], bool], what: str, faults: list[str]) -> Any:
    """The option `name` as a number; None, with a line in `faults`, where it is not one that is allowed."""
    text = getattr(arguments, name)
    try:
        value = kind(text)
    except ValueError:
        faults.append(f"--{name} {text}: not {'a whole number' if kind is int else 'a number'}")
        return None
    if not ok(value):
        faults.append(f"--{name} {text}: {what}")
        return None
    return value


def _list(_) -> None:
    from .registry import VARIANTS

    rows = [("name", "family", "parameters*", "block size", "idea")]
    for v in VARIANTS.values():
        rows.append((v.name, v.family, f"{v.num_parameters():,}", str(v.block_size), v.summary))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, family, parameters, block_size, idea in rows:
        print(
            f"{name:<{widths[0]}}  {family:<{widths[1]}}  {parameters:>{widths[2]}}  {block_size:>{widths[3]}}  {idea}"
        )
    print("* at GPT-2 Medium size, with GPT-2's vocabulary")


def _generate(arguments) -> None:
    from .inference import SavedModel, surprise_table

    faults: list[str] = []
    least = 0 if arguments.show_surprise else 1
    options = {
        "max_new_tokens": (int, lambda v: v >= least, f"at least {least} is needed"),
        # Logits divided by less would overflow.
        "temperature": (float, lambda v: v == 0 or 1e-3 <= v < math.inf, "0, or 0.001 and more, is allowed"),
        "top_k": (int, lambda v: v >= 0, "0 or more is needed"),
        "seed": (int, lambda v: 0 <= v < 2**32, "0 to 4294967295 is allowed"),
    }
    numbers = {name: _number(arguments, name, *rule, faults) for name, rule in options.items()}
    try:
        saved = SavedModel(arguments.model, arguments.tokenizer)
        prompt = saved.encode(arguments.prompt)
        if numbers["max_new_tokens"] == 0 and prompt.shape[1] < 2:
            faults.append("--show_surprise: the prompt is one token; at least 2 are needed, or --max_new_tokens 1")
    except Faults as err:
        faults += err.lines
    if faults:
        raise Faults(faults)
    if numbers["max_new_tokens"]:
        ids = saved.generate(prompt, **numbers, stream=True)
        if ids.shape[1] == saved.config.n_positions < prompt.shape[1] + numbers["max_new_tokens"]:
            print(f"note: stopped at the model's {saved.config.n_positions} positions", file=sys.stderr)
    else:
        ids = prompt
    if arguments.show_surprise:
        print(f"\n{surprise_table(saved, ids, prompt.shape[1])}")


def _evaluate(arguments) -> None:
    import torch

    from .data import check_source
    from .evaluation import describe
    from .inference import SavedModel, evaluate_dataset

    faults: list[str] = []
    saved, most, allowed = None, math.inf, "2 or more is allowed"
    try:
        saved = SavedModel(arguments.model, arguments.tokenizer, getattr(torch, arguments.dtype))
        most = saved.config.n_positions
        allowed = f"2 to the model's {most} positions is allowed"
    except Faults as err:
        faults += err.lines
    faults += check_source(arguments.dataset, tokenizer=None)
    batch_size = _number(arguments, "batch_size", int, lambda v: v >= 1, "at least 1 is needed", faults)
    block_size = saved and saved.block_size
    if arguments.block_size is not None:
        block_size = _number(arguments, "block_size", int, lambda v: 2 <= v <= most, allowed, faults)
    stride = block_size
    if arguments.stride is not None:
        longest = block_size or math.inf
        what = (
            f"1 to the block size{f' of {block_size}' if block_size else ''} is allowed, so that no token is left out"
        )
        stride = _number(arguments, "stride", int, lambda v: 1 <= v <= longest, what, faults)
    if faults:
        raise Faults(faults)
    facts = evaluate_dataset(saved, arguments.dataset, arguments.split, block_size, stride, batch_size)
    if arguments.json:
        print(json.dumps(facts))
        return
    first, *others = describe(facts)
    print(f"model       {arguments.model}, {arguments.dtype} on {facts['device']}")
    print(f"text        {arguments.dataset}, {facts['split']}: {facts['num_tokens']:,} tokens")
    print(f"windows     {facts['num_windows']:,} of {facts['window_size']} tokens, stride {stride}")
    print(f"next token  {first}")
    print("\n".join(others), end="\n" if others else "")


def _export(arguments) -> None:
    from .hub import export_checkpoint

    checkpoint = export_checkpoint(arguments.checkpoint, arguments.output_dir)
    print(f"exported {checkpoint} to {arguments.output_dir}")


def _prepare(arguments) -> int:
    from .prepared_data import Request, faults, prepare

    lines: list[str] = []
    block_size = _number(arguments, "block_size", int, lambda v: v >= 2, "at least 2 is needed", lines)
    given = {name: value for name, value in vars(arguments).items() if name != "command"}
    request = Request(**given | {"block_size": block_size})
    lines += faults(request)
    if lines:
        raise Faults(lines)
    return prepare(request)


def _report(arguments) -> None:
    from .report import plot, summary

    for folder in arguments.runs:
        print(summary(folder))
        print(f"plot        {plot(folder)}")


COMMANDS = {
    "list": _list,
    "generate": _generate,
    "evaluate": _evaluate,
    "export": _export,
    "prepare": _prepare,
    "report": _report,
}

if __name__ == "__main__":
    sys.exit(main())
