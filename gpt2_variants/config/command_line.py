"""The command line of train_ds.py."""

import argparse
import dataclasses
import functools
import json
import shutil
from typing import Any, NoReturn

from ..faults import UsageError
from ..registry import VARIANTS
from .checks import faults
from .options import Options
from .presets import PRESETS
from .resolve import resolve


class Parser(argparse.ArgumentParser):
    """Help in the width of the terminal, at most 100 columns; what cannot be parsed raises `UsageError`."""

    def __init__(self, **kwargs: Any):
        width = min(100, shutil.get_terminal_size().columns)
        layout = functools.partial(argparse.RawDescriptionHelpFormatter, width=width, max_help_position=36)
        super().__init__(formatter_class=layout, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError`, with where the help is."""
        raise UsageError([f"{message} (see --help)"])


# what an option is where the preset does not say it
ELSEWHERE = {
    "block_size": "the variant's",
    **dict.fromkeys(("train_batch_size", "learning_rate", "weight_decay"), "the DeepSpeed JSON's"),
}

METAVARS: dict[Any, str] = {int: "N", float: "X", str: "NAME", dict: "FIELD=VALUE"}

EPILOG = """\
examples:
  deepspeed train_ds.py --variant duo_predict
  python train_ds.py --variant gpt2 --preset demo --max_steps 100 --report_to none

exit codes: 0 finished; 2 faults in what was asked, one line each; 3 the loss was not finite;
130, 143 stopped by a signal, a checkpoint saved; 1 anything else. README.md, "Train", says more."""


def make_parser(program: str = "deepspeed train_ds.py") -> argparse.ArgumentParser:
    """The parser of train_ds.py. Values stay strings: `parse` converts them, so that all faults are told at once."""
    parser = Parser(
        usage=f"{program} --variant NAME [options]",
        description="Train one GPT-2 variant with DeepSpeed.",
        epilog=EPILOG,
        add_help=False,
    )
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(Options):
        title = f.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        group = groups[title]
        metavar, help_text = METAVARS.get(f.type, ""), f.metadata["help"]
        if f.metadata["choices"]:
            if len(compact := "|".join(f.metadata["choices"])) <= 24:
                metavar = compact
            else:
                help_text += f": {', '.join(f.metadata['choices'])}"
        help_text = (help_text + _default_text(f)).replace("%", "%%")
        if f.type is bool:
            action = argparse.BooleanOptionalAction if f.default is None else "store_true"
            group.add_argument(f"--{f.name}", action=action, default=None, help=help_text)
        elif f.type is dict:
            group.add_argument(f"--{f.name}", nargs="*", metavar=metavar, help=help_text)
        else:
            group.add_argument(f"--{f.name}", metavar=metavar, help=help_text)
    group.add_argument("-h", "--help", action="help", help="print this, and end")
    # DeepSpeed's launcher passes it; the environment has it too
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser


def _default_text(f: dataclasses.Field) -> str:
    """An option's default, of its own or by preset, in brackets; "" where there is none, or its help says it."""
    if f.default:
        return f" (default: {f.default})"
    said = {preset: values.get(f.name, ELSEWHERE.get(f.name)) for preset, values in PRESETS.items()}
    said = {preset: value for preset, value in said.items() if value is not None}
    if not said or f.type is dict:
        return ""
    if len(said) == len(PRESETS) and len(set(said.values())) == 1:
        return f" (default: {said.popitem()[1]})"
    return f" (default: {', '.join(f'{preset} {value}' for preset, value in said.items())})"


def parse(argv: list[str] | None = None, program: str = "deepspeed train_ds.py") -> Options:
    """The run that the command line asks for, resolved and checked. Raises `UsageError` with every fault at once."""
    given = vars(make_parser(program).parse_args(argv))
    given.pop("local_rank")
    values, lines = {}, []
    for f in dataclasses.fields(Options):
        if (text := given[f.name]) is None:
            continue
        try:
            values[f.name] = _convert(f, text)
        except ValueError as err:
            lines.append(f"--{f.name} {err}")
    if given["variant"] is None:
        lines.append(f"--variant is required: one of {', '.join(VARIANTS)}")
    if "variant" not in values or (given["preset"] is not None and "preset" not in values):
        raise UsageError(lines)
    run = resolve(Options(**values))
    lines += faults(run)
    if lines:
        raise UsageError(lines)
    return run


def _convert(f: dataclasses.Field, text: Any) -> Any:
    choices = f.metadata["choices"]
    if f.type is bool:
        return text
    if f.type is dict:
        pairs = {}
        for item in text:
            key, sep, value = item.partition("=")
            if not sep or not key:
                raise ValueError(f"{item}: not of the form FIELD=VALUE, as in n_layer=8")
            try:
                pairs[key] = json.loads(value)
            except json.JSONDecodeError:
                pairs[key] = {"True": True, "False": False, "None": None}.get(value, value)
        return pairs
    if choices and text not in choices:
        raise ValueError(f"{text}: not known; one of {', '.join(choices)}")
    if f.type in (int, float):
        try:
            return f.type(text)
        except ValueError:
            raise ValueError(f"{text}: not {'a whole number' if f.type is int else 'a number'}") from None
    if not text:
        raise ValueError("is empty: leave the option out, or give a value")
    return text
