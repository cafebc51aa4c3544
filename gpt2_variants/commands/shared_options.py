"""The options that several commands take, and how they are read: numbers, reading a source, opening a model."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.options import checked, option_fields
from ..data import Reading

if TYPE_CHECKING:
    from ..inference import SavedModel

READING = frozenset(f.name for f in dataclasses.fields(Reading))  # options that say how a source is read


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of opening a saved model."""
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


def open_model(arguments: argparse.Namespace, dtype: str = "float32") -> "SavedModel":
    """Return the saved model that the options of `add_model` name, its weights in `dtype`. Raises `UsageError`."""
    import torch

    from ..inference import SavedModel

    return SavedModel(
        arguments.model, arguments.tokenizer, getattr(torch, dtype), arguments.variant, arguments.trust_remote_code
    )


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options of reading, as for training."""
    for f in option_fields():
        if f.name in READING:
            parser.add_argument(f"--{f.name}", metavar="X", help=f.metadata["help"])


def reading_of(arguments: argparse.Namespace, faults: list[str]) -> Reading:
    """Return the options of reading; with a line in `faults` for each that has no such value."""
    values = {}
    for f in option_fields():
        if f.name in READING and (text := getattr(arguments, f.name)) is not None:
            try:
                values[f.name] = checked(f, text)
            except ValueError as err:
                faults.append(f"--{f.name} {err}")
    return Reading(**values)


def add_number(parser: argparse.ArgumentParser, name: str, default: str, help: str, metavar: str = "N") -> None:
    """Add a numeric option; its text is converted by `number`, so that all faults are told at once."""
    parser.add_argument(name, metavar=metavar, default=default, help=f"{help} (default: {default})")


def number(
    arguments: argparse.Namespace, name: str, kind: type, ok: Callable[[Any], bool], what: str, faults: list[str]
) -> Any:
    """Return the option `name` as a number; None, with a line in `faults`, where it is not one that is allowed."""
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
