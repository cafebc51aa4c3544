"""The optimizer's groups and settings, and its schedule on resuming."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..config.optimizer_json import for_deepspeed, make_schedule


def apex_adam(ds_config: dict) -> Callable:
    """NVIDIA apex's `FusedAdam` with the settings of the JSON's AdamW, as DeepSpeed takes an optimizer: of groups."""
    from apex.optimizers import FusedAdam

    params = ds_config["optimizer"]["params"]
    settings = {k: v for k, v in params.items() if k in ("lr", "betas", "eps", "weight_decay")}
    return lambda groups: FusedAdam(groups, adam_w_mode=True, **settings)


def parameter_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Decay on matrices only: biases and norms are vectors."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


@contextlib.contextmanager
def reapply(engine: Any, ds_config: dict, step: int) -> Iterator[None]:
    """Load a checkpoint inside: optimizer and schedule stay set as `ds_config` says, and as after `step` steps.

    A checkpoint brings the rate, weight decay, clipping and schedule that it was made with; at ZeRO stage 3, and in the
    universal format, it also gives every group of parameters the settings of the first one.
    """
    clipping = getattr(engine.optimizer, "clip_grad", None)
    own = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in engine.optimizer.param_groups]
    yield
    if clipping is not None:
        engine.optimizer.clip_grad = clipping
    rate = for_deepspeed(ds_config)["optimizer"]["params"]["lr"]
    for group, settings in zip(engine.optimizer.param_groups, own, strict=True):
        group.update({**settings, "lr": rate})
    make = make_schedule(ds_config)
    if make is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the optimizer takes no steps meanwhile
        engine.lr_scheduler = make(engine.basic_optimizer)
        for _ in range(step):
            engine.lr_scheduler.step()
