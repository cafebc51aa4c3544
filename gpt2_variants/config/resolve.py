"""What was not asked for is filled in: by the preset, then by the data."""

import math
import sys
from dataclasses import replace

from ..data import Data, DataError, load
from ..faults import UsageError
from ..ranks import main_rank, world_size
from .deepspeed_json import read_ds_config, resolve_ds_config
from .options import Options
from .presets import PRESETS


def resolve(run: Options) -> Options:
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
        except UsageError:
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
    section = ds.get("optimizer")
    params = section.get("params") if isinstance(section, dict) else None
    optimizer = params if isinstance(params, dict) else {}
    stated = {
        "train_batch_size": ds.get("train_batch_size", "auto"),
        "learning_rate": optimizer.get("lr", "auto"),
        "weight_decay": optimizer.get("weight_decay", "auto"),
    }
    return {k for k, v in stated.items() if v != "auto"}


def plan(run: Options, num_blocks: int) -> tuple[int, dict]:
    """The optimizer steps of a run over `num_blocks` training blocks, and its DeepSpeed config. Raises `UsageError`."""
    batch_size = resolve_ds_config(run, world_size(), total_steps=1)["train_batch_size"]
    total_steps = run.max_steps or math.ceil(run.num_train_epochs * math.ceil(num_blocks / batch_size))
    return total_steps, resolve_ds_config(run, world_size(), total_steps)


def load_data(run: Options) -> Data:
    """The data of a resolved run. Raises `UsageError`."""
    try:
        return load(run.dataset, run.tokenizer, run.block_size)
    except DataError as err:
        raise UsageError([str(err)]) from err
