"""What a run is: one frozen dataclass, from which the command line derives, and the DeepSpeed config it resolves to.

All faults of a run are collected and raised at once, before any model is built.
"""

import argparse
import dataclasses
import fcntl
import functools
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from . import nodes, publishing, warm_start
from .data import Data, DataError, check_source, load
from .metrics import wandb_fault
from .registry import SIZES, VARIANTS, Variant

if TYPE_CHECKING:
    from transformers import GPT2Config

LOCK = ".lock"
DS_CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"

# The recipe of the published runs (seed), and a model that trains in minutes on 2 CPU cores (demo).
# Batch, optimizer, clipping and precision of the seed recipe stand in ds_configs/.
PRESETS: dict[str, dict[str, Any]] = {
    "seed": {
        "size": "gpt2-medium",
        "dataset": "wikitext-103",
        "tokenizer": "openai-community/gpt2-medium",
        "num_train_epochs": 5.0,
        "warmup_ratio": 0.1,
        "eval_steps": 500,
        "save_steps": 500,
        "logging_steps": 100,
    },
    "demo": {
        "size": "nano",
        "dataset": "builtin",
        "tokenizer": "builtin",
        "block_size": 64,
        "max_steps": 400,
        "train_batch_size": 16,
        "learning_rate": 2e-3,
        "warmup_ratio": 0.1,
        "eval_steps": 100,
        "save_steps": 100,
        "logging_steps": 10,
        # GPT-2's 0.02 suits a width of 1024; at nano's it leaves attention flat for most of a run this short
        # (validation perplexity 360 instead of 250). Dropout costs a quarter of a CPU step.
        "model_args": {"initializer_range": 0.05, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    },
}

# The sections of a DeepSpeed JSON that have an effect here. DeepSpeed 0.19 ignores unknown ones without a word, and
# reads others that act only through calls which training does not make, or that would cut the batch in other ways.
DS_KEYS = frozenset(
    (
        "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler bf16 fp16 amp "
        "gradient_clipping zero_optimization steps_per_print wall_clock_breakdown memory_breakdown dump_state timers "
        "communication_data_type prescale_gradients gradient_predivide_factor data_types aio torch_autocast "
        "zero_allow_untested_optimizer flops_profiler tensorboard wandb csv_monitor comet comms_logger checkpoint"
    ).split()
)
DS_KEYS_INSTEAD = {
    "activation_checkpointing": "use --gradient_checkpointing",
    "compile": "use --compile",
    "seed": "use --seed",
    "zero_force_ds_cpu_optimizer": "the optimizer is DeepSpeed's own here, so it has no effect; remove it",
}
SCHEDULE_KEYS = ("warmup_type", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")


APEX = ("layer_norm", "adam", "all")


class Faults(ValueError):
    """What is wrong with what was asked: one clear line each, in `lines`."""

    def __init__(self, lines: list[str]):
        super().__init__("\n".join(lines))
        self.lines = lines


def option(default: Any = None, *, group: str, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field of `Run` that is an option of the command line. None: what the preset or the DeepSpeed JSON says."""
    return field(default=default, metadata={"group": group, "help": help, "choices": choices})


@dataclass(frozen=True)
class Run:
    """The options of a run, named as in Hugging Face's `TrainingArguments` where those have one.

    As parsed, None means "not asked for"; `resolve` fills in what the preset says.
    """

    variant: str = option(group="model", help="`python -m gpt2_variants list` says more", choices=tuple(VARIANTS))
    preset: str = option(
        "auto",
        group="what to train",
        help="seed: the recipe at full size; demo: a tiny model on the built-in corpus; "
        "auto: seed where there is a CUDA device, else demo",
        choices=("auto", *PRESETS),
    )
    dataset: str = option(
        group="what to train",
        help="wikitext-103, builtin, a file or folder (.txt .jsonl .parquet, or saved by `datasets`), or a Hub id",
    )
    tokenizer: str = option(
        group="what to train", help="a folder, a Hub id, or builtin: a BPE trained on the training text"
    )
    block_size: int = option(group="what to train", help="tokens per sequence")
    size: str = option(group="model", help="the model's size", choices=tuple(SIZES))
    model_args: dict = option(group="model", help="config fields, as in n_layer=8 resid_pdrop=0")
    init_from: str = option(
        group="model",
        help="start from a trained GPT-2 or the same variant: a folder or a Hub id; shape and tokenizer are its own",
    )
    attn_implementation: str = option(
        "sdpa",
        group="model",
        help="the attention backend",
        choices=("sdpa", "eager", "flash_attention_2", "flash_attention_3"),
    )
    deepspeed_config: str = option(group="how to train", help="a DeepSpeed JSON (default: ds_configs/zero1.json)")
    learning_rate: float = option(group="how to train", help="peak learning rate")
    weight_decay: float = option(group="how to train", help="AdamW's decay, on matrices only")
    warmup_ratio: float = option(group="how to train", help="part of the steps in which the rate rises linearly")
    train_batch_size: int = option(group="how to train", help="sequences per optimizer step, over all GPUs")
    per_device_train_batch_size: int = option(group="how to train", help="sequences per GPU and forward pass")
    num_train_epochs: float = option(group="how to train", help="passes over the training data")
    max_steps: int = option(group="how to train", help="optimizer steps; overrides the epochs")
    gradient_checkpointing: bool = option(False, group="how to train", help="recompute the blocks in the backward pass")
    compile: bool = option(
        group="how to train", help="torch.compile of the blocks and the loss (default: on CUDA, but for ZeRO 3)"
    )
    apex: str = option(group="how to train", help="NVIDIA apex's fused kernels in place of PyTorch's", choices=APEX)
    seed: int = option(42, group="how to train", help="of the initialisation, the data order and dropout")
    eval_steps: int = option(group="what comes out", help="optimizer steps between evaluations")
    save_steps: int = option(group="what comes out", help="optimizer steps between checkpoints")
    logging_steps: int = option(group="what comes out", help="optimizer steps between lines of metrics")
    save_total_limit: int = option(5, group="what comes out", help="checkpoints kept")
    output_dir: str = option(group="what comes out", help="the run's folder (default: runs/<variant>)")
    resume_from_checkpoint: str = option(
        group="what comes out", help="auto: the newest valid checkpoint of the folder, or the start; or a checkpoint"
    )
    report_to: str = option(
        "wandb",
        group="what comes out",
        help="wandb: Weights & Biases, offline without an API key; none: metrics.jsonl only",
        choices=("wandb", "none"),
    )
    push_to_hub: bool = option(
        False,
        group="what comes out",
        help="push model/ to the Hugging Face Hub afterwards; token and name are checked now",
    )
    hub_model_id: str = option(
        group="what comes out", help="name, or namespace/name, on the Hub (default: the name of the run's folder)"
    )
    hub_private: bool = option(False, group="what comes out", help="nobody else sees it on the Hub")
    dry_run: bool = option(False, group="what comes out", help="print what the run would be, and end")

    @property
    def spec(self) -> Variant:
        """The variant's record."""
        return VARIANTS[self.variant]

    @property
    def resumes(self) -> bool:
        """Whether the run goes on from a checkpoint, if there is one."""
        return self.resume_from_checkpoint is not None

    @property
    def hub_name(self) -> str:
        """What the model is called on the Hub: `--hub_model_id`, or the name of the run's folder."""
        return self.hub_model_id or Path(self.output_dir).absolute().name

    @property
    def compiles(self) -> bool:
        """Whether the blocks and the loss are compiled: as asked for, else on CUDA, but for ZeRO stage 3.

        There DeepSpeed's hooks around each module are compiled too, anew for each of them.
        """
        if self.compile is None:
            import torch

            return torch.cuda.is_available() and self.zero_stage < 3
        return self.compile

    @property
    def zero_stage(self) -> int:
        """Of the DeepSpeed JSON. Raises `Faults` where it cannot be read."""
        section = read_ds_config(self.ds_config_path()).get("zero_optimization")
        return section.get("stage", 0) if isinstance(section, dict) else 0

    def ds_config_path(self) -> Path:
        """The DeepSpeed JSON: the path given, or a name of ds_configs/, with or without `.json`."""
        given = self.deepspeed_config or "zero1.json"
        for path in (Path(given), DS_CONFIGS / given, DS_CONFIGS / f"{given}.json"):
            if path.is_file():
                return path
        return Path(given)

    def make_config(self, tokenizer_size: int) -> "GPT2Config":
        """The model's config for a tokenizer of `tokenizer_size` entries. Raises what the config class raises."""
        # As many positions as are trained: more would be exported as they were initialised.
        fields: dict[str, Any] = {"n_positions": self.block_size, "bos_token_id": None, "eos_token_id": None}
        if self.init_from is not None:
            fields |= warm_start.config_fields(self.init_from, self.spec)
        fields |= self.model_args
        config = self.spec.make_config(self.size, tokenizer_size, **fields)
        config.use_cache = False
        return config


class Parser(argparse.ArgumentParser):
    """Help in the width of the terminal, at most 100 columns; what cannot be parsed raises `Faults`."""

    def __init__(self, **kwargs: Any):
        width = min(100, shutil.get_terminal_size().columns)
        layout = functools.partial(argparse.RawDescriptionHelpFormatter, width=width, max_help_position=36)
        super().__init__(formatter_class=layout, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise `Faults`, with where the help is."""
        raise Faults([f"{message} (see --help)"])


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


def make_parser() -> argparse.ArgumentParser:
    """The parser of train_ds.py. Values stay strings: `parse` converts them, so that all faults are told at once."""
    parser = Parser(
        usage="deepspeed train_ds.py --variant NAME [options]",
        description="Train one GPT-2 variant with DeepSpeed.",
        epilog=EPILOG,
        add_help=False,
    )
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(Run):
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


def parse(argv: list[str] | None = None) -> Run:
    """The run that the command line asks for, resolved and checked. Raises `Faults` with every fault at once."""
    given = vars(make_parser().parse_args(argv))
    given.pop("local_rank")
    values, lines = {}, []
    for f in dataclasses.fields(Run):
        if (text := given[f.name]) is None:
            continue
        try:
            values[f.name] = _convert(f, text)
        except ValueError as err:
            lines.append(f"--{f.name} {err}")
    if given["variant"] is None:
        lines.append(f"--variant is required: one of {', '.join(VARIANTS)}")
    if "variant" not in values or (given["preset"] is not None and "preset" not in values):
        raise Faults(lines)
    run = resolve(Run(**values))
    lines += faults(run)
    if lines:
        raise Faults(lines)
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


def resolve(run: Run) -> Run:
    """`run` with what its preset says filled in. An explicit option wins; so does a value of an explicit JSON."""
    preset = run.preset
    if preset == "auto":
        import torch

        preset = "seed" if torch.cuda.is_available() else "demo"
        if main_rank():
            why = "a CUDA device is here" if preset == "seed" else "no CUDA device is here"
            print(f"--preset auto: {preset}, since {why}", file=sys.stderr)
    base = dict(PRESETS[preset])
    if run.deepspeed_config is not None:
        try:
            stated = read_ds_config(run.ds_config_path())
        except Faults:
            stated = {}  # told by `faults`
        base = {k: v for k, v in base.items() if k not in _stated_options(stated)}
    filled = {k: v for k, v in base.items() if k != "model_args" and getattr(run, k) is None}
    filled.setdefault("block_size", run.block_size or run.spec.block_size)
    # Asking for one of two ways to say a thing replaces the preset's other way.
    if run.max_steps is None and run.num_train_epochs is not None:
        filled.pop("max_steps", None)
    if run.train_batch_size is None and run.per_device_train_batch_size is not None:
        filled.pop("train_batch_size", None)
    if run.init_from is not None:
        filled.pop("size", None)
        filled["tokenizer"] = run.tokenizer or run.init_from
    filled["model_args"] = {**base.get("model_args", {}), **(run.model_args or {})}
    filled["output_dir"] = run.output_dir or f"runs/{run.variant}"
    return replace(run, preset=preset, **filled)


def _stated_options(ds: dict) -> set[str]:
    """The options whose values a DeepSpeed JSON fixes."""
    optimizer = ds.get("optimizer", {}).get("params", {}) if isinstance(ds.get("optimizer"), dict) else {}
    stated = {
        "train_batch_size": ds.get("train_batch_size", "auto"),
        "learning_rate": optimizer.get("lr", "auto"),
        "weight_decay": optimizer.get("weight_decay", "auto"),
    }
    return {k for k, v in stated.items() if v != "auto"}


def main_rank() -> bool:
    """Whether this process is the one that speaks (rank 0, or no launcher)."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """The number of ranks the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def read_ds_config(path: Path) -> dict:
    """The DeepSpeed JSON at `path`. Raises `Faults`."""

    def fault(what: str) -> Faults:
        return Faults([f"--deepspeed_config {path}: {what}"])

    if not path.is_file():
        shipped = ", ".join(sorted(p.name for p in DS_CONFIGS.glob("*.json")))
        raise fault(f"no such file; give a DeepSpeed JSON or one of ds_configs/: {shipped}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as err:
        raise fault(f"not valid JSON: line {err.lineno}, column {err.colno}: {err.msg}") from None
    except UnicodeDecodeError:
        raise fault("not valid JSON: not a text file") from None
    if not isinstance(config, dict):
        raise fault(f"a DeepSpeed config is a JSON object, not a {type(config).__name__}")
    return config


def faults(run: Run) -> list[str]:
    """Everything that is wrong with a resolved run and can be known before the data are read: one line each."""
    number_faults = _number_faults(run)
    model_faults = _model_faults(run)
    lines = number_faults + model_faults
    if not (run.dry_run and run.dataset == "wikitext-103"):  # a dry run knows its size without reading it
        no_tokenizer = run.tokenizer == run.init_from and model_faults  # told of --init_from already
        lines += check_source(run.dataset, None if no_tokenizer else run.tokenizer)
    try:
        if number_faults:  # numbers that are wrong cannot be filled in
            read_ds_config(run.ds_config_path())
        else:
            resolve_ds_config(run, world_size(), total_steps=1)
    except Faults as err:
        lines += err.lines
    else:
        if run.compile and run.zero_stage == 3:
            lines.append(
                "--compile: not with ZeRO stage 3, whose hooks around each module would be compiled anew for each; "
                "leave it out, or give zero1.json or zero2.json"
            )
        lines += _compiler_faults(run)
    lines += _place_faults(run)
    return lines + _installation_faults(run) + _hub_faults(run)


def _hub_faults(run: Run) -> list[str]:
    if not run.push_to_hub:
        given = [name for name in ("hub_model_id", "hub_private") if getattr(run, name)]
        return [f"--{name}: has no effect without --push_to_hub; add that, or leave it out" for name in given]
    faults = publishing.local_faults("--hub_model_id", run.hub_name)
    if not faults and main_rank():  # one question, not one of each GPU
        faults = publishing.access_faults("--hub_model_id", run.hub_name, run.hub_private)
    return faults


def _compiler_faults(run: Run) -> list[str]:
    if run.compiles and not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        return ["--compile (default on CUDA): torch.compile needs a C++ compiler; install g++, or give --no-compile"]
    return []


def _installation_faults(run: Run) -> list[str]:
    lines = [fault] if (fault := nodes.fault()) else []
    if run.report_to == "wandb" and find_spec("wandb") is None:
        lines.append("--report_to wandb: wandb is not installed; pip install wandb, or --report_to none")
    elif run.report_to == "wandb" and main_rank() and (fault := wandb_fault()):
        lines.append(f"--report_to wandb: {fault}; or --report_to none")
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(
        run.attn_implementation
    )
    if package:
        import torch

        if find_spec(package) is None or not torch.cuda.is_available():
            lines.append(
                f"--attn_implementation {run.attn_implementation}: needs a CUDA device and the package {package}; "
                "install it, or use sdpa"
            )
    if run.apex and (fault := _apex_fault()):
        lines.append(f"--apex {run.apex}: {fault}")
    return lines


def _apex_fault() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "needs a CUDA device; leave --apex out"
    # the package of that name on PyPI is another; NVIDIA's has these compiled modules beside it
    if any(find_spec(name) is None for name in ("apex", "amp_C", "fused_layer_norm_cuda")):
        return (
            "NVIDIA's apex with its CUDA extensions is not installed, and PyPI does not have it; build it (git clone "
            "https://github.com/NVIDIA/apex && cd apex && APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v "
            "--no-build-isolation .), or leave --apex out"
        )
    return None


def _number_faults(run: Run) -> list[str]:
    lines = []

    def need(ok: Callable[[Any], bool], name: str, what: str) -> None:
        value = getattr(run, name)
        if value is not None and not ok(value):
            lines.append(f"--{name} {value}: {what}")

    counts = ("block_size", "train_batch_size", "per_device_train_batch_size", "max_steps")
    for name in (*counts, "eval_steps", "save_steps", "logging_steps", "save_total_limit"):
        need(lambda v: v >= 1, name, "at least 1 is needed")
    need(lambda v: 0 < v < math.inf, "num_train_epochs", "more than 0 is needed")
    need(lambda v: 0 <= v < math.inf, "learning_rate", "0 or more is needed, and finite")
    need(lambda v: 0 <= v < math.inf, "weight_decay", "0 or more is needed, and finite")
    need(lambda v: 0 <= v <= 1, "warmup_ratio", "a part of the steps: 0 to 1")
    need(lambda v: 0 <= v < 2**32, "seed", "0 to 4294967295 is allowed")
    return lines


def _model_faults(run: Run) -> list[str]:
    from transformers.activations import ACT2FN

    if run.init_from is not None:
        if fault := warm_start.fault_of(run.init_from):
            return [fault]
        if run.size is not None:
            return [f"--size {run.size}: the model has the size of --init_from {run.init_from}; leave --size out"]
    known = run.spec.config_fields()
    lines = [
        f"--model_args {name}: {run.variant} has no such config field; it has {', '.join(known)}"
        for name in run.model_args
        if name not in known
    ]
    if lines:
        return lines
    try:
        config = run.make_config(tokenizer_size=50257)
    except Exception as err:  # the config classes raise ValueError and huggingface_hub's validation errors alike
        return [f"--model_args: {' '.join(str(err).split())}"]
    for name in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size"):
        if getattr(config, name) < 1:
            lines.append(f"--model_args {name}={getattr(config, name)}: at least 1 is needed")
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if not 0 <= getattr(config, name) < 1:
            lines.append(f"--model_args {name}={getattr(config, name)}: a probability below 1 is needed")
    if config.activation_function not in ACT2FN:
        lines.append(
            f"--model_args activation_function={config.activation_function}: one of {', '.join(sorted(ACT2FN))}"
        )
    if lines:
        return lines
    if config.n_embd % config.n_head:
        lines.append(f"--model_args n_embd={config.n_embd}: not a multiple of n_head={config.n_head}")
    if run.block_size > config.n_positions:
        lines.append(
            f"--block_size {run.block_size}: the model has {config.n_positions} positions; a block size up to that, or "
            f"--model_args n_positions={run.block_size}"
        )
    if run.block_size < 2:
        lines.append(f"--block_size {run.block_size}: at least 2 tokens are needed, one to predict the next from")
    return lines


def _place_faults(run: Run) -> list[str]:
    out = Path(run.output_dir)
    if run.dry_run:
        return []
    if out.exists() and not out.is_dir():
        return [f"--output_dir {out}: is a file; a folder is needed"]
    if (out / "run.json").exists() and not run.resumes:
        return [
            f"--output_dir {out}: holds a run already; give another folder, or go on with it by "
            "--resume_from_checkpoint auto"
        ]
    if out.is_dir() and {p.name for p in out.iterdir()} - {LOCK} and not (out / "run.json").exists():
        return [f"--output_dir {out}: is not empty and holds no run; give a new folder"]
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        return [f"--output_dir {out}: {parent} cannot be written; give another folder"]
    if run.resumes and run.resume_from_checkpoint != "auto" and not Path(run.resume_from_checkpoint).is_dir():
        return [
            f"--resume_from_checkpoint {run.resume_from_checkpoint}: no such folder; auto, or a folder "
            f"such as {out}/checkpoints/step-00000500"
        ]
    return []


def resolve_ds_config(run: Run, world: int, total_steps: int) -> dict:
    """The DeepSpeed config of a resolved run on `world` ranks, every "auto" filled in. Raises `Faults`.

    Batch: `train_batch_size` sequences an optimizer step in all, whatever `world` is; `--per_device_train_batch_size`
    alone scales it with `world` instead. Schedule: `total_steps` optimizer steps, of which ceil(warmup_ratio *
    total_steps) rise, as in transformers' Trainer.
    """
    path = run.ds_config_path()
    config = read_ds_config(path)
    lines = [
        f"--deepspeed_config {path}: section {key!r} has no effect in this training; "
        + DS_KEYS_INSTEAD.get(key, "remove or correct it")
        for key in config
        if key not in DS_KEYS
    ]
    wrong = [
        k for k in ("optimizer", "scheduler", "zero_optimization", "bf16") if not isinstance(config.get(k, {}), dict)
    ]
    lines += [f"--deepspeed_config {path}: {key!r} must be a JSON object" for key in wrong]
    if lines:
        raise Faults(lines)
    if batch_faults := _resolve_batch(run, config, world, path):
        raise Faults(batch_faults)
    _resolve_optimizer(run, config, total_steps)
    if config.get("fp16", {}).get("enabled") or config.get("amp", {}).get("enabled"):
        lines.append(f"--deepspeed_config {path}: fp16 and amp are not supported; use bf16, or neither for float32")
    lines += [
        f'--deepspeed_config {path}: "auto" at {where} cannot be filled in; give a value'
        for where in _find_auto(config)
    ]
    if lines or (lines := _engine_faults(config, path)):
        raise Faults(lines)
    return config


def use_accelerator() -> None:
    """To be called before deepspeed is imported: on a CPU it is told so, and need not warn that it found nothing."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _engine_faults(config: dict, path: Path) -> list[str]:
    """What DeepSpeed's own config classes and the optimizer would refuse in a resolved `config`, or not use."""
    use_accelerator()
    import torch
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    # DeepSpeed counts the ranks of the process group that there is, if there is one
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    batch = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * ranks
    try:
        DeepSpeedConfig({**config, "train_batch_size": batch})
    except ValidationError as err:
        return [
            f"--deepspeed_config {path}: {'.'.join([err.title, *map(str, e['loc'])])}: {e['msg']}"
            for e in err.errors(include_url=False)
        ]
    except Exception as err:  # assertions, ValueErrors and DeepSpeed's own alike
        return [f"--deepspeed_config {path}: {' '.join(str(err).split())}"]
    lines = []
    optimizer = config["optimizer"]
    if optimizer.get("type") == "AdamW" and optimizer["params"].get("torch_adam"):
        params = {k: v for k, v in optimizer["params"].items() if k != "torch_adam"}
        try:
            torch.optim.AdamW([torch.zeros(1)], **params)
        except (TypeError, ValueError, RuntimeError) as err:
            lines.append(f"--deepspeed_config {path}: optimizer.params: {' '.join(str(err).split())}")
    clipping = config.get("gradient_clipping", 1.0)
    if type(clipping) not in (int, float) or not 0 <= clipping < math.inf:
        lines.append(f"--deepspeed_config {path}: gradient_clipping {clipping!r}: 0 (none) or a positive number")
    scheduler = config.get("scheduler", {})
    if scheduler.get("type") == "WarmupDecayLR" and (unknown := sorted(set(scheduler["params"]) - {*SCHEDULE_KEYS})):
        lines.append(f"--deepspeed_config {path}: scheduler.params {', '.join(unknown)}: {', '.join(SCHEDULE_KEYS)}")
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    needed = {"offload_optimizer": 1, "offload_param": 3}
    lines += [
        f"--deepspeed_config {path}: zero_optimization.{part} has no effect at stage {stage}; from stage {least} on"
        for part, least in needed.items()
        if part in zero and stage < least
    ]
    lines += [
        f"--deepspeed_config {path}: zero_optimization.{key} has no effect at stage {stage}; remove it, or use stage 3"
        for key in zero
        if key.startswith("stage3_") and stage < 3
    ]
    return lines


def plan(run: Run, num_blocks: int) -> tuple[int, dict]:
    """The optimizer steps of a run over `num_blocks` training blocks, and its DeepSpeed config. Raises `Faults`."""
    batch_size = resolve_ds_config(run, world_size(), total_steps=1)["train_batch_size"]
    total_steps = run.max_steps or math.ceil(run.num_train_epochs * math.ceil(num_blocks / batch_size))
    return total_steps, resolve_ds_config(run, world_size(), total_steps)


def load_data(run: Run) -> Data:
    """The data of a resolved run. Raises `Faults`."""
    try:
        return load(run.dataset, run.tokenizer, run.block_size)
    except DataError as err:
        raise Faults([str(err)]) from err


def _resolve_batch(run: Run, config: dict, world: int, path: Path) -> list[str]:
    def number(key: str) -> Any:
        value = config.get(key, "auto")
        return None if value == "auto" else value

    total = run.train_batch_size or number("train_batch_size")
    micro = run.per_device_train_batch_size or number("train_micro_batch_size_per_gpu")
    accumulation = number("gradient_accumulation_steps")
    if bad := [v for v in (total, micro, accumulation) if v is not None and (type(v) is not int or v < 1)]:
        return [f"--deepspeed_config {path}: batch sizes are whole numbers from 1, not {bad[0]!r}"]
    if run.per_device_train_batch_size and not run.train_batch_size:
        total = None
    if total is None:
        if micro is None:
            return [f"--deepspeed_config {path}: no train_batch_size; give one, or --train_batch_size"]
        accumulation = accumulation or 1
        total = micro * world * accumulation
    elif total % world:
        fits = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
        return [f"train_batch_size {total} does not divide over {world} GPUs; numbers of GPUs that do: {fits}"]
    elif micro is None:
        if total // world % (accumulation or 1):
            return [f"gradient_accumulation_steps {accumulation} does not divide {total // world} sequences per GPU"]
        micro = total // world // (accumulation or 1)
    if total % (micro * world):
        fits = ", ".join(str(n) for n in range(1, total // world + 1) if total // world % n == 0)
        return [
            f"--per_device_train_batch_size {micro}: does not divide the {total // world} sequences per GPU "
            f"(train_batch_size {total} over {world} GPUs); sizes that do: {fits}"
        ]
    config["train_batch_size"] = total
    config["train_micro_batch_size_per_gpu"] = micro
    config["gradient_accumulation_steps"] = total // (micro * world)
    return []


def _resolve_optimizer(run: Run, config: dict, total_steps: int) -> None:
    optimizer = config.setdefault("optimizer", {"type": "AdamW", "params": {"torch_adam": True}})
    params = optimizer.setdefault("params", {})
    for key, value in (("lr", run.learning_rate), ("weight_decay", run.weight_decay)):
        if value is not None:
            params[key] = value
    if config.get("scheduler", {}).get("type") == "WarmupDecayLR":
        schedule = config["scheduler"].setdefault("params", {})
        if run.learning_rate is not None or schedule.get("warmup_max_lr", "auto") == "auto":
            schedule["warmup_max_lr"] = params.get("lr", "auto")
        if schedule.get("total_num_steps", "auto") == "auto":
            schedule["total_num_steps"] = total_steps
        if schedule.get("warmup_num_steps", "auto") == "auto":
            schedule["warmup_num_steps"] = math.ceil(run.warmup_ratio * total_steps)


def _find_auto(value: Any, where: str = "") -> list[str]:
    if value == "auto":
        return [where]
    if isinstance(value, dict):
        return [w for k, v in value.items() for w in _find_auto(v, f"{where}.{k}".lstrip("."))]
    return []


def new_folder_faults(folder: Path) -> list[str]:
    """What stands in the way of making `folder`: it exists, or its place cannot be written."""
    if folder.exists():
        return [f"--output_dir {folder}: exists already; give a new folder"]
    parent = next(p for p in folder.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        return [f"--output_dir {folder}: {parent} cannot be written; give another folder"]
    return []


class FolderLock:
    """Keeps a second run out of a run's folder while this process lives."""

    def __init__(self, folder: Path):
        self._path = folder / LOCK
        self._file: IO[str] | None = None

    def acquire(self) -> str | None:
        """Lock the folder, which is made if need be; a fault, if another process holds it. The kernel unlocks it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            return f"--output_dir {self._path.parent}: {holder} is training there; wait for it, or give another folder"
        except OSError as err:
            print(
                f"{self._path.parent}: cannot be locked ({err.strerror}); see that no other run uses it",
                file=sys.stderr,
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        self._file = file
        return None


class RunRecord:
    """`run.json`: what the run is and how it stands. Replaced atomically at each change; only rank 0 writes."""

    def __init__(self, folder: Path, writes: bool):
        self.path = folder / "run.json"
        self._writes = writes
        self.facts: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def update(self, **facts: Any) -> None:
        """Change `facts` and write the file."""
        self.facts.update(facts)
        self.write_json(self.path.name, self.facts)

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as `name` in the run's folder, whole or not at all."""
        if not self._writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f".{name}.tmp")
        aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, self.path.with_name(name))
