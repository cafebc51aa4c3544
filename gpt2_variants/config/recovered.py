"""The record of a run whose `run.json` is damaged or gone, from the newest whole of its checkpoints."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from ..folders import CHECKPOINTS, read_manifest_of
from ..records import DamagedRecord, fault_of_facts, read_facts
from .optimizer_json import LENGTHS, PEAK, WITH_WARMUP

# Fields of a plan that say what an option of the same name asks for.
_AS_ASKED = (
    "variant size init_from dataset tokenizer block_size seed train_batch_size per_device_train_batch_size "
    "per_device_eval_batch_size learning_rate gradient_checkpointing compile apex attn_implementation deterministic "
    "eval_steps save_steps logging_steps save_total_limit load_best_model_at_end report_to"
).split()


class Recovered(NamedTuple):
    """What is known of a run without its `run.json`.

    Attributes:
        facts: those of the record; empty where no checkpoint tells them.
        checkpoint: that they come from; None where there is none.
        why: what is wrong with the `run.json`; None of one that is whole.
    """

    facts: dict[str, Any]
    checkpoint: Path | None
    why: str | None


def facts_of_run(folder: Path) -> Recovered:
    """Return what the record of the run in `folder` says or, where it is damaged or gone, what a checkpoint says of it.

    Raises:
        ValueError: the system does not let it be read; a line.
    """
    try:
        return Recovered(read_facts(folder), None, None)
    except FileNotFoundError:
        why = "is missing"
    except DamagedRecord as err:
        why = err.why
    for checkpoint in sorted((folder / CHECKPOINTS).glob("step-*"), reverse=True):
        if (facts := _facts_in(checkpoint)) is not None:
            return Recovered(facts, checkpoint, why)
    return Recovered({}, None, why)


def _facts_in(checkpoint: Path) -> dict[str, Any] | None:
    """Return the record in a checkpoint; None where its files are not all there, or tell none.

    Their content is verified when it is loaded.
    """
    try:
        manifest = read_manifest_of(checkpoint)
        files, plan = manifest["files"], manifest["plan"]
        if any((checkpoint / name).stat().st_size != facts["bytes"] for name, facts in files.items()):
            return None
        facts = {**(manifest.get("record") or _of_plan(plan)), "plan": plan}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return None if fault_of_facts(facts) else facts


def _of_plan(plan: dict[str, Any]) -> dict[str, Any]:
    """Return a record that comes to `plan`, for a checkpoint of a version that kept the plan alone.

    All that can be asked for is taken for asked, and the rest stands in the DeepSpeed JSON, where "auto" is put at what
    the options say. What a preset chose is not told any more.
    """
    asked = {name: plan[name] for name in _AS_ASKED if plan.get(name) is not None}
    asked |= {"preset": "seed", "max_steps": plan["total_steps"], **(plan.get("reading") or {})}
    if plan.get("init_from"):
        asked.pop("size", None)
    else:
        special = ("bos_token_id", "eos_token_id")
        asked["model_args"] = {name: value for name, value in plan["model"].items() if name not in special}
    ds = json.loads(json.dumps(plan["ds_config"]))
    ds |= dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
    scheduler = ds.get("scheduler", {})
    params = scheduler.get("params", {})
    params |= {name: "auto" for name in (*LENGTHS, PEAK.get(scheduler.get("type"))) if name in params}
    if scheduler.get("type") in WITH_WARMUP:
        asked["warmup_steps"] = plan["warmup_steps"]
    if scheduler.get("type") == "LRRangeTest" or {"muon_lr", "adam_lr"} & ds["optimizer"]["params"].keys():
        asked.pop("learning_rate", None)
    names = ("variant", "data", "data_fingerprint", "num_parameters", "flops_per_token")
    return {"asked": asked, "deepspeed_json": ds, **{name: plan.get(name) for name in names}}
