"""How a session of training ends, in memory and in words."""

import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config.plan import Plan
from ..config.presets import RECIPE
from ..folders import CHECKPOINTS, METRICS, FolderLock
from ..records import RunRecord
from . import checkpoint
from .soundness import pass_over_ruined

NOT_FINITE = 3  # exit code: training stopped itself


@dataclass
class Trained:
    """What a run leaves in memory.

    Attributes:
        exit_code: as in the interface: 0, 3, or 128 and the number of a signal.
        finished: the run was trained to its end, and rank 0 is to export it.
        state_dict: float32 master weights on rank 0 of a finished run, else None.
        record: of the run, as this session knows it.
        lock: keeps other runs out of the folder until the export stands there.
        config: the model's config.
        tokenizer: the data's tokenizer.
    """

    exit_code: int
    config: Any
    tokenizer: Any
    finished: bool = False
    state_dict: dict[str, torch.Tensor] | None = None
    record: RunRecord | None = None
    lock: FolderLock | None = None


class NonFiniteLoss(RuntimeError):
    """The loss of an optimizer step, or of an evaluation, was not finite."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


def say_interrupted(record: RunRecord, signal_number: int, step: int, plan: Plan) -> None:
    """Record and say that a signal ended the session after `step`, and how to go on. On rank 0."""
    name = signal.Signals(signal_number).name
    reason = f"{name} at step {step} of {plan.total_steps}; a checkpoint was saved"
    record.update(status="interrupted", reason=reason)
    print(f"interrupted: {reason}; go on with --resume_from_checkpoint auto", file=sys.stderr)


def say_not_finite(record: RunRecord, err: NonFiniteLoss, folder: Path, plan: Plan) -> None:
    """Record it, and say how to go on: from before the weights that gave that loss, at a lower rate. On rank 0.

    The checkpoint of those weights is marked and passed over: from it the same loss would come again. So are those
    before it that are not sound any more (`soundness`): the loss that is not finite comes some steps after the ruin.
    """
    root = folder / CHECKPOINTS
    marked = checkpoint.mark_not_finite(root, err.step - 1, str(err))
    passed = f"; {', '.join(marked)}, whose weights gave it, is passed over" if marked else ""
    passed += "".join(f"; {line}" for line in pass_over_ruined(root, folder / METRICS))
    record.update(status="failed", reason=f"{err}{passed}", not_finite_at=err.step)
    rate = RECIPE["lr"] if plan.learning_rate is None else min(plan.learning_rate / 10, 1e-3)
    again = f"--resume_from_checkpoint auto --output_dir {shlex.quote(str(folder))} --learning_rate {rate:g}"
    newest, _ = checkpoint.newest_valid(root)
    begins = f"goes on from {newest.name}" if newest else "begins anew, since no earlier checkpoint is left"
    print(f"stopped: {err}{passed}; a lower rate {begins}: {again}", file=sys.stderr)
