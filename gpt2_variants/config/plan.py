"""What a run is, as one value: from it the loop, checkpoints, records and all that is said of a run are made."""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..data import Data
from ..measuring import applied_parameters, flops_per_token
from ..ranks import has_cuda
from ..registry import Variant
from ..variant_code import known
from . import optimizer_json
from .deepspeed_json import compiles, overlaps_by_itself, resolve_ds_config, zero_stage
from .options import Options

if TYPE_CHECKING:
    from transformers import GPT2Config

# Fields that neither decide what is computed nor what it costs: a run may change them on the way, and runs that
# differ in them, and in the seed, are runs of one recipe.
CADENCE = ("eval_steps", "save_steps", "logging_steps", "save_total_limit", "report_to")
# How the same global batch is shared out among the ranks.
SHARE = ("world_size", "per_device_train_batch_size", "gradient_accumulation_steps", "per_device_eval_batch_size")
# Told by other fields too: a variant's file by its digest, data by their fingerprint, the shape by the model's fields.
TOLD_ELSEWHERE = tuple(
    "variant_file dataset tokenizer data training_blocks validation_blocks steps_per_epoch size".split()
)
# Sections of a DeepSpeed JSON that decide numbers, beside those that have a field of their own.
NUMERIC = (
    "communication_data_type prescale_gradients gradient_predivide_factor data_types torch_autocast "
    "zero_allow_untested_optimizer"
).split()


class DataFacts(NamedTuple):
    """What a plan must know of the data; None where they were not read."""

    training_blocks: int
    validation_blocks: int | None
    description: str
    fingerprint: str | None


@dataclass(frozen=True)
class Plan:
    """Everything that decides a run's weights, its cost or the order of its data, each with its real value.

    Attributes:
        variant: its name.
        variant_file, variant_code: of a variant from a user's file, the file's name, and the SHA-256 of it and of the
            files that it imports beside it.
        size: the name of the size that was asked for or preset; the shape stands in `model`.
        model: config field -> value, every one that the variant has.
        init_from: the model that the run starts from; None: from random weights.
        num_parameters: tied ones counted once.
        flops_per_token: training FLOPs per token of data.
        dataset, tokenizer: as they were named; `data` describes them, `data_fingerprint` tells them apart.
        reading: how the data were asked to be read, option -> value; empty where nothing was asked.
        block_size: tokens per sequence.
        training_blocks, validation_blocks: sequences that the data give.
        seed: of the initialisation, the data order and dropout.
        train_batch_size: sequences per optimizer step on all ranks: `per_device_train_batch_size` x
            `gradient_accumulation_steps` x `world_size`.
        total_steps, steps_per_epoch: optimizer steps.
        optimizer: "type", and the "params" it was given without the rate and the weight decay.
        learning_rate: the highest of the schedule; None where the schedule goes through rates of its own.
        weight_decay: on matrices only.
        schedule: "type", and the "params" it was given; the type "constant" where there is none.
        warmup_steps: steps in which the rate rises.
        gradient_clipping: the norm that gradients are clipped to; 0: they are not.
        precision: "bf16" (with float32 master weights) or "float32".
        zero_stage, offload: how DeepSpeed shares out the states, and which of them it keeps on the CPU.
        numerics: further sections of the DeepSpeed JSON that decide numbers.
        gradient_checkpointing, compile, apex, attn_implementation: how the same is computed.
        tf32: whether float32 matrices are multiplied in TF32.
        deterministic: whether operators are repeatable to the bit on CUDA too.
        load_best_model_at_end: whether the weights of the best evaluation are exported, not the last.
        report_to: trackers beside metrics.jsonl.
        chosen: what was chosen for the user by the preset, and then by the machine, as "name=value".
        ds_config: the DeepSpeed config as resolved.
    """

    variant: str
    variant_file: str | None
    variant_code: str | None
    size: str | None
    model: dict[str, Any]
    init_from: str | None
    num_parameters: int
    flops_per_token: float
    dataset: str
    tokenizer: str
    data: str
    data_fingerprint: str | None
    reading: dict[str, Any]
    block_size: int
    training_blocks: int
    validation_blocks: int | None
    seed: int
    train_batch_size: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    world_size: int
    per_device_eval_batch_size: int
    total_steps: int
    steps_per_epoch: int
    optimizer: dict[str, Any]
    learning_rate: float | None
    weight_decay: float
    schedule: dict[str, Any]
    warmup_steps: int
    gradient_clipping: float
    precision: str
    zero_stage: int
    offload: tuple[str, ...]
    numerics: dict[str, Any]
    gradient_checkpointing: bool
    compile: bool
    apex: str | None
    attn_implementation: str
    tf32: bool
    deterministic: bool
    eval_steps: int
    save_steps: int
    logging_steps: int
    save_total_limit: int
    load_best_model_at_end: bool
    report_to: tuple[str, ...]
    chosen: tuple[str, ...]
    ds_config: dict[str, Any]

    @property
    def spec(self) -> Variant:
        """The variant's record."""
        return known(self.variant, self.variant_code)

    def model_config(self) -> "GPT2Config":
        """Return the model's config, made anew."""
        config = self.spec.config_class(**self.model)
        config.use_cache = False
        return config

    def identity(self) -> dict[str, Any]:
        """Return what must be the same to go on from a checkpoint: it decides the weights and the order of the data."""
        return {
            "variant": self.variant,
            **({"variant_code": self.variant_code} if self.variant_code else {}),
            "model": self.model,
            "init_from": self.init_from,
            "data": self.data_fingerprint,
            "dataset": self.dataset,
            "tokenizer": self.tokenizer,
            "block_size": self.block_size,
            "train_batch_size": self.train_batch_size,
            "seed": self.seed,
            "precision": self.precision,
            "optimizer": self.optimizer["type"],
        }

    def sharding(self) -> dict[str, int]:
        """Return what decides how the optimizer's states are cut into files."""
        return {"world_size": self.world_size, "zero_stage": self.zero_stage}


def recipe(plan: dict[str, Any]) -> dict[str, Any]:
    """Return what runs of one recipe have in common: the fields of a `Plan` (as a dict) that decide results or cost.

    Two runs are seeds of one recipe if this is equal. A global batch is the same on any number of GPUs.
    """
    left_out = {"seed", "chosen", "ds_config", *CADENCE, *SHARE, *TOLD_ELSEWHERE}
    if plan.get("load_best_model_at_end"):
        left_out.discard("eval_steps")  # the choice is among the evaluations
    if plan.get("variant_code") is None:
        left_out.add("variant_code")  # plans of before have no such field
    left_out |= {name for name in ("tf32", "deterministic") if not plan.get(name)}  # nor these
    return {name: value for name, value in plan.items() if name not in left_out}


def make_plan(options: Options, data: DataFacts, config: "GPT2Config", world: int) -> Plan:
    """Resolve options, DeepSpeed JSON, data and number of ranks into the plan of a run.

    Args:
        options: resolved by `config.resolve.resolve`.
        config: of the model, with the tokenizer's special ids.

    Raises:
        UsageError: the DeepSpeed JSON cannot be used.
    """
    batch_size = resolve_ds_config(options, world, total_steps=1, built=False)["train_batch_size"]
    steps_per_epoch = math.ceil(data.training_blocks / batch_size)
    total_steps = options.max_steps or math.ceil((options.num_train_epochs or 1) * steps_per_epoch)
    ds = resolve_ds_config(options, world, total_steps)
    spec = options.spec
    model = spec.on_meta(config)
    parameters, zero = model.num_parameters(), ds.get("zero_optimization", {})
    params = ds["optimizer"]["params"]
    scheduler = ds.get("scheduler", {"type": "constant"})
    micro = ds["train_micro_batch_size_per_gpu"]
    return Plan(
        variant=spec.name,
        variant_file=spec.code.file if spec.code else None,
        variant_code=spec.code.digest if spec.code else None,
        size=options.size,
        model={name: getattr(config, name) for name in (*spec.config_fields(), "bos_token_id", "eos_token_id")},
        init_from=options.init_from,
        num_parameters=parameters,
        flops_per_token=flops_per_token(
            *(applied_parameters(model), config.n_layer, config.n_embd),
            *(options.block_size, model.positions(options.block_size)),
        ),
        dataset=options.dataset,
        tokenizer=options.tokenizer,
        data=data.description,
        data_fingerprint=data.fingerprint,
        reading=options.reading.identity(),
        block_size=options.block_size,
        training_blocks=data.training_blocks,
        validation_blocks=data.validation_blocks,
        seed=options.seed,
        train_batch_size=batch_size,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=ds["gradient_accumulation_steps"],
        world_size=world,
        per_device_eval_batch_size=options.per_device_eval_batch_size or micro,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        optimizer={
            "type": ds["optimizer"]["type"],
            "params": {k: v for k, v in params.items() if k not in ("lr", "weight_decay")},
        },
        learning_rate=optimizer_json.peak_rate(ds),
        weight_decay=params.get("weight_decay", 0.0),
        schedule={"type": scheduler["type"], "params": scheduler.get("params", {})},
        warmup_steps=optimizer_json.warmup_steps(ds),
        gradient_clipping=ds["gradient_clipping"],
        precision="bf16" if ds.get("bf16", {}).get("enabled") else "float32",
        zero_stage=zero_stage(ds),
        offload=tuple(
            part
            for part in ("offload_optimizer", "offload_param")
            if zero.get(part, {}).get("device", "none") != "none"
        ),
        numerics={name: ds[name] for name in NUMERIC if name in ds},
        gradient_checkpointing=options.gradient_checkpointing,
        compile=compiles(options, ds),
        apex=options.apex,
        attn_implementation=options.attn_implementation,
        tf32=options.tf32 is not False and has_cuda(),
        deterministic=options.deterministic,
        eval_steps=options.eval_steps,
        save_steps=options.save_steps,
        logging_steps=options.logging_steps,
        save_total_limit=options.save_total_limit,
        load_best_model_at_end=options.load_best_model_at_end,
        report_to=tuple(options.report_to),
        chosen=(*options.chosen, *_chosen_by_machine(options, ds)),
        ds_config=ds,
    )


def _chosen_by_machine(options: Options, ds: dict[str, Any]) -> list[str]:
    overlaps = ["overlap_comm=true"] if overlaps_by_itself(options, ds) else []
    in_float32 = not ds.get("bf16", {}).get("enabled")
    return overlaps + (["tf32=true"] if options.tf32 is None and has_cuda() and in_float32 else [])


def facts_of(data: Data) -> DataFacts:
    """Return what a plan must know of `data`."""
    return DataFacts(len(data.train), len(data.validation), data.description, data.fingerprint)


def as_dict(plan: Plan) -> dict[str, Any]:
    """Return the fields of `plan`, for JSON."""
    return dataclasses.asdict(plan)
