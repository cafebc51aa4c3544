"""The plan of a run that is over, from its folder: the only reader of `run.json`'s older schemas."""

import json
from pathlib import Path
from typing import Any

from ..registry import VARIANTS

# Of schema 1: options that say nothing of the recipe, or that other fields of the plan say.
_NOT_TOLD = frozenset(
    (
        "variant preset output_dir report_to dry_run resume_from_checkpoint push_to_hub hub_model_id hub_private "
        "deepspeed_config num_train_epochs max_steps warmup_ratio model_args"
    ).split()
)


def saved_plan(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the `Plan` of the run in `folder`, of whose `run.json` these are the facts.

    Schema 1 has no plan: it is put together from the options, `ds_config.json`, and the config of the exported model or
    of a checkpoint. What those do not tell is None, never a guess.
    """
    if "plan" in facts:
        return dict(facts["plan"])
    options = facts.get("options") or {}
    ds = _read(folder / "ds_config.json")
    optimizer, scheduler = ds.get("optimizer", {}), ds.get("scheduler") or {"type": "constant"}
    params, schedule = dict(optimizer.get("params", {})), scheduler.get("params", {})
    precision = {True: "bf16", False: "float32", None: None}[ds.get("bf16", {}).get("enabled", False) if ds else None]
    plan = {name: value for name, value in options.items() if name not in _NOT_TOLD}
    return plan | {
        "variant": facts.get("variant", options.get("variant")),
        "model": _model(folder, facts.get("variant"), options),
        "num_parameters": facts.get("num_parameters"),
        "flops_per_token": facts.get("flops_per_token"),
        "data": facts.get("data"),
        "data_fingerprint": facts.get("data_fingerprint"),
        "train_batch_size": ds.get("train_batch_size", options.get("train_batch_size")),
        "per_device_train_batch_size": ds.get("train_micro_batch_size_per_gpu"),
        "gradient_accumulation_steps": ds.get("gradient_accumulation_steps"),
        "world_size": (facts.get("starts") or [{}])[-1].get("world_size"),
        "total_steps": schedule.get("total_num_steps", options.get("max_steps")),
        "learning_rate": schedule.get("warmup_max_lr", params.pop("lr", options.get("learning_rate"))),
        "weight_decay": params.pop("weight_decay", options.get("weight_decay")),
        "optimizer": {"type": optimizer.get("type"), "params": {k: v for k, v in params.items() if k != "lr"}},
        "schedule": scheduler,
        "warmup_steps": schedule.get("warmup_num_steps"),
        "gradient_clipping": ds.get("gradient_clipping"),
        "precision": precision,
        "zero_stage": ds.get("zero_optimization", {}).get("stage", 0) if ds else None,
        "load_best_model_at_end": False,
        "chosen": [],
    }


def _model(folder: Path, variant: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return the config fields of the run's model: of a config that lies there, else those that were asked for."""
    configs = [folder / "model" / "config.json", *sorted(folder.glob("checkpoints/step-*/model/config.json"))]
    config = next((found for path in configs if (found := _read(path))), None)
    if config is None or variant not in VARIANTS:
        return {"size": options.get("size"), **(options.get("model_args") or {})}
    return {name: config[name] for name in VARIANTS[variant].config_fields() if name in config}


def _read(path: Path) -> dict[str, Any]:
    """Return the JSON object at `path`; an empty one where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
