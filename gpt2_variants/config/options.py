"""The options of a run: one frozen dataclass, from which the command line derives."""

import dataclasses
import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from .. import variant_code, warm_start
from ..data import Reading
from ..registry import SIZES, VARIANTS, Variant
from ..trackers.registry import TRACKERS, parse_names
from .presets import PRESETS

if TYPE_CHECKING:
    from transformers import GPT2Config

APEX = ("layer_norm", "adam", "all")
SCHEDULES = ("linear", "cosine", "constant_with_warmup", "constant")

# What pydantic accepts as a value of an option.
COUNT = Annotated[int, Field(ge=1)]
RATE = Annotated[float, Field(ge=0, allow_inf_nan=False)]
SHARE = Annotated[float, Field(ge=0, le=1)]
BETA = Annotated[float, Field(ge=0, lt=1)]
POSITIVE = Annotated[float, Field(gt=0, allow_inf_nan=False)]
TEXT = Annotated[str, Field(min_length=1)]


def option(
    default: Any = None, *, group: str, help: str, rule: Any = TEXT, choices: tuple[str, ...] | None = None
) -> Any:
    """Return a field of `Options` that the command line has. None: what the preset or the DeepSpeed JSON says.

    `rule` is the type by which pydantic checks a value.
    """
    return dataclasses.field(default=default, metadata={"group": group, "help": help, "choices": choices, "rule": rule})


@dataclass(frozen=True)
class Options:
    """What is asked of a run, named as in Hugging Face's `TrainingArguments` where those have one.

    As parsed, None means "not asked for"; `resolve` fills in what the preset says.
    """

    variant: str = option(
        group="model",
        help=f"{', '.join(VARIANTS)}, or one of your own: path/to/idea.py or package.module, with :NAME of several",
    )
    preset: str = option(
        "auto",
        group="what to train",
        help="seed: the recipe at full size; demo: a tiny model on the built-in corpus; "
        "auto: seed where there is a CUDA device, else demo",
        choices=("auto", *PRESETS),
    )
    dataset: str = option(
        group="what to train",
        help="wikitext-103, builtin, a file or folder (text, jsonl, csv, parquet, or saved by `datasets`), or a Hub id",
    )
    tokenizer: str = option(
        group="what to train", help="a folder, a Hub id, or builtin: a BPE trained on the training text"
    )
    text_column: str = option(group="what to train", help="the column that holds the text; a nested one as a.b")
    encoding: str = option(group="what to train", help="the encoding of text files (default: utf-8)")
    document_separator: str = option(
        group="what to train", help="what follows each document: eos, none, or a token (default: eos; none for lines)"
    )
    validation_dataset: str = option(group="what to train", help="what to validate on, named as --dataset")
    validation_split_percentage: float = option(
        group="what to train", rule=POSITIVE, help="percent held out where there is no validation split (default: 5)"
    )
    block_size: int = option(group="what to train", rule=Annotated[int, Field(ge=2)], help="tokens per sequence")
    size: str = option(group="model", help="the model's size", choices=tuple(SIZES))
    model_args: dict = option(group="model", help="config fields, as in n_layer=8 resid_pdrop=0")
    init_from: str = option(
        group="model",
        help="start from a trained GPT-2 or the same variant: a folder or a Hub id; shape and tokenizer are its own",
    )
    check: bool = option(True, group="model", help="run `check --quick` on a variant from a file first")
    attn_implementation: str = option(
        "sdpa",
        group="model",
        help="the attention backend",
        choices=("sdpa", "eager", "flash_attention_2", "flash_attention_3"),
    )
    deepspeed_config: str = option(group="how to train", help="a DeepSpeed JSON (default: ds_configs/zero1.json)")
    learning_rate: float = option(group="how to train", rule=RATE, help="peak learning rate")
    weight_decay: float = option(group="how to train", rule=RATE, help="the optimizer's decay, on matrices only")
    adam_beta1: float = option(group="how to train", rule=BETA, help="Adam's first beta")
    adam_beta2: float = option(group="how to train", rule=BETA, help="Adam's second beta")
    adam_epsilon: float = option(group="how to train", rule=POSITIVE, help="Adam's epsilon")
    max_grad_norm: float = option(group="how to train", rule=RATE, help="clip gradients to this norm; 0: none")
    lr_scheduler_type: str = option(group="how to train", help="the schedule of the rate", choices=SCHEDULES)
    warmup_ratio: float = option(group="how to train", rule=SHARE, help="part of the steps in which the rate rises")
    warmup_steps: int = option(
        group="how to train",
        rule=Annotated[int, Field(ge=0)],
        help="the same as a number of steps, instead of the ratio",
    )
    train_batch_size: int = option(group="how to train", rule=COUNT, help="sequences per optimizer step, over all GPUs")
    per_device_train_batch_size: int = option(
        group="how to train", rule=COUNT, help="sequences per GPU and forward pass"
    )
    per_device_eval_batch_size: int = option(
        group="how to train", rule=COUNT, help="the same in evaluations (default: as in training)"
    )
    gradient_accumulation_steps: int = option(
        group="how to train", rule=COUNT, help="passes per optimizer step (default: what the batch needs)"
    )
    auto_micro_batch: bool = option(
        False,
        group="how to train",
        help="take the most sequences per GPU and pass that fit, by estimate",
    )
    num_train_epochs: float = option(group="how to train", rule=POSITIVE, help="passes over the training data")
    max_steps: int = option(group="how to train", rule=COUNT, help="optimizer steps; overrides the epochs")
    bf16: bool = option(group="how to train", help="compute in bf16, or in float32 (default: the JSON's)")
    tf32: bool = option(group="how to train", help="on CUDA, multiply float32 matrices in TF32 (default: True)")
    deterministic: bool = option(
        False,
        group="how to train",
        help="use only operators that repeat exactly, on CUDA too; slower",
    )
    gradient_checkpointing: bool = option(False, group="how to train", help="recompute the blocks in the backward pass")
    compile: bool = option(
        group="how to train", help="torch.compile blocks and loss (default: on CUDA, not for ZeRO 3)"
    )
    apex: str = option(group="how to train", help="NVIDIA apex's fused kernels in place of PyTorch's", choices=APEX)
    seed: int = option(
        42,
        group="how to train",
        rule=Annotated[int, Field(ge=0, le=2**32 - 1)],
        help="seed of initialisation, data order and dropout",
    )
    eval_steps: int = option(group="what comes out", rule=COUNT, help="optimizer steps between evaluations")
    save_steps: int = option(group="what comes out", rule=COUNT, help="optimizer steps between checkpoints")
    logging_steps: int = option(group="what comes out", rule=COUNT, help="optimizer steps between log lines")
    save_total_limit: int = option(5, group="what comes out", rule=COUNT, help="how many checkpoints are kept")
    load_best_model_at_end: bool = option(
        False,
        group="what comes out",
        help="keep and export the weights with the lowest validation loss",
    )
    output_dir: str = option(group="what comes out", help="the run's folder (default: runs/<variant>)")
    resume_from_checkpoint: str = option(
        group="what comes out",
        help="auto: go on from --output_dir's newest whole checkpoint, or start; or a run's folder or a checkpoint; "
        "other options stay as they were",
    )
    report_to: tuple = option(
        ("wandb",),
        group="what comes out",
        help=f"{', '.join(TRACKERS)}, several of them, all, or none: metrics.jsonl only; W&B is offline without a key",
    )
    push_to_hub: bool = option(
        False,
        group="what comes out",
        help="push model/ to the Hugging Face Hub afterwards; token and name are checked now",
    )
    hub_model_id: str = option(
        group="what comes out", help="name, or namespace/name, on the Hub (default: the name of the run's folder)"
    )
    hub_private: bool = option(False, group="what comes out", help="keep it private on the Hub")
    dry_run: bool = option(False, group="what comes out", help="print what the run would be, and end")

    # What the command line does not have: the options that were asked for, with their values; what the preset says
    # beside them; and, of a run that is gone on with, its DeepSpeed JSON.
    asked: dict = dataclasses.field(default_factory=dict)
    chosen: tuple[str, ...] = ()
    saved_ds_config: dict | None = None

    @property
    def spec(self) -> Variant:
        """The variant's record."""
        return variant_code.find(self.variant)

    @property
    def reading(self) -> Reading:
        """How the data are to be read."""
        return Reading(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Reading)})

    @property
    def resumes(self) -> bool:
        """Whether the run goes on from a checkpoint, if there is one."""
        return self.resume_from_checkpoint is not None

    @property
    def hub_name(self) -> str:
        """What the model is called on the Hub: `--hub_model_id`, or the name of the run's folder."""
        return self.hub_model_id or Path(self.output_dir).absolute().name

    def make_config(self, tokenizer_size: int) -> "GPT2Config":
        """Return the model's config for a tokenizer of `tokenizer_size` entries. Raise what the config class raises."""
        # As many positions as are trained: more would be exported as they were initialised.
        fields: dict[str, Any] = {"n_positions": self.block_size, "bos_token_id": None, "eos_token_id": None}
        if self.init_from is not None:
            fields |= warm_start.config_fields(self.init_from, self.spec)
        fields |= self.model_args
        config = self.spec.make_config(self.size, tokenizer_size, **fields)
        config.use_cache = False
        return config


def option_fields() -> list[dataclasses.Field]:
    """Return the fields of `Options` that are options of the command line, in its order."""
    return [f for f in dataclasses.fields(Options) if "group" in f.metadata]


def checked(f: dataclasses.Field, value: Any) -> Any:
    """Return `value`, which may be text, as a value of the option `f`.

    Raises:
        ValueError: it is none; the message begins with the value and says what is allowed.
    """
    if f.name == "report_to":
        return parse_names(value)
    if f.name == "variant":
        variant_code.find(value)
        return value
    choices = f.metadata["choices"]
    if choices is not None:
        if value in choices:
            return value
        near = difflib.get_close_matches(str(value), choices, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"{value}: not known{meant}; one of {', '.join(choices)}")
    rule = bool if f.type is bool else f.metadata["rule"]
    try:
        return TypeAdapter(rule).validate_python(value)
    except ValidationError as err:
        (error,) = err.errors(include_url=False)
        limits = {k: f"{v:g}" if isinstance(v, float) else v for k, v in error.get("ctx", {}).items()}
        what = {
            "string_too_short": "is empty: leave the option out, or give a value",
            "bool_parsing": "true or false is needed",
            "int_parsing": "not a whole number",
            "int_from_float": "not a whole number",
            "float_parsing": "not a number",
            "finite_number": "a finite number is needed",
            "greater_than_equal": f"at least {limits.get('ge')} is needed",
            "greater_than": f"more than {limits.get('gt')} is needed",
            "less_than_equal": f"at most {limits.get('le')} is allowed",
            "less_than": f"less than {limits.get('lt')} is needed",
        }.get(error["type"], error["msg"])
        raise ValueError(f"{value}: {what}" if value != "" else what) from None
