"""What a day on a GPU is made of: stages of items, each of which gives rows for a table; and how large everything is.

An item is the least that is done again after a break. It is a function of a `Day`, called in a process of its stage.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from results_page import Column, Table

Row = dict[str, Any]


class Skipped(Exception):
    """An item cannot be done here; says why. It is no failure."""


@dataclass(frozen=True)
class ModelShape:
    """A small model, and the sequences that it is given."""

    n_layer: int
    n_embd: int
    n_head: int
    vocabulary: int
    tokens: int
    sequences: int

    def sizes(self) -> dict[str, int]:
        """Return the config fields of the shape."""
        return {"n_layer": self.n_layer, "n_embd": self.n_embd, "n_head": self.n_head}


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        model: where results are compared with those of a CPU in float64.
        attention: B, H, S, D of attention alone; `duo_attention` the same for duo-predict's.
        dropped: B, H, S, D where attention's dropout is looked at weight by weight.
        head: rows, channels and vocabulary of the loss head where its results are checked; `timed_head` where it is
            timed, with so many rows at once as `chunks` says.
        repeats: calls that a time is the mean of.
        training: options of throughput.py for all that is measured of training.
        rounds: in which cases are set against their references.
        together: how many blocks are compiled together.
        decoding: options of decode.py.
        run, curve: options of train_ds.py, for short runs and for the curve.
    """

    name: str
    model: ModelShape
    attention: tuple[int, int, int, int]
    duo_attention: tuple[int, int, int, int]
    dropped: tuple[int, int, int, int]
    head: tuple[int, int, int]
    timed_head: tuple[int, int, int]
    chunks: tuple[int, ...]
    repeats: int
    training: tuple[str, ...]
    rounds: int
    together: tuple[int, ...]
    decoding: tuple[str, ...]
    run: tuple[str, ...]
    curve: tuple[str, ...]


SHORT_RUN = (
    *("--preset", "demo", "--dataset", "builtin", "--tokenizer", "builtin", "--report_to", "none"),
    *("--max_steps", "12", "--save_steps", "4", "--eval_steps", "12", "--logging_steps", "1", "--size", "pico"),
    *("--learning_rate", "1e-3", "--save_total_limit", "9"),
)
FULL = Scale(
    name="full",
    model=ModelShape(n_layer=4, n_embd=1024, n_head=16, vocabulary=5003, tokens=512, sequences=2),
    attention=(64, 16, 1024, 64),
    duo_attention=(64, 16, 512, 64),
    dropped=(2, 4, 256, 64),
    head=(3000, 1024, 50_257),
    timed_head=(65_536, 1024, 50_257),
    chunks=(1024, 2048, 4096, 8192, 16_384),
    repeats=20,
    training=("--preset", "seed"),
    rounds=2,
    together=(1, 2, 4, 6, 12, 24),
    decoding=("--size", "gpt2-medium", "--dtype", "bfloat16"),
    run=SHORT_RUN,
    curve=("--preset", "seed", "--max_steps", "300", "--eval_steps", "100", "--save_steps", "300"),
)
TINY_RUN = (*SHORT_RUN, "--model_args", "n_layer=1", "n_embd=32", "n_head=2", "--train_batch_size", "4")
TINY = Scale(
    name="tiny",
    model=ModelShape(n_layer=2, n_embd=32, n_head=2, vocabulary=67, tokens=12, sequences=2),
    attention=(1, 2, 16, 16),
    duo_attention=(1, 2, 8, 16),
    dropped=(1, 2, 12, 8),
    head=(7, 16, 31),
    timed_head=(64, 16, 31),
    chunks=(16, 32),
    repeats=1,
    training=(
        *("--preset", "demo", "--model_args", "n_layer=2", "n_embd=32", "n_head=2", "--block_size", "16"),
        *("--per_device_train_batch_size", "2", "--steps", "1", "--warmup_steps", "1"),
    ),
    rounds=1,
    together=(1, 2),
    decoding=(
        *("--size", "pico", "--dtype", "float32", "--batch_sizes", "2", "--prompt_length", "8"),
        *("--new_tokens", "2", "--rounds", "1"),
    ),
    run=TINY_RUN,
    curve=TINY_RUN,
)
SCALES = {scale.name: scale for scale in (FULL, TINY)}


@dataclass(frozen=True)
class Day:
    """What all items are given: the scale by its name, and the data of the curve (None: those of its options)."""

    scale_name: str
    dataset: str | None = None
    tokenizer: str | None = None

    @property
    def scale(self) -> Scale:
        """The scale."""
        return SCALES[self.scale_name]

    @property
    def device(self) -> torch.device:
        """Where everything is measured."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Item:
    """A part of a stage.

    Attributes:
        name: within its stage.
        run: gives the rows; a row with `ok` False makes the item a failed one. Raises `Skipped`.
        seconds: about what it takes at full scale; it is not begun with less time left.
        limit: the seconds after which it is ended.
        alone: it takes most of the device's memory, which an engine may keep, and has a process of its own.
    """

    name: str
    run: Callable[[Day], list[Row]]
    seconds: int = 30
    limit: int = 300
    alone: bool = False


def one_table(title: str, columns: Sequence[Column], legend: str = "") -> Callable[[dict[str, list[Row]]], list[Table]]:
    """Return a function that makes a single table of the rows of all items."""

    def tables(rows: dict[str, list[Row]]) -> list[Table]:
        return [Table(title, columns, [row for own in rows.values() for row in own], legend)]

    return tables


@dataclass(frozen=True)
class Stage:
    """A stage.

    Attributes:
        name: on the command line.
        what: in a line.
        items: its items on a day.
        tables: item -> its rows, of those that have any, to the tables of the page.
    """

    name: str
    what: str
    items: Callable[[Day], list[Item]] = field(repr=False)
    tables: Callable[[dict[str, list[Row]]], list[Table]] = field(repr=False)
