"""A run that is gone on with says itself what it is: options that are not asked for anew stay as they were."""

import sys
from pathlib import Path
from typing import Any

from ..faults import UsageError
from ..folders import holds_checkpoints, holds_run
from ..ranks import main_rank, world_size
from ..records import asked_options
from ..variant_code import file_in_run, find
from .options import checked, option_fields
from .recovered import facts_of_run

# What each start says for itself.
OF_ONE_START = ("resume_from_checkpoint", "dry_run", "output_dir")
# How a batch is asked for.
BATCH = ("train_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
# Two ways to say one thing: asking for one of them now replaces the other one.
EITHER = (("max_steps", "num_train_epochs"), ("warmup_steps", "warmup_ratio"))


def run_folder_of(checkpoint: Path) -> Path | None:
    """Return the run's folder that `checkpoint` names or lies in; None where it belongs to no run."""
    places = (checkpoint, *checkpoint.parents[:3])  # one that was set aside lies a folder deeper
    return next((place for place in places if holds_run(place)), None)


def go_on(values: dict[str, Any]) -> dict[str, Any]:
    """Return what is asked for on the command line, and beside it what was asked of the run that it goes on with.

    Args:
        values: option -> value, as asked for now.

    Returns:
        The fields of `Options`, with `asked`, and with `saved_ds_config` where the run's own DeepSpeed JSON counts.

    Raises:
        UsageError: there is neither a variant nor a run that could say it.
    """
    asked = {name: value for name, value in values.items() if name not in OF_ONE_START}
    folder = _run_to_go_on_with(values)
    if folder is None:
        return {**values, "asked": asked}
    resume = values["resume_from_checkpoint"]
    try:
        facts, checkpoint, why = facts_of_run(folder)
        saved = _saved_options(folder, facts)
    except ValueError as err:
        raise UsageError([f"--resume_from_checkpoint {resume}: {err}"]) from err
    if checkpoint is not None and main_rank():
        print(f"{folder}: run.json {why}: what the run is, is read from {checkpoint.name}", file=sys.stderr)
    if not facts and "variant" not in values:
        what = "no whole checkpoint tells" if holds_checkpoints(folder) else "there is no checkpoint that would tell"
        raise UsageError(
            [
                f"--resume_from_checkpoint {resume}: {folder}/run.json {why or 'tells nothing'}, and {what} what the "
                "run was; give --variant and all other options anew, or restore it"
            ]
        )
    for pair in EITHER:
        if values.keys() & pair:
            saved = {name: value for name, value in saved.items() if name not in pair}
    if "model_args" in asked:
        asked["model_args"] = {**saved.get("model_args", {}), **asked["model_args"]}
    both = {**saved, **asked}
    merged = {"output_dir": str(folder), **values, **both, "asked": both}
    if "deepspeed_config" not in values:
        merged["saved_ds_config"] = facts.get("deepspeed_json")
    if "plan" in facts and not values.keys() & BATCH:
        _keep_batch(merged, facts["plan"])
    return merged


def _run_to_go_on_with(values: dict[str, Any]) -> Path | None:
    """Return the folder of the run that is gone on with; None where there is none yet, or the path lies in none.

    Raises:
        UsageError: neither a run nor a variant is told.
    """
    resume = values.get("resume_from_checkpoint")
    if resume is None:
        return None
    if resume != "auto":
        return run_folder_of(Path(resume).absolute())
    folder = Path(values.get("output_dir") or f"runs/{find(values['variant']).name if 'variant' in values else None}")
    if holds_run(folder):
        return folder
    if "variant" not in values:
        raise UsageError([f"--resume_from_checkpoint auto: {folder} holds no run to go on with; give its --output_dir"])
    return None


def _saved_options(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Return option -> value, what was asked of the run in `folder`. Raises ValueError for a value that is none."""
    fields = {f.name: f for f in option_fields() if f.name not in OF_ONE_START}
    asked = asked_options(facts)
    if own := file_in_run(folder, facts.get("plan", {})):
        asked["variant"] = own
    saved = {}
    for name, value in asked.items():
        if name not in fields:
            continue
        try:
            if fields[name].type is dict:
                saved[name] = dict(value)
            else:
                saved[name] = checked(fields[name], value)
        except (ValueError, TypeError, AttributeError) as err:
            said = err if isinstance(err, ValueError) and str(err) else f"{value}: is no value of it"
            raise ValueError(f"{folder}/run.json: asked.{name}: {said}; correct it, or give --{name}") from err
    return saved


def _keep_batch(merged: dict[str, Any], plan: dict[str, Any]) -> None:
    """Share the run's global batch out anew where there is another number of ranks than before.

    As many sequences a forward pass as before, where that fits, so that it needs no more memory.
    """
    world = world_size()
    if plan.get("world_size") in (None, world) or not plan.get("train_batch_size"):
        return
    for name in BATCH:
        merged.pop(name, None)
    merged["train_batch_size"] = plan["train_batch_size"]
    micro = plan.get("per_device_train_batch_size")
    if micro and plan["train_batch_size"] % (micro * world) == 0:
        merged["per_device_train_batch_size"] = micro
    if merged.get("saved_ds_config") is not None:
        shares = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        merged["saved_ds_config"] |= {name: "auto" for name in shares if name in merged["saved_ds_config"]}
