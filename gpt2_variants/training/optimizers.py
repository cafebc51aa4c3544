"""Optimizer and schedule, where DeepSpeed's own are not what the JSON says."""

from collections.abc import Callable
from typing import Any

from torch import nn


def apex_adam(ds_config: dict) -> Callable:
    """NVIDIA apex's `FusedAdam` with the settings of the JSON's AdamW, as DeepSpeed takes an optimizer: of groups."""
    from apex.optimizers import FusedAdam

    params = ds_config["optimizer"]["params"]
    settings = {k: v for k, v in params.items() if k in ("lr", "betas", "eps", "weight_decay")}
    return lambda groups: FusedAdam(groups, adam_w_mode=True, **settings)


def parameter_groups(model: nn.Module, ds_config: dict) -> list[dict[str, Any]]:
    """Decay on matrices only: biases and norms are vectors."""
    decay = ds_config["optimizer"]["params"].get("weight_decay", 0.0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def take_over_schedule(ds_config: dict) -> tuple[dict, Callable | None]:
    """The config for DeepSpeed, and the schedule as a callable where the JSON states a linear warm-up and decay from 0.

    DeepSpeed's own WarmupDecayLR runs one step late (the first two steps have rate 0) and refuses warm-ups of 0 or 1
    steps; transformers' is the recipe's.
    """
    scheduler = ds_config.get("scheduler", {})
    params = scheduler.get("params", {})
    linear = params.get("warmup_type") == "linear" and not params.get("warmup_min_lr")
    if scheduler.get("type") != "WarmupDecayLR" or not linear:
        return ds_config, None
    from transformers import get_linear_schedule_with_warmup

    optimizer = ds_config["optimizer"]
    given = {k: v for k, v in ds_config.items() if k != "scheduler"}
    given["optimizer"] = {**optimizer, "params": {**optimizer["params"], "lr": params["warmup_max_lr"]}}
    warmup, total = params["warmup_num_steps"], params["total_num_steps"]
    return given, lambda opt: get_linear_schedule_with_warmup(opt, warmup, total)
