"""What an experiment consists of: entries, sizes, seeds, and the runs that follow from them."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..registry import SIZES, Variant
from ..report.groups import BASELINE
from ..variant_code import find

FAR_FROM_THE_SEEDS = 1000  # from a reported seed to the tuning seed of its number


@dataclass(frozen=True)
class Entry:
    """A variant as it is compared.

    Attributes:
        variant: a name, a file or a module, as for training.
        fields: config fields that it is given beside the experiment's, each as "name=value".
    """

    variant: str
    fields: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str) -> "Entry":
        """Read `NAME` or `NAME:field=value,field=value`."""
        variant, _, fields = text.rpartition(":")
        return cls(variant, tuple(fields.split(","))) if variant and "=" in fields else cls(text)

    @property
    def spec(self) -> Variant:
        """The variant's record."""
        return find(self.variant)

    @property
    def label(self) -> str:
        """What it is called on the page and in folders: its name, and the fields."""
        return ",".join((self.spec.name, *self.fields))

    @property
    def is_baseline(self) -> bool:
        """Whether it is GPT-2 itself."""
        return self.variant == BASELINE and not self.fields


Unit = tuple[str | None, Entry]  # a size, and what is trained at it


@dataclass(frozen=True)
class Trial:
    """A run of the experiment.

    Attributes:
        entry: what is trained.
        size: the name of its size; None: the preset's.
        seed: of initialisation, data order and dropout.
        rate: the peak learning rate; None: what options, JSON or preset say.
        steps: optimizer steps; None: what options or preset say.
        purpose: "tuning", or "tokens", "flops" or "time": what it is equal to the baseline in.
    """

    entry: Entry
    size: str | None
    seed: int
    rate: float | None = None
    steps: int | None = None
    purpose: str = "tokens"

    @property
    def unit(self) -> Unit:
        """What is trained, at which size."""
        return self.size, self.entry

    @property
    def folder(self) -> Path:
        """Its folder, within that of the experiment."""
        kind = "tuning" if self.purpose == "tuning" else "runs"
        parts = [kind, *([self.size] if self.size else []), self.entry.label.replace("/", "_")]
        parts += [f"equal-{self.purpose}"] if self.purpose in ("flops", "time") else []
        parts += [f"rate-{self.rate:g}"] if self.purpose == "tuning" else []
        return Path(*parts, f"seed-{self.seed}")

    def __str__(self) -> str:
        told = [self.entry.label, *([self.size] if self.size else []), f"seed {self.seed}"]
        told += [f"rate {self.rate:g}"] if self.rate is not None else []
        told += {"tuning": ["tuning"], "tokens": []}.get(self.purpose, [f"equal {self.purpose}"])
        return ", ".join(told)


@dataclass(frozen=True)
class Experiment:
    """What is compared, and how.

    Attributes:
        entries: the baseline first.
        sizes: names; (None,): the preset's.
        seeds: those that are reported.
        tuning_seeds: those that learning rates are chosen on.
        rates: learning rates that are tried, in rising order; empty: none is chosen.
        equal: "tokens", and perhaps "flops" and "time": what runs are trained to be equal in.
        tokens_per_parameter: training tokens per parameter of the baseline at each size; None: what options say.
        model_args: config fields of all entries, as "name=value".
        train_options: the other options of all runs, as for training.
        output_dir: where all of it lies.
        jobs: runs side by side; gpus_per_run: GPUs of each.
        task: (number, of how many): the part of the experiment that this process runs.
        command: what was typed.
    """

    entries: tuple[Entry, ...]
    sizes: tuple[str | None, ...]
    seeds: tuple[int, ...]
    tuning_seeds: tuple[int, ...]
    rates: tuple[float, ...]
    equal: tuple[str, ...]
    tokens_per_parameter: float | None
    model_args: tuple[str, ...]
    train_options: tuple[str, ...]
    output_dir: Path
    jobs: int
    gpus_per_run: int
    task: tuple[int, int]
    command: str

    @property
    def baseline(self) -> Entry:
        """GPT-2."""
        return self.entries[0]

    @property
    def units(self) -> list[Unit]:
        """Each entry at each size, in the order in which they are run."""
        return [(size, entry) for size in self.sizes for entry in self.entries]

    def is_mine(self, unit: Unit) -> bool:
        """Return whether this process runs the entry at that size: all its runs, since its rate is chosen from them."""
        number, count = self.task
        return self.units.index(unit) % count == number

    def options(self, trial: Trial, folder: Path) -> list[str]:
        """Return the options of training that make `trial` in `folder`."""
        fields = [*self.model_args, *trial.entry.fields]
        words = ["--variant", trial.entry.variant, *self.train_options, "--seed", str(trial.seed)]
        words += ["--output_dir", str(folder)]
        words += ["--size", trial.size] if trial.size else []
        words += ["--learning_rate", f"{trial.rate!r}"] if trial.rate is not None else []
        words += ["--max_steps", str(trial.steps)] if trial.steps is not None else []
        return [*words, *(["--model_args", *fields] if fields else [])]

    def tuning(self, rates: Sequence[float]) -> Iterator[Trial]:
        """Return the runs that try `rates`, every entry at each of them, seed by seed."""
        for size in self.sizes:
            for seed in self.tuning_seeds:
                for rate in rates:
                    yield from (Trial(entry, size, seed, rate, purpose="tuning") for entry in self.entries)

    def results(self, rates: dict[Unit, float | None], purpose: str = "tokens") -> Iterator[Trial]:
        """Return the reported runs at the chosen `rates`, seed by seed, so that what time does, it does to all."""
        for size in self.sizes:
            for seed in self.seeds:
                for entry in self.entries:
                    if (size, entry) in rates:
                        yield Trial(entry, size, seed, rates[size, entry], purpose=purpose)

    def saved(self) -> str:
        """Return what decides which runs there are, as JSON, for the experiment's folder."""
        told = {**dataclasses.asdict(self), "entries": [entry.label for entry in self.entries]}
        return json.dumps({k: v for k, v in told.items() if k != "task"}, indent=2, default=str) + "\n"


def sizes_in_order(names: Sequence[str]) -> list[str]:
    """Return `names` from the smallest size to the largest, each once."""
    return [name for name in SIZES if name in names]
