"""A run that is gone on with says itself what it is: options that are not asked for anew stay as they were."""

from pathlib import Path
from typing import Any

from ..faults import UsageError
from ..ranks import world_size
from ..records import asked_options, read_facts
from ..variant_code import file_in_run, find
from .options import checked, option_fields

# What each start says for itself.
OF_ONE_START = ("resume_from_checkpoint", "dry_run", "output_dir")
# How a batch is asked for.
BATCH = ("train_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")
# Two ways to say one thing: asking for one of them now replaces the other one.
EITHER = (("max_steps", "num_train_epochs"), ("warmup_steps", "warmup_ratio"))


def run_folder_of(checkpoint: Path) -> Path | None:
    """The run's folder that `checkpoint` names or lies in; None where it belongs to no run."""
    places = (checkpoint, *checkpoint.parents[:3])  # one that was set aside lies a folder deeper
    return next((place for place in places if (place / "run.json").is_file()), None)


def go_on(values: dict[str, Any]) -> dict[str, Any]:
    """What is asked for on the command line, and beside it what was asked of the run that it goes on with.

    Args:
        values: option -> value, as asked for now.

    Returns:
        The fields of `Options`, with `asked`, and with `saved_ds_config` where the run's own DeepSpeed JSON counts.

    Raises:
        UsageError: there is neither a variant nor a run that could say it, or its `run.json` cannot be read.
    """
    asked = {name: value for name, value in values.items() if name not in OF_ONE_START}
    folder = _run_to_go_on_with(values)
    if folder is None:
        return {**values, "asked": asked}
    try:
        facts = read_facts(folder)
        saved = _saved_options(folder, facts)
    except ValueError as err:
        raise UsageError([f"--resume_from_checkpoint {values['resume_from_checkpoint']}: {err}"]) from err
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
    """The folder of the run that is gone on with; None where there is none yet, or the path lies in none.

    Raises:
        UsageError: neither a run nor a variant is told.
    """
    resume = values.get("resume_from_checkpoint")
    if resume is None:
        return None
    if resume != "auto":
        return run_folder_of(Path(resume).absolute())
    folder = Path(values.get("output_dir") or f"runs/{find(values['variant']).name if 'variant' in values else None}")
    if (folder / "run.json").is_file():
        return folder
    if "variant" not in values:
        raise UsageError([f"--resume_from_checkpoint auto: {folder} holds no run to go on with; give its --output_dir"])
    return None


def _saved_options(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Option -> value, what was asked of the run in `folder`. Raises ValueError for a value that is none."""
    fields = {f.name: f for f in option_fields() if f.name not in OF_ONE_START}
    asked = asked_options(facts)
    if own := file_in_run(folder, facts.get("plan", {})):
        asked["variant"] = own
    try:
        return {
            name: value if fields[name].type is dict else checked(fields[name], value)
            for name, value in asked.items()
            if name in fields
        }
    except ValueError as err:
        raise ValueError(f"{folder}/run.json: {err}") from err


def _keep_batch(merged: dict[str, Any], plan: dict[str, Any]) -> None:
    """Share the run's global batch out anew where there is another number of ranks than before.

    As many sequences a forward pass as before, where that fits, so that it needs no more memory.
    """
    world = world_size()
    if plan["world_size"] == world:
        return
    for name in BATCH:
        merged.pop(name, None)
    merged["train_batch_size"] = plan["train_batch_size"]
    micro = plan["per_device_train_batch_size"]
    if plan["train_batch_size"] % (micro * world) == 0:
        merged["per_device_train_batch_size"] = micro
    if merged.get("saved_ds_config") is not None:
        shares = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        merged["saved_ds_config"] |= {name: "auto" for name in shares if name in merged["saved_ds_config"]}
