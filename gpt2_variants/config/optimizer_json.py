"""Optimizer and schedule of a DeepSpeed JSON: what an option means for each kind, and what cannot be run."""

import contextlib
import difflib
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .presets import RECIPE

if TYPE_CHECKING:
    from .options import Options

# Where a schedule has its peak; all others begin with the optimizer's rate.
PEAK = {
    "WarmupLR": "warmup_max_lr",
    "WarmupDecayLR": "warmup_max_lr",
    "OneCycle": "cycle_max_lr",
    "OneCycleLR": "max_lr",
    "CyclicLR": "max_lr",
}
WITH_WARMUP = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
POSITION = ("last_batch_iteration", "last_epoch")  # where a schedule begins
LENGTHS = ("total_num_steps", "total_steps", "T_max")  # what "auto" may stand at for the steps of the whole run
WITHOUT_BETAS = ("sgd", "adagrad", "musgd", "muon", "rmsprop", "adadelta", "asgd", "rprop", "lbfgs")
# What --lr_scheduler_type stands for in a DeepSpeed JSON.
SCHEDULERS: dict[str, dict[str, Any] | None] = {
    "linear": {"type": "WarmupDecayLR", "params": {"warmup_type": "linear", "warmup_min_lr": 0}},
    "cosine": {
        "type": "WarmupCosineLR",
        "params": {"warmup_type": "linear", "warmup_min_ratio": 0, "cos_min_ratio": 0},
    },
    "constant_with_warmup": {"type": "WarmupLR", "params": {"warmup_type": "linear", "warmup_min_lr": 0}},
    "constant": None,
}
# DeepSpeed's schedules that transformers has too, if the warm-up is linear and all rates begin and end at 0: its name
# there, and the parameters that say from where, with what stands for one that is left out. DeepSpeed's own run one step
# late (the first two steps have rate 0) and refuse warm-ups of 0 or 1 steps; transformers' are the recipe's.
TRANSFORMERS: dict[str, tuple[str, dict[str, float]]] = {
    "WarmupDecayLR": ("linear", {"warmup_min_lr": 0}),
    "WarmupCosineLR": ("cosine", {"warmup_min_ratio": 0, "cos_min_ratio": 1}),
    "WarmupLR": ("constant_with_warmup", {"warmup_min_lr": 0}),
}


def resolve(options: "Options", config: dict, total_steps: int, told: str) -> list[str]:
    """Fill in `config`'s optimizer and scheduler; return a line for each option that they cannot honour."""
    lines = []
    if options.lr_scheduler_type is not None:
        section = SCHEDULERS[options.lr_scheduler_type]
        config.pop("scheduler", None)
        if section is not None:
            config["scheduler"] = {"type": section["type"], "params": dict(section["params"])}
    optimizer = config.setdefault("optimizer", {"type": "AdamW", "params": {"torch_adam": True}})
    params = optimizer.setdefault("params", {})
    kind = str(optimizer.get("type", ""))
    if "learning_rate" in options.asked and {"muon_lr", "adam_lr"} & params.keys():
        lines.append(
            f"--learning_rate {options.learning_rate}: {told} states muon_lr or adam_lr; leave one of them out"
        )
    # what is not stated is 0 for weight decay, as DeepSpeed's own optimizers have it, and the recipe's for the others
    unstated = {"lr": "auto", "weight_decay": 0.0, **({"eps": "auto", "betas": "auto"} if is_adam(kind) else {})}
    asked = {"lr": options.learning_rate, "weight_decay": options.weight_decay, "eps": options.adam_epsilon}
    for key, value in asked.items():
        if value is not None:
            params[key] = value
        elif params.get(key, unstated.get(key)) == "auto":
            params[key] = RECIPE[key]
    if options.adam_epsilon is not None and kind.lower() in WITHOUT_BETAS:
        lines.append(f"--adam_epsilon {options.adam_epsilon}: the optimizer {kind} of {told} has none; leave it out")
    betas = (options.adam_beta1, options.adam_beta2)
    if betas != (None, None) and kind.lower() in WITHOUT_BETAS:
        lines.append(f"--adam_beta1, --adam_beta2: the optimizer {kind} of {told} has none; leave them out")
    elif betas != (None, None) or params.get("betas", unstated.get("betas")) == "auto":
        stated = params.get("betas")
        first, second = stated if isinstance(stated, list) and len(stated) == 2 else RECIPE["betas"]
        params["betas"] = [first if betas[0] is None else betas[0], second if betas[1] is None else betas[1]]
    return lines + _resolve_scheduler(options, config, total_steps, told)


def is_adam(kind: str) -> bool:
    """Return whether an optimizer's type is Adam or AdamW, in DeepSpeed's spelling or any other."""
    return kind.lower() in ("adam", "adamw")


def _resolve_scheduler(options: "Options", config: dict, total_steps: int, told: str) -> list[str]:
    scheduler = config.get("scheduler")
    kind = scheduler.get("type") if scheduler else None
    asked = [name for name in ("warmup_steps", "warmup_ratio") if name in options.asked]
    lines = []
    if len(asked) == 2:
        lines.append("--warmup_steps and --warmup_ratio say the same thing twice; leave one of them out")
    if asked and kind not in WITH_WARMUP:
        what = f"the schedule {kind}" if kind else "a constant rate"
        lines.append(
            f"--{asked[0]} {getattr(options, asked[0])}: {what} ({told}) has no warm-up; leave it out, or give "
            "--lr_scheduler_type linear"
        )
    if kind == "LRRangeTest" and "learning_rate" in options.asked:
        lines.append(
            f"--learning_rate {options.learning_rate}: the schedule LRRangeTest of {told} goes through rates of its "
            "own; leave it out"
        )
    if not scheduler or lines:
        return lines
    schedule = scheduler.setdefault("params", {})
    rate = config["optimizer"]["params"]["lr"]
    if (peak := PEAK.get(str(kind))) and (
        "learning_rate" in options.asked
        or schedule.get(peak) == "auto"
        or (peak not in schedule and kind in WITH_WARMUP)  # DeepSpeed's default is 1e-3, whatever the optimizer's
    ):
        schedule[peak] = rate
    if schedule.get("warmup_min_lr") == "auto":
        schedule["warmup_min_lr"] = 0
    if kind in ("WarmupDecayLR", "WarmupCosineLR"):
        schedule.setdefault("total_num_steps", "auto")
    for name in LENGTHS:
        if schedule.get(name) == "auto":
            schedule[name] = total_steps
    if kind in WITH_WARMUP and (asked or schedule.get("warmup_num_steps", "auto") == "auto"):
        ratio = RECIPE["warmup_ratio"] if options.warmup_ratio is None else options.warmup_ratio
        steps = math.ceil(ratio * total_steps) if options.warmup_steps is None else options.warmup_steps
        schedule["warmup_num_steps"] = steps
    return lines


def peak_rate(config: dict) -> float | None:
    """Return the highest learning rate of a resolved config; None where its schedule goes through rates of its own."""
    scheduler = config.get("scheduler", {})
    kind = scheduler.get("type")
    if kind == "LRRangeTest":
        return None
    return scheduler.get("params", {}).get(PEAK.get(str(kind)), config["optimizer"]["params"]["lr"])


def warmup_steps(config: dict) -> int:
    """Return optimizer steps in which the rate of a resolved config rises; 0 where its schedule has no warm-up."""
    scheduler = config.get("scheduler", {})
    return scheduler["params"]["warmup_num_steps"] if scheduler.get("type") in WITH_WARMUP else 0


def faults(config: dict, told: str) -> list[str]:
    """Return what is wrong with optimizer and scheduler of a resolved `config`, as far as shows without an engine."""
    import torch
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    lines = []
    optimizer, scheduler = config["optimizer"], config.get("scheduler")
    kind = optimizer.get("type")
    own = [name for name in vars(torch.optim) if name[0].isupper() and name != "Optimizer"]
    if not isinstance(kind, str):
        lines.append(f"{told}: optimizer.type is missing; AdamW, Adam, Lion, Lamb or another of DeepSpeed's or torch's")
    elif kind.lower() not in DEEPSPEED_OPTIMIZERS and kind not in own:
        near = difflib.get_close_matches(kind, [*DEEPSPEED_OPTIMIZERS, *own], n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        lines.append(
            f"{told}: optimizer {kind!r} is not known to DeepSpeed or torch{meant} "
            f"(DeepSpeed's: {', '.join(DEEPSPEED_OPTIMIZERS)}; torch's: {', '.join(sorted(own))})"
        )
    elif is_adam(kind) and optimizer["params"].get("torch_adam"):
        params = {k: v for k, v in optimizer["params"].items() if k not in ("torch_adam", "adam_w_mode")}
        try:
            torch.optim.AdamW([torch.zeros(1)], **params)
        except (TypeError, ValueError, RuntimeError) as err:
            lines.append(f"{told}: optimizer.params: {' '.join(str(err).split())}")
    if scheduler:
        lines += _scheduler_faults(config, told)
    return lines


def _scheduler_faults(config: dict, told: str) -> list[str]:
    """Find faults by building the scheduler on an optimizer of one number, and taking a step."""
    import torch

    kind = config["scheduler"].get("type")
    known = _schedulers()
    if not isinstance(kind, str) or kind not in known:
        near = difflib.get_close_matches(str(kind), known, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        what = "scheduler.type is missing" if kind is None else f"scheduler {kind!r} is not known to DeepSpeed or torch"
        return [f"{told}: {what}{meant} ({', '.join(known)})"]
    takes = [n for n in inspect.signature(known[kind]).parameters if n not in ("optimizer", *POSITION)]
    if stated := [name for name in POSITION if name in config["scheduler"].get("params", {})]:
        return [
            f"{told}: scheduler.params: {stated[0]} is counted by the run; leave it out ({', '.join(takes)} remain)"
        ]
    toy = torch.optim.AdamW([torch.zeros(1)], lr=0.1)
    try:
        with _quiet():
            schedule = make_schedule(config)(toy)  # type: ignore[misc]
            toy.step()
            schedule.step()
    except Exception as err:  # whatever a schedule raises on parameters that it does not take
        return [f"{told}: scheduler.params: {' '.join(str(err).split())}; {kind} takes {', '.join(takes)}"]
    return []


def _schedulers() -> dict[str, type]:
    import torch
    from deepspeed.runtime import lr_schedules

    own = {name: getattr(lr_schedules, name) for name in lr_schedules.VALID_LR_SCHEDULES}
    torchs = vars(torch.optim.lr_scheduler)
    named = {n: torchs[n] for n in torch.optim.lr_scheduler.__all__ if n not in ("LRScheduler", "LambdaLR")}
    return own | {name: found for name, found in named.items() if not name.startswith("_")}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what schedules warn of before the first step: a toy takes none."""
    from deepspeed.utils import logger

    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def make_schedule(config: dict) -> Callable[[Any], Any] | None:
    """Return what makes the schedule of a resolved config, given torch's optimizer; None for a constant rate.

    DeepSpeed would hand torch's own schedules its wrapper, which they refuse; so each is made here, of the optimizer
    itself.
    """
    scheduler = config.get("scheduler")
    if not scheduler:
        return None
    kind, params = scheduler["type"], scheduler.get("params", {})
    name, floors = TRANSFORMERS.get(kind, ("", {}))
    known = {"warmup_type", "warmup_max_lr", "warmup_num_steps", "total_num_steps", *floors}
    from_zero = not any(params.get(floor, default) for floor, default in floors.items())
    if name and params.get("warmup_type") == "linear" and from_zero and params.keys() <= known:
        from transformers import get_scheduler

        steps = {"num_warmup_steps": params["warmup_num_steps"], "num_training_steps": params.get("total_num_steps")}
        return lambda optimizer: get_scheduler(name, optimizer, **steps)
    return lambda optimizer: _schedulers()[kind](optimizer, **params)


def for_deepspeed(config: dict) -> dict:
    """Return a resolved config as DeepSpeed gets it: without the schedule, and with the optimizer at its peak rate."""
    optimizer, peak = config["optimizer"], peak_rate(config)
    if peak is not None:
        optimizer = {**optimizer, "params": {**optimizer["params"], "lr": peak}}
    return {**{k: v for k, v in config.items() if k != "scheduler"}, "optimizer": optimizer}
