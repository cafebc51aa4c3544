"""`compare`: train variants over the same seeds, and report which is better than GPT-2."""

import argparse
import math
import shlex
import sys
from pathlib import Path
from typing import Any

from ..config.command_line import make_parser
from ..config.presets import PRESETS
from ..faults import UsageError
from ..ranks import has_cuda
from ..registry import SIZES
from ..words import counted
from .command import Command
from .shared_options import number

# Options of training that an experiment sets itself -> what to give here.
SET_HERE = {
    "variant": "--variants",
    "size": "--sizes",
    "resume_from_checkpoint": "the same command once more: it goes on",
    "push_to_hub": "the command push, of a finished run",
    "hub_model_id": "the command push, of a finished run",
    "hub_private": "the command push, of a finished run",
    "local_rank": "--gpus_per_run",
}
AXES = ("tokens", "flops", "time")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compare`, beside those of training."""
    add = parser.add_argument
    add(
        "--variants",
        metavar="NAME",
        nargs="+",
        required=True,
        help="variants, each named as --variant for training; NAME:field=value,field=value sets its config fields",
    )
    add(
        "--output_dir",
        metavar="FOLDER",
        type=Path,
        required=True,
        help="where runs and report go; a folder that holds the same experiment is continued",
    )
    add("--seeds", metavar="N", default="5", help="how many seeds, from --seed on (default: 5)")
    add("--seed", metavar="N", default="42", help="the first seed (default: 42)")
    add(
        "--learning_rates",
        metavar="X",
        nargs="+",
        default=[],
        help="choose each variant's learning rate from these, on seeds that are not reported",
    )
    add("--tuning_seeds", metavar="N", default="1", help="on how many seeds rates are chosen (default: 1)")
    add("--sizes", metavar="NAME", nargs="+", default=[], help=f"one size, or a ladder of several: {', '.join(SIZES)}")
    add(
        "--tokens_per_parameter",
        metavar="X",
        help="training tokens per parameter of GPT-2 at a size, instead of --max_steps and --num_train_epochs",
    )
    add(
        "--equal",
        metavar="MEASURE",
        nargs="+",
        default=["tokens"],
        choices=AXES,
        help="tokens, flops, time: with the latter two, further runs end at equal FLOPs or time (default: tokens)",
    )
    add("--jobs", metavar="N", help="how many runs go side by side (default: as many as there are GPUs for, or 1)")
    add("--gpus_per_run", metavar="N", help="GPUs of each run (default: 1; 0 without any)")
    add(
        "--task",
        metavar="I/N",
        default="0/1",
        help="run share I of N of the variants, counted from 0, as in a Slurm array",
    )
    add("--model_args", metavar="FIELD=VALUE", nargs="*", default=[], help="config fields of all variants")
    add("--dry_run", action="store_true", help="print what it would take, and end")


def run(arguments: argparse.Namespace) -> int:
    """Train what is missing of the experiment, and write its report."""
    training, _ = make_parser().parse_known_args(arguments.rest)  # what is not known is told where runs are planned
    faults = [
        f"--{name}: not an option of compare; give {instead}"
        for name, instead in SET_HERE.items()
        if getattr(training, name) is not None
    ]
    positive = (int, lambda v: v >= 1, "1 or more is needed")
    numbers = {name: number(arguments, name, *positive, faults) for name in ("seeds", "tuning_seeds")}
    numbers["seed"] = number(arguments, "seed", int, lambda v: v >= 0, "0 or more is needed", faults)
    rates = _rates(arguments.learning_rates, faults)
    for name in arguments.sizes:
        if name not in SIZES:
            faults.append(f"--sizes {name}: not known; one of {', '.join(SIZES)}")
    budget = None
    if arguments.tokens_per_parameter is not None:
        allowed = "more than 0 is needed"
        budget = number(arguments, "tokens_per_parameter", float, lambda v: 0 < v < math.inf, allowed, faults)
    task = _task(arguments.task, faults)
    places = _places(arguments, faults)
    if rates and training.learning_rate is not None:
        faults.append("--learning_rate: leave it out, or --learning_rates")
    twice = [f"--{name}" for name in ("max_steps", "num_train_epochs") if getattr(training, name) is not None]
    if budget and twice:
        faults.append(f"{', '.join(twice)}: leave it out, or --tokens_per_parameter")
    if len(arguments.sizes) > 1 and not rates and training.learning_rate is None:
        faults.append(
            "--sizes: several need --learning_rates, from which each variant's is chosen, or one --learning_rate"
        )

    from ..compare import Entry, Experiment, compare
    from ..compare.experiment import BASELINE, FAR_FROM_THE_SEEDS, sizes_in_order

    entries = list(dict.fromkeys(map(Entry.of, arguments.variants)))
    faults += _faults_of_variants(entries)
    if faults:
        raise UsageError(faults)
    if not any(entry.is_baseline for entry in entries):
        print(f"{BASELINE} is trained too: all are compared with it", file=sys.stderr)
        entries.insert(0, Entry(BASELINE))
    entries.sort(key=lambda entry: not entry.is_baseline)
    seeds = tuple(range(numbers["seed"], numbers["seed"] + numbers["seeds"]))
    tuning = tuple(seeds[0] + FAR_FROM_THE_SEEDS + n for n in range(numbers["tuning_seeds"]))
    experiment = Experiment(
        entries=tuple(entries),
        sizes=tuple(sizes_in_order(arguments.sizes)) or (None,),
        seeds=seeds,
        tuning_seeds=tuning if rates else (),
        rates=tuple(rates),
        equal=tuple(axis for axis in AXES if axis in ("tokens", *arguments.equal)),
        tokens_per_parameter=budget,
        model_args=tuple(_fields(arguments)),
        train_options=(*arguments.rest, *_defaults(training, entries)),
        output_dir=arguments.output_dir,
        jobs=places[0],
        gpus_per_run=places[1],
        task=task,
        command=shlex.join(["python", "-m", "gpt2_variants", *arguments.words]),
    )
    return compare(experiment, arguments.dry_run)


def _faults_of_variants(entries: list[Any]) -> list[str]:
    from ..variant_code import VariantError

    lines = []
    for entry in entries:
        try:
            _ = entry.spec
        except VariantError as err:
            lines.append(f"--variants {err}")
    return lines


def _rates(texts: list[str], faults: list[str]) -> list[float]:
    rates = set()
    for text in texts:
        try:
            rate = float(text)
        except ValueError:
            rate = 0.0
        if not 0 < rate < math.inf:
            faults.append(f"--learning_rates {text}: not a number above 0")
        rates.add(rate)
    if len(rates) == 1:
        faults.append("--learning_rates: at least two are needed to choose among; give one as --learning_rate")
    return sorted(rates)


def _task(text: str, faults: list[str]) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if number.isdigit() and count.isdigit() and int(number) < int(count):
        return int(number), int(count)
    faults.append(f"--task {text}: I/N is needed, with I from 0 to N - 1")
    return 0, 1


def _places(arguments: argparse.Namespace, faults: list[str]) -> tuple[int, int]:
    """Return how many runs go side by side, and the GPUs of each."""
    from ..compare.runner import visible_gpus

    here = len(visible_gpus())
    gpus: Any = min(1, here)
    if arguments.gpus_per_run is not None:
        gpus = number(
            arguments,
            "gpus_per_run",
            int,
            lambda v: 0 <= v <= here,
            f"0 to {here} is allowed: this machine has so many",
            faults,
        )
    most = here // gpus if gpus else None
    jobs: Any = most or 1
    if arguments.jobs is not None:
        allowed = (
            "1 or more is needed"
            if most is None
            else f"1 to {most} is allowed: {counted(here, 'GPU')}, {gpus} for each run"
        )
        jobs = number(arguments, "jobs", int, lambda v: v >= 1 and (most is None or v <= most), allowed, faults)
    return jobs, gpus


def _fields(arguments: argparse.Namespace) -> list[str]:
    """Return the config fields of all runs; where a preset would give one size of a ladder its own, print GPT-2's."""
    given = {field.split("=")[0] for field in arguments.model_args}
    if len(arguments.sizes) < 2:
        return arguments.model_args
    from transformers import GPT2Config

    of_presets = {name for preset in PRESETS.values() for name in preset.get("model_args", {})}
    chosen = [f"{name}={getattr(GPT2Config(), name)}" for name in sorted(of_presets - given)]
    if chosen:
        print(f"compare sets --model_args {' '.join(chosen)} for all sizes", file=sys.stderr)
    return [*arguments.model_args, *chosen]


def _defaults(training: argparse.Namespace, entries: list[Any]) -> list[str]:
    """Return the options of training that an experiment sets because they were not given, and print them."""
    preset = training.preset or ("seed" if has_cuda() else "demo")
    defaults = {"preset": preset, "report_to": "none", "save_total_limit": "1"}
    sizes = {entry.spec.block_size for entry in entries}
    if len(sizes) > 1 and "block_size" not in PRESETS.get(preset, {}):
        defaults["block_size"] = str(min(sizes))
    missing = [(name, value) for name, value in defaults.items() if getattr(training, name) is None]
    chosen = [word for name, value in missing for word in (f"--{name}", value)]
    if chosen:
        print(f"compare sets {' '.join(chosen)} for all runs", file=sys.stderr)
    return chosen


COMMAND = Command(
    "compare",
    "--variants NAME [NAME ...] --output_dir FOLDER [options]",
    "whether variants are better than GPT-2: train them over the same seeds; takes train's options too",
    add_arguments,
    run,
    takes_options_of_training=True,
)
