"""Checkpoints that are complete or absent.

DeepSpeed writes `latest` before all ranks are done, and loads whatever it finds. So: every checkpoint is written aside
under a temporary tag, gets a manifest with the size and hash of each file, and is renamed; `latest` is replaced
atomically. Loading verifies the manifest, and falls back to the newest checkpoint that is whole.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist

from ..folders import write_aside
from ..ranks import decided_by_rank_0

MANIFEST = "manifest.json"
MODEL = "model"  # the folder within a checkpoint that holds config and tokenizer
NOT_FINITE = "not_finite.txt"  # the file within a checkpoint that says what came of going on from it
_TEMPORARY = ".tmp-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the older ones are as they were."""


def _not_written(step: int, reason: str) -> str:
    return (
        f"the checkpoint of step {step} was not written: {reason}. Older checkpoints are intact: make room, then go on "
        "with --resume_from_checkpoint auto"
    )


def name_of(step: int) -> str:
    """The folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def save(
    engine: Any,
    root: Path,
    step: int,
    client_state: dict[str, Any],
    manifest: dict[str, Any],
    keep: int,
    keep_too: int | None,
    describe_model: Callable[[Path], None],
    at_least_bytes: int,
) -> None:
    """Save `engine` as `root/step-...` on all ranks together, then prune to the newest `keep`.

    Args:
        client_state: what DeepSpeed is to hand back on loading; rank 0's counts.
        manifest: readable facts to store beside the file list (what the run is, its world size).
        describe_model: writes what the weights alone do not tell (config, tokenizer) to the folder it is given, so that
            a model can be made of the checkpoint alone. Called on rank 0.
        keep: how many checkpoints stay: the newest.
        keep_too: the step of one that stays beside them.
        at_least_bytes: what the checkpoint surely takes on the disk.

    Raises:
        CheckpointError: there is no room for it, or it could not be written.
    """
    temporary = root / (_TEMPORARY + name_of(step))
    if fault := decided_by_rank_0(lambda: _make_room(root, at_least_bytes)):
        raise CheckpointError(_not_written(step, fault))
    try:
        engine.save_checkpoint(str(root), tag=temporary.name, client_state=client_state, save_latest=False)
    except (OSError, RuntimeError) as err:  # torch reports a full disk as a RuntimeError without saying so
        free = shutil.disk_usage(root).free
        raise CheckpointError(_not_written(step, f"{err}; {free / 1e6:,.1f} MB are free at {root}")) from err
    if dist.get_rank() == 0:  # save_checkpoint ended with a barrier: the files of all ranks are there
        describe_model(temporary / MODEL)
        _publish(temporary, root / name_of(step), {"step": step, **manifest})
        write_aside(root / "latest", name_of(step))
        _prune(root, keep, keep_too)
    dist.barrier()


def _make_room(root: Path, at_least_bytes: int) -> str | None:
    """Remove what an unfinished checkpoint left; what is missing for a new one, in words."""
    root.mkdir(parents=True, exist_ok=True)
    for stale in root.glob(_TEMPORARY + "*"):
        shutil.rmtree(stale)
    if (free := shutil.disk_usage(root).free) < at_least_bytes:
        return f"{at_least_bytes / 1e6:,.1f} MB are needed at {root}, {free / 1e6:,.1f} MB are free"
    return None


def _publish(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    files = {}
    for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
        with path.open("rb") as f:
            digest = _sha256(f)
            os.fsync(f.fileno())
        files[path.relative_to(temporary).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    write_aside(temporary / MANIFEST, json.dumps({**manifest, "files": files}, indent=1))
    if final.exists():  # a broken one of the same step, which this run fell back from
        shutil.rmtree(final)
    os.rename(temporary, final)


def _sha256(f: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := f.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _prune(root: Path, keep: int, keep_too: int | None) -> None:
    others = [path for path in root.glob("step-*") if keep_too is None or path.name != name_of(keep_too)]
    for old in sorted(others)[:-keep]:
        shutil.rmtree(old)


def set_aside(root: Path, first_step: int) -> Path | None:
    """Move the checkpoints under `root` from `first_step` on to a new folder there; that folder, None if none is.

    Nothing takes them for checkpoints of the run any more, and nothing deletes them.
    """
    later = [path for path in sorted(root.glob("step-*")) if path.name >= name_of(first_step)]
    if not later:
        return None
    number = 1 + max((int(path.name.rpartition("-")[2]) for path in root.glob("set-aside-*")), default=0)
    aside = root / f"set-aside-{number:03d}"
    aside.mkdir()
    for path in later:
        path.rename(aside / path.name)
    if left := sorted(root.glob("step-*")):
        write_aside(root / "latest", left[-1].name)
    else:
        (root / "latest").unlink(missing_ok=True)
    return aside


def fault_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint folder: a line; None if it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except FileNotFoundError:
        return "has no manifest (it was not finished)"
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
        return "has a damaged manifest"
    for name, facts in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}"
        with path.open("rb") as f:
            if _sha256(f) != facts["sha256"]:
                return f"{name} is damaged (its SHA-256 differs)"
    return None


def mark_not_finite(root: Path, first_step: int, why: str) -> list[str]:
    """Mark the checkpoints from `first_step` on, whose weights gave a loss that is not finite; their names.

    `newest_valid` passes over them. They are as they were otherwise, for whoever names one.
    """
    marked = [path for path in sorted(root.glob("step-*")) if path.name >= name_of(first_step)]
    for path in marked:
        write_aside(path / NOT_FINITE, f"{why}\n")
    return [path.name for path in marked]


def newest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint under `root`, or None; and a line for each newer one that is not, or is marked."""
    passed_over: list[str] = []
    for checkpoint in sorted(root.glob("step-*"), reverse=True):
        fault = fault_of(checkpoint)
        if fault is None and (marker := checkpoint / NOT_FINITE).is_file():
            fault = f"from it {marker.read_text(encoding='utf-8').strip()}"
        if fault is None:
            return checkpoint, passed_over
        passed_over.append(f"checkpoint {checkpoint}: {fault}; passed over")
    return None, passed_over


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The facts stored with a checkpoint: "step", and what `save` was given."""
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """While inside, `torch.load` reads tensors, plain types and DeepSpeed's own only, though DeepSpeed asks for all.

    A file that would run other code on being read raises `pickle.UnpicklingError`.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]


def load(engine: Any, checkpoint: Path) -> dict[str, Any]:
    """Load `checkpoint` into `engine` on all ranks; the client state it was saved with.

    Raises:
        pickle.UnpicklingError: a file holds more than tensors and plain values; nothing of it was run.
    """
    with _weights_only():
        # the schedule is not loaded: it may be another one from here on
        path, client_state = engine.load_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False
        )
    if path is None:
        raise RuntimeError(f"DeepSpeed could not load {checkpoint}")
    return client_state


def float32_weights(checkpoint: Path, zero_stage: int) -> dict[str, torch.Tensor]:
    """The float32 master weights in a whole checkpoint: name -> weight, on the CPU, without the tied `lm_head.weight`.

    Needs no GPU and no process group, whatever the number of ranks that saved it. DeepSpeed's files are pickles.

    Raises:
        ValueError: the checkpoint holds weights of lower precision, but no float32 masters of them.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said, DeepSpeed need not look for one
    if zero_stage == 0:
        weights = _weights_without_zero(checkpoint / "mp_rank_00_model_states.pt")
    else:
        with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull), contextlib.redirect_stderr(devnull):
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            with _weights_only():
                weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    weights.pop("lm_head.weight", None)
    # Cloned: they are views of a few flat tensors, and what shares storage is taken for tied on saving.
    return {name: weight.detach().clone() for name, weight in weights.items()}


def _weights_without_zero(file: Path) -> dict[str, torch.Tensor]:
    """From a file of ZeRO stage 0, which holds the masters by parameter group, without names."""
    with _weights_only():
        states = torch.load(file, map_location="cpu", weights_only=True)
    weights = {name: weight for name, weight in states["module"].items() if name != "lm_head.weight"}
    if all(weight.dtype == torch.float32 for weight in weights.values()):
        return weights
    masters = [master for group in states["optimizer"].get("fp32_groups", []) for master in group]
    # The groups of `training`: matrices, then vectors.
    names = sorted(weights, key=lambda name: weights[name].ndim < 2)
    if len(masters) != len(names) or not all(
        torch.equal(master.to(weights[name].dtype), weights[name]) for name, master in zip(names, masters, strict=True)
    ):
        raise ValueError(f"{file}: no float32 master weights that belong to its {weights[names[0]].dtype} weights")
    return dict(zip(names, masters, strict=True))


def load_universal(engine: Any, checkpoint: Path) -> dict[str, Any]:
    """As `load`, of a checkpoint whose states were cut for another number of ranks, or at stage 1 for 2 or the reverse.

    `engine` must have been made with `"checkpoint": {"load_universal": true}`. Rank 0 converts the checkpoint to
    DeepSpeed's universal format, in a temporary folder beside it that is gone afterwards; it needs the room of another
    checkpoint.
    """
    universal = checkpoint.with_name(_TEMPORARY + "universal-" + checkpoint.name)
    if dist.get_rank() == 0:
        shutil.rmtree(universal, ignore_errors=True)
        _convert_to_universal(checkpoint, universal)
    dist.barrier()
    client_state = load(engine, universal)
    # At stage 3 DeepSpeed gives all parameters one and the same tensor that counts Adam's steps, which each of them
    # then counts up.
    for state in engine.optimizer.optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(universal)
    return client_state


def _convert_to_universal(checkpoint: Path, universal: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    arguments = argparse.Namespace(
        input_folder=str(checkpoint),
        output_folder=str(universal),
        num_extract_workers=1,  # in this process: children would inherit its device and its connections
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with (
        _weights_only(),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        main(arguments)
