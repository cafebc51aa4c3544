"""The DeepSpeed JSON of a run: read, filled in, and checked by DeepSpeed's own config classes."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..faults import UsageError
from ..ranks import use_accelerator

if TYPE_CHECKING:
    from .options import Options

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel has them within the package, a checkout beside it.
DS_CONFIGS = (_PACKAGE if (_PACKAGE / "ds_configs").is_dir() else _PACKAGE.parent) / "ds_configs"

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

SECTIONS = frozenset(
    (
        "optimizer scheduler bf16 fp16 amp zero_optimization timers data_types aio torch_autocast flops_profiler "
        "tensorboard wandb csv_monitor comet comms_logger checkpoint"
    ).split()
)
SCHEDULE_KEYS = ("warmup_type", "warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")


def read_ds_config(path: Path) -> dict:
    """The DeepSpeed JSON at `path`. Raises `UsageError`."""

    def fault(what: str) -> UsageError:
        return UsageError([f"--deepspeed_config {path}: {what}"])

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict:
        names = [name for name, _ in pairs]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise fault(f"{', '.join(map(repr, repeated))} stands there more than once; leave one")
        return dict(pairs)

    if not path.is_file():
        shipped = ", ".join(sorted(p.name for p in DS_CONFIGS.glob("*.json")))
        raise fault(f"no such file; give a DeepSpeed JSON or one of ds_configs/: {shipped}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_repeats)
    except json.JSONDecodeError as err:
        raise fault(f"not valid JSON: line {err.lineno}, column {err.colno}: {err.msg}") from None
    except UnicodeDecodeError:
        raise fault("not valid JSON: not a text file") from None
    if not isinstance(config, dict):
        raise fault(f"a DeepSpeed config is a JSON object, not a {type(config).__name__}")
    return config


def resolve_ds_config(run: "Options", world: int, total_steps: int) -> dict:
    """The DeepSpeed config of a resolved run on `world` ranks, every "auto" filled in. Raises `UsageError`.

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
    wrong = sorted(key for key in SECTIONS & config.keys() if not isinstance(config[key], dict))
    for key in ("optimizer", "scheduler"):
        section = config.get(key)
        if isinstance(section, dict) and not isinstance(section.get("params", {}), dict):
            wrong.append(f"{key}.params")
    lines += [f"--deepspeed_config {path}: {key!r} must be a JSON object; correct it, or leave it out" for key in wrong]
    if lines:
        raise UsageError(lines)
    if batch_faults := _resolve_batch(run, config, world, path):
        raise UsageError(batch_faults)
    _resolve_optimizer(run, config, total_steps)
    if config.get("fp16", {}).get("enabled") or config.get("amp", {}).get("enabled"):
        lines.append(f"--deepspeed_config {path}: fp16 and amp are not supported; use bf16, or neither for float32")
    lines += [
        f'--deepspeed_config {path}: "auto" at {where} cannot be filled in; give a value'
        for where in _find_auto(config)
    ]
    if lines or (lines := _engine_faults(config, path)):
        raise UsageError(lines)
    return config


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


def _resolve_batch(run: "Options", config: dict, world: int, path: Path) -> list[str]:
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


def _resolve_optimizer(run: "Options", config: dict, total_steps: int) -> None:
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
