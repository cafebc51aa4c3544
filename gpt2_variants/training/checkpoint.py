"""Checkpoints that are complete or absent.

DeepSpeed writes `latest` before all ranks are done, and loads whatever it finds. So: every checkpoint is written aside
under a temporary tag, gets a manifest with the size and hash of each file, and is renamed; `latest` is replaced
atomically. One that is deleted is renamed to a temporary tag first. Loading verifies the manifest, and falls back to
the newest checkpoint that is whole.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch.distributed as dist

from ..faults import RunError
from ..folders import MANIFEST, TEMPORARY, checksum_of, read_manifest_of, remove_aside, sync, write_aside
from ..ranks import RankZeroFailed, decided_by_rank_0
from ..reasons import disk_fault

MODEL = "model"  # the folder within a checkpoint that holds config and tokenizer
MEGABYTE = 1e6
NOT_FINITE = "not_finite.txt"  # the file within a checkpoint that says what came of going on from it


class CheckpointError(RunError):
    """A checkpoint could not be written; the older ones are as they were."""


def _not_written(step: int, reason: str) -> str:
    return (
        f"the checkpoint of step {step} was not written: {reason}. Older checkpoints are intact: then go on with "
        "--resume_from_checkpoint auto"
    )


def name_of(step: int) -> str:
    """Return the folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def save(
    engine: Any,
    root: Path,
    step: int,
    client_state: dict[str, Any],
    manifest: dict[str, Any],
    keep: int,
    keep_too: Collection[int],
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
        keep_too: the steps of those that stay beside them.
        at_least_bytes: what the checkpoint surely takes on the disk.

    Raises:
        CheckpointError: there is no room for it, or it could not be written on some rank; on rank 0.
        RankZeroFailed: the same, on the others.
    """
    temporary = root / (TEMPORARY + name_of(step))
    decided_by_rank_0(lambda: _make_room(root, at_least_bytes, step))
    with _faults_of_writing(engine) as faults:
        try:
            engine.save_checkpoint(str(root), tag=temporary.name, client_state=client_state, save_latest=False)
        except (OSError, RuntimeError) as err:
            faults.append(err)
    _agree_that_written(faults, temporary, step)
    decided_by_rank_0(lambda: _finish(temporary, root, step, manifest, keep, keep_too, describe_model))


@contextlib.contextmanager
def _faults_of_writing(engine: Any) -> Iterator[list[Exception]]:
    """While inside, what `engine` cannot write is put into the list, and it goes on: its ranks wait for one another."""
    faults: list[Exception] = []

    def noting(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return None if faults else write(*args, **kwargs)
            except (OSError, RuntimeError) as err:  # torch reports a full disk as a RuntimeError without saying so
                faults.append(err)

        return call

    writers = [(engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")]
    writers = [(owner, name) for owner, name in writers if hasattr(owner, name)]
    for owner, name in writers:
        setattr(owner, name, noting(getattr(owner, name)))
    try:
        yield faults
    finally:
        for owner, name in writers:
            delattr(owner, name)  # the method of its class counts again


def _agree_that_written(faults: Sequence[Exception], temporary: Path, step: int) -> None:
    """Raise on all ranks where one of them could not write; then nothing of the checkpoint is left."""
    free = shutil.disk_usage(temporary.parent).free
    full = "the disk is full, " if free < MEGABYTE else ""
    told = [[disk_fault(err) or f"{full}{err}; make room" for err in faults]]
    if (world := dist.get_world_size()) > 1:
        told *= world
        dist.all_gather_object(told, told[0])
    failed = [(rank, lines[0]) for rank, lines in enumerate(told) if lines]
    if not failed:
        return
    if dist.get_rank() > 0:
        raise RankZeroFailed(failed[0][1])
    rank, reason = failed[0]
    shutil.rmtree(temporary, ignore_errors=True)  # its room is needed, for run.json too
    where = f" (rank {rank})" if world > 1 else ""
    reason = f"{reason}{where}; {free / 1e6:,.1f} MB were free at {temporary.parent}"
    raise CheckpointError(_not_written(step, reason)) from (faults[0] if faults else None)


def _finish(
    temporary: Path,
    root: Path,
    step: int,
    manifest: dict[str, Any],
    keep: int,
    keep_too: Collection[int],
    describe_model: Callable[[Path], None],
) -> None:
    """Make a checkpoint of what all ranks have written to `temporary`, and delete older ones. On rank 0."""
    try:
        describe_model(temporary / MODEL)
        _publish(temporary, root / name_of(step), {"step": step, **manifest})
    except OSError as err:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(_not_written(step, disk_fault(err) or str(err))) from err
    try:
        write_aside(root / "latest", name_of(step))
        _prune(root, keep, keep_too)
    except OSError as err:
        what = f"the checkpoint of step {step} was written, but then no more: {disk_fault(err) or err}"
        raise CheckpointError(f"{what}; then go on with --resume_from_checkpoint auto") from err


def _make_room(root: Path, at_least_bytes: int, step: int) -> None:
    """Remove what an unfinished checkpoint left. Raises `CheckpointError` where there is no room for a new one."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        clean(root)
    except OSError as err:
        raise CheckpointError(_not_written(step, disk_fault(err) or str(err))) from err
    if (free := shutil.disk_usage(root).free) < at_least_bytes:
        needed = f"{at_least_bytes / 1e6:,.1f} MB are needed at {root}, {free / 1e6:,.1f} MB are free; make room"
        raise CheckpointError(_not_written(step, needed))


def clean(root: Path) -> None:
    """Remove what a killed process left under `root`: checkpoints half written, half deleted, or half converted."""
    for stale in root.glob(TEMPORARY + "*"):
        shutil.rmtree(stale)


def _publish(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    files = {}
    for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
        with path.open("rb") as f:
            digest = _sha256(f)
            os.fsync(f.fileno())
        files[path.relative_to(temporary).as_posix()] = {"bytes": path.stat().st_size, "sha256": digest}
    for folder in (p for p in temporary.rglob("*") if p.is_dir()):
        sync(folder)
    manifest = {**manifest, "files": files}
    write_aside(temporary / MANIFEST, json.dumps({**manifest, "sha256": checksum_of(manifest)}, indent=1))
    if final.exists():  # a broken one of the same step, which this run fell back from
        remove_aside(final)
    os.rename(temporary, final)


def _sha256(f: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := f.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _prune(root: Path, keep: int, keep_too: Collection[int]) -> None:
    others = [path for path in root.glob("step-*") if path.name not in map(name_of, keep_too)]
    for old in sorted(others)[:-keep]:
        remove_aside(old)


def set_aside(root: Path, first_step: int, beside: Path) -> Path | None:
    """Move the checkpoints under `root` from `first_step` on to a new folder there; that folder, None if none is.

    Nothing takes them for checkpoints of the run any more, and nothing deletes them. The file `beside` is copied there
    first. The newest is moved first: what is left after a kill are the checkpoints up to some step, as before.
    """
    later = [path for path in sorted(root.glob("step-*")) if path.name >= name_of(first_step)]
    if not later:
        return None
    number = 1 + max((int(path.name.rpartition("-")[2]) for path in root.glob("set-aside-*")), default=0)
    aside = root / f"set-aside-{number:03d}"
    aside.mkdir()
    if beside.is_file():
        shutil.copy2(beside, aside)
    for path in reversed(later):
        path.rename(aside / path.name)
    if left := sorted(root.glob("step-*")):
        write_aside(root / "latest", left[-1].name)
    else:
        (root / "latest").unlink(missing_ok=True)
    return aside


def fault_of(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint folder: a line; None if it is whole."""
    try:
        manifest = read_manifest_of(checkpoint)
        files = {
            name: {"bytes": facts["bytes"], "sha256": facts["sha256"]} for name, facts in manifest["files"].items()
        }
        is_whole = {"step", "cut", "identity"} <= manifest.keys()
    except FileNotFoundError:
        return "has no manifest (it was not finished)"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        is_whole = False
    if not is_whole:
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
        mark(path, f"from it {why}")
    return [path.name for path in marked]


def mark(checkpoint: Path, why: str) -> None:
    """Mark a checkpoint, so that `newest_valid` passes over it; `why` in words."""
    write_aside(checkpoint / NOT_FINITE, f"{why}\n")


def newest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint under `root`, or None, and a line for each newer one that is passed over."""
    passed_over: list[str] = []
    for checkpoint in sorted(root.glob("step-*"), reverse=True):
        fault = fault_of(checkpoint)
        if fault is None and (marker := checkpoint / NOT_FINITE).is_file():
            why = marker.read_text(encoding="utf-8", errors="replace").strip()
            fault = why if why.startswith(("from it ", "its ")) else f"from it {why}"  # as versions of before wrote it
        if fault is None:
            return checkpoint, passed_over
        passed_over.append(f"checkpoint {checkpoint}: {fault}; passed over")
    return None, passed_over


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the facts stored with a checkpoint: "step", and what `save` was given."""
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
