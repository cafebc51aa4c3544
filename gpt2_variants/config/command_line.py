"""The command line of train_ds.py."""

import argparse
import dataclasses
import difflib
import functools
import json
import shutil
from typing import Any, NoReturn

from ..faults import UsageError
from ..registry import VARIANTS
from .checks import faults
from .options import Options, checked, option_fields
from .presets import PRESETS
from .resolve import resolve
from .saved_run import go_on

PROGRAM = "deepspeed train_ds.py"


class Parser(argparse.ArgumentParser):
    """Help in the width of the terminal, at most 100 columns; what cannot be parsed raises `UsageError`."""

    def __init__(self, **kwargs: Any):
        width = min(100, shutil.get_terminal_size().columns)
        layout = functools.partial(argparse.RawDescriptionHelpFormatter, width=width, max_help_position=36)
        super().__init__(formatter_class=layout, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError`, with where the help is."""
        raise UsageError([f"{message} (see --help)"])


# What an option is where the preset does not say it.
ELSEWHERE = {
    "block_size": "the variant's",
    **dict.fromkeys(
        "train_batch_size learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm "
        "lr_scheduler_type".split(),
        "the JSON's",
    ),
}

# What to give here -> names for it in other trainers, Hugging Face's before all.
INSTEAD = {
    "--learning_rate": "lr",
    "--num_train_epochs": "epochs num_epochs",
    "--max_steps": "max_train_steps",
    "--train_batch_size": "batch_size",
    "--per_device_train_batch_size": "per_gpu_train_batch_size",
    "--per_device_eval_batch_size": "per_gpu_eval_batch_size eval_batch_size",
    "--max_grad_norm": "gradient_clipping clip_grad",
    "--warmup_steps": "num_warmup_steps",
    "--lr_scheduler_type": "lr_scheduler scheduler",
    "--deepspeed_config": "deepspeed config",
    "--variant": "model model_type",
    "--init_from": "model_name_or_path",
    "--tokenizer": "tokenizer_name",
    "--dataset": "dataset_name train_file data",
    "--block_size": "max_seq_length max_length seq_length",
    "--model_args": "config_overrides config_name",
    "--output_dir": "run_name logging_dir out_dir",
    "--resume_from_checkpoint": "resume",
    "--compile": "torch_compile torch_compile_backend torch_compile_mode",
    "--seed": "data_seed",
    "--hub_private": "hub_private_repo",
    "--attn_implementation": "attn_impl",
    "--deterministic": "full_determinism use_deterministic_algorithms",
    "--bf16, or --no-bf16 for float32": "fp16 fp16_full_eval bf16_full_eval half_precision_backend",
    "--eval_steps: it evaluates every so many": "eval_strategy evaluation_strategy do_eval",
    "--save_steps: it saves every so many": "save_strategy",
    "--logging_steps: it logs every so many": "logging_strategy",
    "--load_best_model_at_end: the lowest validation loss": "metric_for_best_model greater_is_better",
    "a new --output_dir: a run is never overwritten": "overwrite_output_dir",
    "nothing: training is what this command does": "do_train",
    "an optimizer section in --deepspeed_config": "optim optim_args adafactor",
    "it to the launcher: deepspeed --hostfile FILE train_ds.py ...": "num_nodes hostfile include exclude",
}
OTHER_NAMES = {name: instead for instead, names in INSTEAD.items() for name in names.split()}

METAVARS: dict[Any, str] = {int: "N", float: "X", str: "NAME", dict: "FIELD=VALUE"}

EPILOG = """\
example:
  python train_ds.py --variant gpt2 --preset demo --max_steps 100 --report_to none

exit codes: 0 finished; 2 faults in what was asked, a line each; 3 the loss was not finite; 128 + n
stopped by signal n, checkpoint saved; 1 anything else. More: gpt2_variants/training/README.md"""


def make_parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Return the parser of train_ds.py. Values stay text: `parse` converts them and tells all faults at once."""
    parser = Parser(
        usage=f"{program} --variant NAME [options]",
        description="Train one GPT-2 variant with DeepSpeed.",
        epilog=EPILOG,
        add_help=False,
    )
    groups: dict[str, Any] = {}
    for f in option_fields():
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
            # as in transformers: --x, --x true, --no_x; and as argparse has it: --no-x
            group.add_argument(f"--{f.name}", nargs="?", const="true", metavar="BOOL", help=help_text)
            off = [f"--no-{f.name}", f"--no_{f.name}"]
            group.add_argument(*off, dest=f.name, action="store_const", const="false", help=argparse.SUPPRESS)
        elif f.type is tuple:
            group.add_argument(f"--{f.name}", nargs="+", metavar="NAME", help=help_text)
        elif f.type is dict:
            group.add_argument(f"--{f.name}", nargs="*", metavar=metavar, help=help_text)
        else:
            group.add_argument(f"--{f.name}", metavar=metavar, help=help_text)
    group.add_argument(
        "--num_gpus", metavar="N", help="GPUs of this machine, or CPU processes, by DeepSpeed's launcher"
    )
    group.add_argument("-h", "--help", action="help", help="print this, and end")
    # DeepSpeed's launcher passes it; the environment has it too
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser


def split_num_gpus(words: list[str]) -> tuple[str | None, list[str]]:
    """Return the value of `--num_gpus` in a command line, None where it is not asked for; and the other words."""
    parser = Parser(add_help=False)
    parser.add_argument("--num_gpus")
    known, rest = parser.parse_known_args(words)
    return known.num_gpus, rest


def _default_text(f: dataclasses.Field) -> str:
    """Return an option's default, of its own or by preset, in brackets; "" where there is none, or its help says it."""
    if f.default:
        return f" (default: {' '.join(f.default) if isinstance(f.default, tuple) else f.default})"
    said = {preset: values.get(f.name, ELSEWHERE.get(f.name)) for preset, values in PRESETS.items()}
    said = {preset: value for preset, value in said.items() if value is not None}
    if not said or f.type is dict:
        return ""
    if len(said) == len(PRESETS) and len(set(said.values())) == 1:
        return f" (default: {said.popitem()[1]})"
    return f" (default: {', '.join(f'{preset} {value}' for preset, value in said.items())})"


def parse(argv: list[str] | None = None, program: str = PROGRAM) -> Options:
    """Return the run that the command line asks for, resolved and checked. Raises `UsageError` with all faults."""
    known, unknown = make_parser(program).parse_known_args(argv)
    given = vars(known)
    given.pop("local_rank")
    lines = _unknown_faults(unknown)
    if given.pop("num_gpus") is not None:
        lines.append(
            "--num_gpus: starts a training; --dry_run goes over 1 to 1,024 GPUs without it, compare has --gpus_per_run"
        )
    values: dict[str, Any] = {}
    for f in option_fields():
        if (text := given[f.name]) is None:
            continue
        try:
            values[f.name] = _pairs(text) if f.type is dict else checked(f, text)
        except ValueError as err:
            lines.append(f"--{f.name} {err}")
    if unknown or (given["preset"] is not None and "preset" not in values):
        raise UsageError(lines)
    try:
        values = go_on(values)
    except UsageError as err:
        raise UsageError(lines + err.lines) from None
    if given["variant"] is None and "variant" not in values:
        lines.append(f"--variant is required: one of {', '.join(VARIANTS)}, or a file of your own")
    if "variant" not in values:
        raise UsageError(lines)
    options = resolve(Options(**values))
    if lines := faults(options, lines):
        raise UsageError(lines)
    return options


def _unknown_faults(words: list[str]) -> list[str]:
    """Return a line per option that is not known, with the one that was meant; and for values that belong to none."""
    names = [f.name for f in option_fields()]
    lines: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        name = word.lstrip("-").split("=", 1)[0].replace("-", "_")
        if not word.startswith("--"):
            if not before.startswith("--"):  # else it is the value of an option that is not known
                lines.append(f"unrecognized arguments: {word}; options begin with -- (see --help)")
        elif instead := OTHER_NAMES.get(name):
            lines.append(f"--{name}: not an option here; give {instead} (see --help)")
        elif near := difflib.get_close_matches(name, names, n=1, cutoff=0.7):
            lines.append(f"unrecognized arguments: {word}; did you mean --{near[0]}? (see --help)")
        else:
            lines.append(f"unrecognized arguments: {word} (see --help)")
    return lines


def _pairs(items: list[str]) -> dict[str, Any]:
    pairs = {}
    for item in items:
        key, sep, value = item.partition("=")
        if not sep or not key:
            raise ValueError(f"{item}: not of the form FIELD=VALUE, as in n_layer=8")
        try:
            pairs[key] = json.loads(value)
        except json.JSONDecodeError:
            pairs[key] = {"True": True, "False": False, "None": None}.get(value, value)
    return pairs
