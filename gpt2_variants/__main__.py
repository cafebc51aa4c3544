"""The commands, as `gpt2-variants COMMAND` or `python -m gpt2_variants COMMAND`: train, list, generate and others."""

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config.command_line import Parser
from .config.options import checked, option_fields
from .data import DataError, Reading
from .faults import UsageError
from .train_command import leave
from .train_command import main as train

_PROGRAM = "python -m gpt2_variants"
READING = frozenset(f.name for f in dataclasses.fields(Reading))  # options that say how a source is read

EPILOG = """\
examples:
  python -m gpt2_variants train --variant duo_predict
  deepspeed --module gpt2_variants train --variant duo_predict
  python -m gpt2_variants generate --model runs/duo_predict/model --prompt "The following statement"
  python -m gpt2_variants evaluate --model runs/duo_predict/model --dataset my.txt

`python -m gpt2_variants COMMAND --help` lists a command's options.
`gpt2-variants` is the same command. exit codes: 0 done; 2 faults in what was asked, one line each;
130 stopped by Ctrl-C; 1 a push that failed, or anything else. `train` has two more: see its help."""


def make_parser() -> argparse.ArgumentParser:
    """The parser. Numbers stay strings: the commands convert them, so that all faults are told at once."""
    parser = Parser(prog=_PROGRAM, usage=f"{_PROGRAM} COMMAND [options]", epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    def add(name: str, usage: str, help: str) -> argparse.ArgumentParser:
        usage = f"{_PROGRAM} {name} {usage}".rstrip()
        return commands.add_parser(name, usage=usage, help=help, description=f"{help[0].upper()}{help[1:]}.")

    add("train", "--variant NAME [options]", help="train a variant, as train_ds.py does")  # `main` hands it on
    add("list", "", help="the variants that can be trained")

    check = add("check", "NAME|FILE [--quick] [--json]", help="whether a variant keeps what every variant promises")
    check.add_argument("variant", metavar="NAME|FILE", help="a variant of the package, or a file or module of your own")
    check.add_argument("--quick", action="store_true", help="in some 20 seconds: fewer positions, modes and promises")
    check.add_argument("--json", action="store_true", help="print one JSON object")

    generate = add(
        "generate", "--model FOLDER --prompt TEXT [options]", help="continue a prompt with an exported model"
    )
    _add_model(generate)
    generate.add_argument("--prompt", metavar="TEXT", required=True, help="what to continue")
    _add_number(generate, "--max_new_tokens", "60", "tokens to add; 0 with --show_surprise: the prompt alone")
    _add_number(generate, "--temperature", "0.8", "divides the logits; 0 takes the most probable token", metavar="X")
    _add_number(generate, "--top_k", "40", "sample from so many most probable tokens; 0: from all")
    _add_number(generate, "--seed", "0", "of the sampling")
    generate.add_argument(
        "--show_surprise",
        action="store_true",
        help="then print how surprising each token is, in nats: given its past, and for duo_predict also given its "
        "past and its right neighbour",
    )

    evaluate = add("evaluate", "--model FOLDER --dataset NAME [options]", help="perplexity of a model on a text")
    _add_model(evaluate)
    evaluate.add_argument(
        "--dataset", metavar="NAME", required=True, help="as for training: a file, a folder, a Hub id, builtin, ..."
    )
    evaluate.add_argument(
        "--split",
        choices=("validation", "train", "all"),
        metavar="validation|train|all",
        help="validation, train: the blocks a training run on this --dataset would use; all: everything (default: all "
        "of a single file, else validation)",
    )
    evaluate.add_argument(
        "--block_size", metavar="N", help="tokens per window (default: what the model was trained with)"
    )
    evaluate.add_argument(
        "--stride",
        metavar="N",
        help="tokens from one window to the next (default: the block size, as in training; less gives each token more "
        "context)",
    )
    _add_number(evaluate, "--batch_size", "8", "windows per forward pass")
    evaluate.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        metavar="float32|bfloat16",
        help="of the weights (default: float32)",
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")

    usage = "--checkpoint FOLDER --output_dir FOLDER"
    export = add("export", usage, help="make a model folder of a checkpoint, on the CPU")
    export.add_argument(
        "--checkpoint",
        metavar="FOLDER",
        type=Path,
        required=True,
        help="a run's folder (its newest whole checkpoint), or a checkpoint",
    )
    export.add_argument("--output_dir", metavar="FOLDER", type=Path, required=True, help="a new folder")

    usage = "--dataset NAME --tokenizer NAME [options]"
    prepare = add("prepare", usage, help="tokenise and cut a data set once, for a folder or the Hub")
    prepare.add_argument(
        "--dataset", metavar="NAME", required=True, help="as for training: a file, a folder, a Hub id, builtin, ..."
    )
    prepare.add_argument("--tokenizer", metavar="NAME", required=True, help="a folder, a Hub id, or builtin")
    _add_number(prepare, "--block_size", "1024", "tokens per block; training with another cuts the blocks anew")
    _add_reading(prepare)
    prepare.add_argument("--output_dir", metavar="FOLDER", type=Path, help="a new folder, which --dataset takes")
    prepare.add_argument("--push_to_hub", action="store_true", help="push it to the Hugging Face Hub")
    prepare.add_argument("--hub_dataset_id", metavar="NAME", help="name, or namespace/name, on the Hub")
    prepare.add_argument("--hub_private", action="store_true", help="nobody else sees it")

    data = add("data", "SOURCE [options]", help="what would be trained on: files, column, splits, blocks as text")
    data.add_argument("dataset", metavar="SOURCE", help="as --dataset for training")
    data.add_argument(
        "--tokenizer", metavar="NAME", default="builtin", help="a folder, a Hub id, or builtin (default: builtin)"
    )
    _add_number(data, "--block_size", "1024", "tokens per block")
    _add_reading(data)

    push = add("push", "RUN [options]", help="push a finished run's model/ to the Hugging Face Hub")
    push.add_argument("run", metavar="RUN", type=Path, help="the run's folder, such as runs/duo_predict")
    push.add_argument(
        "--hub_model_id",
        metavar="NAME",
        help="name, or namespace/name (default: the run's, else its folder's name)",
    )
    push.add_argument("--hub_private", action="store_true", default=None, help="nobody else sees it")

    usage = "RUN [RUN ...] [--output_dir FOLDER]"
    report = add("report", usage, help="runs beside one another: figures, curves, what the models learned")
    report.add_argument(
        "runs",
        metavar="RUN",
        type=Path,
        nargs="+",
        help="run folders, such as runs/gpt2 runs/duo_predict, or model folders",
    )
    report.add_argument(
        "--output_dir",
        metavar="FOLDER",
        type=Path,
        help="where report.html and report.md go (default: report, in the folder of them all)",
    )
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="FOLDER", type=Path, required=True, help="a model folder, such as runs/duo_predict/model"
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="a folder or a Hub id (default: the model's folder)")
    parser.add_argument(
        "--variant", metavar="FILE", help="the file or module of a variant of your own (default: the run's copy of it)"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code that lies in the model folder, of any author"
    )


def _add_reading(parser: argparse.ArgumentParser) -> None:
    """The options of reading, as for training."""
    for f in option_fields():
        if f.name in READING:
            parser.add_argument(f"--{f.name}", metavar="X", help=f.metadata["help"])


def _add_number(parser: argparse.ArgumentParser, name: str, default: str, help: str, metavar: str = "N") -> None:
    parser.add_argument(name, metavar=metavar, default=default, help=f"{help} (default: {default})")


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code: 0, 1 for a push that failed, 2 for faults in what was asked, 130 after Ctrl-C.

    `train` has the exit codes of `train_command.main`.
    """
    words = sys.argv[1:] if argv is None else argv
    # `deepspeed --module gpt2_variants train` puts its --local_rank=N before the command; the environment has it too.
    told = next((i for i, word in enumerate(words) if not word.startswith("--local_rank=")), len(words))
    if words[told : told + 1] == ["train"]:
        return train(words[told + 1 :], f"{_PROGRAM} train")
    try:
        arguments = make_parser().parse_args(argv)
        code = COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
    except (UsageError, DataError, FileNotFoundError) as err:
        print("\n".join(f"error: {line}" for line in str(err).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has gone, as with `| head`; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code or 0


def _number(
    arguments: argparse.Namespace, name: str, kind: type, ok: Callable[[Any], bool], what: str, faults: list[str]
) -> Any:
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


def _list(_: argparse.Namespace) -> None:
    from .registry import VARIANTS

    rows = [("name", "family", "parameters*", "block size", "idea")]
    for v in VARIANTS.values():
        parameters = f"{v.medium_parameters or v.num_parameters():,}"
        rows.append((v.name, v.family, parameters, str(v.block_size), v.summary))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, family, parameters, block_size, idea in rows:
        print(
            f"{name:<{widths[0]}}  {family:<{widths[1]}}  {parameters:>{widths[2]}}  {block_size:>{widths[3]}}  {idea}"
        )
    print("* at GPT-2 Medium size, with GPT-2's vocabulary")


def _check(arguments: argparse.Namespace) -> int:
    from .contract import BROKEN, Subject, ask, keeps_all, listed
    from .variant_code import VariantError, find

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


def _generate(arguments: argparse.Namespace) -> None:
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
        saved = SavedModel(
            arguments.model,
            arguments.tokenizer,
            variant=arguments.variant,
            trust_remote_code=arguments.trust_remote_code,
        )
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


def _evaluate(arguments: argparse.Namespace) -> None:
    import torch

    from .data import check_source
    from .evaluation import describe
    from .inference import SavedModel, evaluate_dataset

    faults: list[str] = []
    saved, most, allowed = None, math.inf, "2 or more is allowed"
    try:
        dtype, trusts = getattr(torch, arguments.dtype), arguments.trust_remote_code
        saved = SavedModel(arguments.model, arguments.tokenizer, dtype, arguments.variant, trusts)
        most = saved.config.n_positions
        allowed = f"2 to the model's {most} positions is allowed"
    except UsageError as err:
        faults += err.lines
    faults += check_source(arguments.dataset, tokenizer=None)
    batch_size = _number(arguments, "batch_size", int, lambda v: v >= 1, "at least 1 is needed", faults)
    block_size: Any = saved and saved.block_size
    if arguments.block_size is not None:
        block_size = _number(arguments, "block_size", int, lambda v: 2 <= v <= most, allowed, faults)
    stride = block_size
    if arguments.stride is not None:
        longest = block_size or math.inf
        what = (
            f"1 to the block size{f' of {block_size}' if block_size else ''} is allowed, so that no token is left out"
        )
        stride = _number(arguments, "stride", int, lambda v: 1 <= v <= longest, what, faults)
    if faults or saved is None:
        raise UsageError(faults)
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


def _export(arguments: argparse.Namespace) -> None:
    from .hub import export_checkpoint

    checkpoint = export_checkpoint(arguments.checkpoint, arguments.output_dir)
    print(f"exported {checkpoint} to {arguments.output_dir}")


def _reading(arguments: argparse.Namespace, faults: list[str]) -> Reading:
    """The options of reading; with a line in `faults` for each that has no such value."""
    values = {}
    for f in option_fields():
        if f.name in READING and (text := getattr(arguments, f.name)) is not None:
            try:
                values[f.name] = checked(f, text)
            except ValueError as err:
                faults.append(f"--{f.name} {err}")
    return Reading(**values)


def _data(arguments: argparse.Namespace) -> None:
    from .data import check_source, load
    from .data.preview import describe

    faults: list[str] = []
    block_size = _number(arguments, "block_size", int, lambda v: v >= 2, "at least 2 is needed", faults)
    reading = _reading(arguments, faults)
    faults += check_source(arguments.dataset, arguments.tokenizer, reading)
    if faults:
        raise UsageError(faults)
    print(describe(load(arguments.dataset, arguments.tokenizer, block_size, reading=reading)))


def _prepare(arguments: argparse.Namespace) -> int:
    from .prepared_data import Request, faults, prepare

    lines: list[str] = []
    block_size = _number(arguments, "block_size", int, lambda v: v >= 2, "at least 2 is needed", lines)
    given = {name: value for name, value in vars(arguments).items() if name not in ("command", *READING)}
    request = Request(**given | {"block_size": block_size, "reading": _reading(arguments, lines)})
    lines += faults(request)
    if lines:
        raise UsageError(lines)
    return prepare(request)


def _push(arguments: argparse.Namespace) -> int:
    from .hub import publish, push_faults

    asked = arguments.run, arguments.hub_model_id, arguments.hub_private
    if faults := push_faults(*asked):
        raise UsageError(faults)
    return publish(*asked)


def _report(arguments: argparse.Namespace) -> None:
    from .report import plot, summary, write

    report = write(arguments.runs, arguments.output_dir)
    if len(arguments.runs) == 1 and (arguments.runs[0] / "run.json").exists():
        print(summary(arguments.runs[0]))
        print(f"plot        {plot(arguments.runs[0])}")
    print(f"\n{report.text}\n")
    print(f"page        {report.page}")
    print(f"table       {report.table}")


COMMANDS = {
    "list": _list,
    "check": _check,
    "data": _data,
    "generate": _generate,
    "evaluate": _evaluate,
    "prepare": _prepare,
    "export": _export,
    "push": _push,
    "report": _report,
}

if __name__ == "__main__":
    leave(main())
