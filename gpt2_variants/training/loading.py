"""Checkpoints are read: into an engine, or as float32 weights alone. Their pickles may hold no code."""

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..folders import TEMPORARY


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
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
    with weights_only():
        # the schedule is not loaded: it may be another one from here on
        path, client_state = engine.load_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False
        )
    if path is None:
        raise RuntimeError(f"DeepSpeed could not load {checkpoint}")
    return client_state


def float32_weights(checkpoint: Path, zero_stage: int) -> dict[str, torch.Tensor]:
    """Return the float32 masters in a whole checkpoint: name -> weight, on the CPU, without the tied `lm_head.weight`.

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

            with weights_only():
                weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    weights.pop("lm_head.weight", None)
    # Cloned: they are views of a few flat tensors, and what shares storage is taken for tied on saving.
    return {name: weight.detach().clone() for name, weight in weights.items()}


def _weights_without_zero(file: Path) -> dict[str, torch.Tensor]:
    """Read them from a file of ZeRO stage 0, which holds the masters by parameter group, without names."""
    with weights_only():
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
    """Do as `load` with a checkpoint whose states were cut for another number of ranks, or stage 1 for 2 or back.

    `engine` must have been made with `"checkpoint": {"load_universal": true}`. Rank 0 converts the checkpoint to
    DeepSpeed's universal format, in a temporary folder beside it that is gone afterwards; it needs the room of another
    checkpoint.
    """
    universal = checkpoint.with_name(TEMPORARY + "universal-" + checkpoint.name)
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
        weights_only(),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        main(arguments)
