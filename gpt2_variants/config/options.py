"""The options of a run: one frozen dataclass, from which the command line derives."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import warm_start
from ..registry import SIZES, VARIANTS, Variant
from .deepspeed_json import DS_CONFIGS, read_ds_config
from .presets import PRESETS

if TYPE_CHECKING:
    from transformers import GPT2Config

APEX = ("layer_norm", "adam", "all")


def option(default: Any = None, *, group: str, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field of `Options` that is an option of the command line. None: what the preset or the DeepSpeed JSON says."""
    return field(default=default, metadata={"group": group, "help": help, "choices": choices})


@dataclass(frozen=True)
class Options:
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
        """Of the DeepSpeed JSON. Raises `UsageError` where it cannot be read."""
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
