"""Which checkpoint a run goes on from, if it may."""

import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..config.options import Options
from ..data import Data
from ..faults import UsageError
from ..ranks import main_rank, world_size
from . import checkpoint


def identity(run: Options, data: Data, ds_config: dict) -> dict[str, Any]:
    """What must be the same to go on from a checkpoint: it decides the weights and the order of the data."""
    return {
        "variant": run.variant,
        "size": run.size,
        "init_from": run.init_from,
        "model_args": run.model_args,
        "block_size": run.block_size,
        "data": data.fingerprint,
        "train_batch_size": ds_config["train_batch_size"],
        "seed": run.seed,
    }


def sharding(ds_config: dict) -> dict[str, int]:
    """What decides how the optimizer's states are cut into files."""
    return {"world_size": world_size(), "zero_stage": ds_config.get("zero_optimization", {}).get("stage", 0)}


def agree_on_checkpoint(run: Options, identity: dict[str, Any], cut: dict[str, int]) -> Path | None:
    """The checkpoint to go on from, chosen and verified by rank 0. Raises `UsageError` on all ranks."""
    chosen: list[Any] = [None, None]
    if main_rank() and run.resumes:
        chosen = list(_choose_checkpoint(run, identity, cut))
    dist.broadcast_object_list(chosen)
    path, fault = chosen
    if fault:
        raise UsageError([fault])
    return path


def _choose_checkpoint(run: Options, identity: dict[str, Any], cut: dict[str, int]) -> tuple[Path | None, str | None]:
    if run.resume_from_checkpoint == "auto":
        path, passed_over = checkpoint.newest_valid(Path(run.output_dir) / "checkpoints")
        print(
            "\n".join([*passed_over, f"resuming from {path}" if path else "no checkpoint yet: starting"]),
            file=sys.stderr,
        )
        if path is None:
            return None, None
    else:
        path = Path(run.resume_from_checkpoint).resolve()
        if fault := checkpoint.fault_of(path):
            return None, f"--resume_from_checkpoint {path}: {fault}; give another, or auto for the newest valid one"
    manifest = checkpoint.read_manifest(path)
    saved = manifest["identity"]
    for name, value in identity.items():
        if saved.get(name) != value:
            made_with = (
                "other training data than these" if name == "data" else f"{name}={saved.get(name)}, not {name} {value}"
            )
            return None, (
                f"--resume_from_checkpoint {path}: was made with {made_with}; ask for the same, or give a new "
                "--output_dir"
            )
    if manifest["cut"] != cut:
        before, now = manifest["cut"]["zero_stage"], cut["zero_stage"]
        if before != now and {before, now} != {1, 2}:
            return None, (
                f"--resume_from_checkpoint {path}: was made with ZeRO stage {before}, and cannot go on at stage {now} "
                "(only 1 and 2 can be exchanged); give the DeepSpeed config it was made with"
            )
        print(f"the checkpoint was made with {_said(manifest['cut'])}; going on with {_said(cut)}", file=sys.stderr)
    return path, None


def _said(cut: dict[str, int]) -> str:
    return f"{cut['world_size']} ranks at ZeRO stage {cut['zero_stage']}"
