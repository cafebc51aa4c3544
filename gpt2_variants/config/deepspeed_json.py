"""The DeepSpeed JSON of a run: found, read, filled in, and checked by DeepSpeed's own config classes."""

import copy
import difflib
import json
import math
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..faults import UsageError
from ..ranks import has_cuda, use_accelerator
from ..registry import GPT2_VOCABULARY, SIZES
from ..words import counted
from . import optimizer_json
from .presets import RECIPE

if TYPE_CHECKING:
    from .options import Options

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel has them within the package, a checkout beside it.
DS_CONFIGS = (_PACKAGE if (_PACKAGE / "ds_configs").is_dir() else _PACKAGE.parent) / "ds_configs"

# The sections of a DeepSpeed JSON that have an effect here. DeepSpeed 0.19 ignores unknown ones without a word, and
# reads others that act only through calls which training does not make, or that would cut the batch in other ways.
SECTIONS = frozenset(
    (
        "optimizer scheduler bf16 fp16 amp zero_optimization timers data_types aio torch_autocast flops_profiler "
        "tensorboard wandb csv_monitor comet comms_logger checkpoint"
    ).split()
)
DS_KEYS = SECTIONS | frozenset(
    (
        "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping steps_per_print "
        "wall_clock_breakdown memory_breakdown dump_state communication_data_type prescale_gradients "
        "gradient_predivide_factor zero_allow_untested_optimizer"
    ).split()
)
DS_KEYS_INSTEAD = {
    "activation_checkpointing": "use --gradient_checkpointing",
    "compile": "use --compile",
    "seed": "use --seed",
    "zero_force_ds_cpu_optimizer": "the optimizer is DeepSpeed's own here, so it has no effect; remove it",
}
SECRET = re.compile(r"api_?key|token$|secret|password", re.IGNORECASE)
OF_THE_RUN_ITSELF = "the run's own DeepSpeed JSON"


def ds_config_path(options: "Options") -> Path:
    """Return the DeepSpeed JSON: the path given, or a name of ds_configs/, with or without `.json`."""
    given = options.deepspeed_config or "zero1.json"
    for path in (Path(given), DS_CONFIGS / given, DS_CONFIGS / f"{given}.json"):
        if path.is_file():
            return path
    return Path(given)


def ds_config_name(options: "Options") -> str:
    """Return how messages name the DeepSpeed JSON of a run."""
    return OF_THE_RUN_ITSELF if options.saved_ds_config is not None else str(ds_config_path(options))


def find_ds_config(options: "Options") -> tuple[str, dict]:
    """Return where the DeepSpeed JSON of a run comes from, and the JSON as it stands there. Raises `UsageError`.

    A run that is gone on with has its own, unless another one is asked for.
    """
    if options.saved_ds_config is not None:
        return OF_THE_RUN_ITSELF, copy.deepcopy(options.saved_ds_config)
    return ds_config_name(options), read_ds_config(ds_config_path(options))


def read_ds_config(path: Path) -> dict:
    """Return the DeepSpeed JSON at `path`. Raises `UsageError`."""

    def fault(what: str) -> UsageError:
        return UsageError([f"--deepspeed_config {path}: {what}"])

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict:
        names = [name for name, _ in pairs]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise fault(f"{', '.join(map(repr, repeated))} stands there more than once; leave one")
        return dict(pairs)

    def no_constant(name: str) -> None:
        raise fault(f"not valid JSON: {name} is no number of JSON")

    if not path.is_file():
        shipped = sorted(p.name for p in DS_CONFIGS.glob("*.json"))
        near = difflib.get_close_matches(path.name, shipped, n=1, cutoff=0.7)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise fault(f"no such file{meant}; give a DeepSpeed JSON or one of ds_configs/: {', '.join(shipped)}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark at the head
        config = json.loads(text, object_pairs_hook=without_repeats, parse_constant=no_constant)
    except json.JSONDecodeError as err:
        raise fault(f"not valid JSON: line {err.lineno}, column {err.colno}: {err.msg}") from None
    except UnicodeDecodeError:
        raise fault("not valid JSON: not a text file") from None
    except RecursionError:
        raise fault("not valid JSON: nested too deeply") from None
    if not isinstance(config, dict):
        raise fault(f"a DeepSpeed config is a JSON object, not {_in_json(config)}")
    return config


def stated_options(config: dict) -> set[str]:
    """Return the options whose values a DeepSpeed JSON fixes, so that they go before a preset's."""
    optimizer = config.get("optimizer")
    params = optimizer.get("params") if isinstance(optimizer, dict) else None
    params = params if isinstance(params, dict) else {}
    batch = [
        config.get(name, "auto")
        for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    ]
    stated = {
        "train_batch_size": batch[0] if batch[0] != "auto" or "auto" in batch[1:] else batch[1],
        "learning_rate": params.get("lr", "auto"),
        "weight_decay": params.get("weight_decay", "auto"),
    }
    return {k for k, v in stated.items() if v != "auto"}


def hidden_size(options: "Options") -> int:
    """Return the model's width, by which the bucket sizes of ZeRO may be chosen."""
    if "n_embd" in (options.model_args or {}):
        return options.model_args["n_embd"]
    if options.init_from is not None:
        return options.make_config(GPT2_VOCABULARY).n_embd
    return SIZES[options.size]["n_embd"]


def zero_stage(config: dict) -> int:
    """Return the ZeRO stage of a DeepSpeed JSON; 0 without one."""
    section = config.get("zero_optimization")
    stage = section.get("stage", 0) if isinstance(section, dict) else 0
    return stage if isinstance(stage, int) else 0


def compiles(options: "Options", config: dict) -> bool:
    """Return whether the blocks and the loss are compiled: as asked for, else on CUDA, but for ZeRO stage 3.

    There DeepSpeed's hooks around each module are compiled too, anew for each of them.
    """
    return has_cuda() and zero_stage(config) < 3 if options.compile is None else options.compile


def resolve_ds_config(options: "Options", world: int, total_steps: int, built: bool = True) -> dict:
    """Return the DeepSpeed config of resolved options on `world` ranks, every "auto" filled in. Raises `UsageError`.

    With `built`, DeepSpeed's config classes and the schedule are made of it too, which takes seconds to import.

    Batch: `train_batch_size` sequences an optimizer step in all, whatever `world` is; `--per_device_train_batch_size`
    alone scales it with `world` instead. Schedule: `total_steps` optimizer steps, of which ceil(warmup_ratio *
    total_steps) rise, as in transformers' Trainer.
    """
    where, config = find_ds_config(options)
    told = f"--deepspeed_config {where}"
    lines = []
    for key in config:
        if key not in DS_KEYS:
            near = difflib.get_close_matches(key, DS_KEYS, n=1, cutoff=0.8)
            cure = DS_KEYS_INSTEAD.get(key, f"did you mean {near[0]!r}?" if near else "remove or correct it")
            lines.append(f"{told}: section {key!r} has no effect in this training; {cure}")
    for key in SECTIONS & config.keys():
        if not isinstance(config[key], dict):
            unsupported = key in ("fp16", "amp")
            cure = "leave it out (bf16 is supported, it is not)" if unsupported else "leave it out, or fill it in"
            lines.append(f"{told}: {key!r} must be a JSON object, not {_in_json(config[key])}; {cure}")
    for key in ("optimizer", "scheduler"):
        section = config.get(key)
        if isinstance(section, dict) and not isinstance(section.get("params", {}), dict):
            lines.append(
                f"{told}: '{key}.params' must be a JSON object, not {_in_json(section['params'])}; leave it out"
            )
    lines += [
        f"{told}: {at} is a secret, which a run's record would show; leave it out, and set it in the environment"
        for at in _find(config, lambda key, value: bool(SECRET.search(key)) and isinstance(value, str) and value)
    ]
    if lines:
        raise UsageError(sorted(lines))
    lines = _resolve_batch(options, config, world, told)
    lines += _resolve_precision(options, config, told)
    lines += optimizer_json.resolve(options, config, total_steps, told)
    if options.max_grad_norm is not None:
        config["gradient_clipping"] = options.max_grad_norm
    elif config.get("gradient_clipping", "auto") == "auto":
        config["gradient_clipping"] = RECIPE["gradient_clipping"]  # DeepSpeed's default too, said
    _resolve_zero(options, config, world)
    lines = lines or [
        f'{told}: "auto" at {at} cannot be filled in; give a value'
        for at in _find(config, lambda _, value: value == "auto")
    ]
    if lines or (built and (lines := _engine_faults(config, told))):
        raise UsageError(lines)
    return config


def _in_json(value: Any) -> str:
    names: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
    return names.get(type(value)) or json.dumps(value)


def _resolve_batch(options: "Options", config: dict, world: int, told: str) -> list[str]:
    def number(key: str) -> Any:
        value = config.get(key, "auto")
        return None if value == "auto" else value

    total = options.train_batch_size or number("train_batch_size")
    micro = options.per_device_train_batch_size or number("train_micro_batch_size_per_gpu")
    accumulation = options.gradient_accumulation_steps or number("gradient_accumulation_steps")
    if bad := [v for v in (total, micro, accumulation) if v is not None and (type(v) is not int or v < 1)]:
        return [f"{told}: batch sizes are whole numbers from 1, not {bad[0]!r}"]
    if options.per_device_train_batch_size and not options.train_batch_size:
        total = None
    if total is None and micro is None:
        total = RECIPE["train_batch_size"]
    if total is None:
        total = micro * world * (accumulation or 1)
    if total % world:
        fits = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
        return [
            f"train_batch_size {total} does not divide over {counted(world, 'GPU')}; numbers of GPUs that do: {fits}"
        ]
    if micro is not None and accumulation is not None and micro * world * accumulation != total:
        return [
            f"train_batch_size {total} is not {micro} (per GPU) x {accumulation} (accumulated) x {world} (GPUs) = "
            f'{micro * world * accumulation}; leave one of the first three out, or at "auto" in {told.split(" ", 1)[1]}'
        ]
    if micro is None:
        if total // world % (accumulation or 1):
            shared = counted(total // world, "sequence")
            return [f"gradient_accumulation_steps {accumulation} does not divide {shared} per GPU"]
        micro = total // world // (accumulation or 1)
    if total % (micro * world):
        fits = ", ".join(str(n) for n in range(1, total // world + 1) if total // world % n == 0)
        return [
            f"--per_device_train_batch_size {micro}: does not divide the {counted(total // world, 'sequence')} per GPU "
            f"(train_batch_size {total} over {counted(world, 'GPU')}); sizes that do: {fits}"
        ]
    config["train_batch_size"] = total
    config["train_micro_batch_size_per_gpu"] = micro
    config["gradient_accumulation_steps"] = total // (micro * world)
    return []


def _resolve_precision(options: "Options", config: dict, told: str) -> list[str]:
    """bf16 where it is asked for, stated, or left to "auto"; float32 where the JSON has no section that says other."""
    sections = {name: config[name] for name in ("bf16", "fp16", "amp") if name in config}
    left_open = any(section.get("enabled") == "auto" for section in sections.values())
    for name in ("fp16", "amp"):
        if sections.get(name, {}).get("enabled") == "auto":
            config[name] = {"enabled": False}
        elif sections.get(name, {}).get("enabled"):
            return [f"{told}: fp16 and amp are not supported; use bf16, or neither for float32"]
    config.pop("amp", None)  # what DeepSpeed hands to apex, if it is on
    if options.bf16 is not None:
        config["bf16"] = {**sections.get("bf16", {}), "enabled": options.bf16}
    elif sections.get("bf16", {}).get("enabled") == "auto" or (left_open and "bf16" not in sections):
        config["bf16"] = {**sections.get("bf16", {}), "enabled": True}
    return []


def overlaps_by_itself(options: "Options", config: dict) -> bool:
    """Return whether gradients are sent during the backward pass, and not because the JSON says so."""
    stated = find_ds_config(options)[1].get("zero_optimization", {}).get("overlap_comm", "auto")
    return stated == "auto" and config.get("zero_optimization", {}).get("overlap_comm", False)


def _resolve_zero(options: "Options", config: dict, world: int) -> None:
    """Fill in the sizes that transformers' Trainer takes from the width of the model, and whether to overlap.

    On one GPU, where nothing is sent, overlapping costs a second buffer and waits for the device.
    """
    zero = config.get("zero_optimization", {})
    if zero_stage(config) and zero.get("overlap_comm", "auto") == "auto":
        zero["overlap_comm"] = world > 1
    if "auto" not in zero.values():
        return
    width = hidden_size(options)
    if type(width) is not int:
        return  # told as a fault of --model_args
    sizes = {
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
        "stage3_gather_16bit_weights_on_model_save": False,  # the export reads the float32 weights instead
    }
    for name, size in sizes.items():
        if zero.get(name) == "auto":
            zero[name] = size


def _engine_faults(config: dict, told: str) -> list[str]:
    """Return what DeepSpeed's own config classes would refuse in a resolved `config`, or not use.

    Nothing where DeepSpeed is not installed: training is refused for that, and a plan without it is a plan.
    """
    if find_spec("deepspeed") is None:
        return []
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
            f"{told}: {'.'.join([err.title, *map(str, e['loc'])])}: {e['msg']}" for e in err.errors(include_url=False)
        ]
    except Exception as err:  # assertions, ValueErrors and DeepSpeed's own alike
        return [f"{told}: {' '.join(str(err).split())}"]
    lines = optimizer_json.faults(config, told)
    clipping = config["gradient_clipping"]
    if type(clipping) not in (int, float) or not 0 <= clipping < math.inf:
        lines.append(f"{told}: gradient_clipping {clipping!r}: 0 (none) or a positive number")
    zero = config.get("zero_optimization", {})
    stage = zero_stage(config)
    needed = {"offload_optimizer": 1, "offload_param": 3}
    lines += [
        f"{told}: zero_optimization.{part} has no effect at stage {stage}; from stage {least} on"
        for part, least in needed.items()
        if part in zero and stage < least
    ]
    lines += [
        f"{told}: zero_optimization.{key} has no effect at stage {stage}; remove it, or use stage 3"
        for key in zero
        if key.startswith("stage3_") and stage < 3
    ]
    return lines


def _find(section: dict, fits: Callable[[str, Any], Any], where: str = "") -> list[str]:
    """Return where in `section` a key and its value fit, as in zero_optimization.stage."""
    found = [f"{where}{key}" for key, value in section.items() if fits(key, value)]
    for key, value in section.items():
        if isinstance(value, dict):
            found += _find(value, fits, f"{where}{key}.")
    return found
