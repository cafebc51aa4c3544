"""What an experiment will take, said before it begins: runs, FLOPs, hours from a measured step, disk."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config.plan import Plan
from ..faults import UsageError
from ..report.runs import read_run
from ..words import counted
from .experiment import Experiment, Trial
from .runner import Runner

STEPS = 8  # of the run that is measured


@dataclass(frozen=True)
class Measured:
    """A short run of the baseline.

    Attributes:
        tokens_per_second: of training.
        seconds_beside: from the start to the first step, the evaluation, and the end.
        bytes_per_parameter: on disk.
        flops_per_token: of its training.
    """

    tokens_per_second: float
    seconds_beside: float
    bytes_per_parameter: float
    flops_per_token: float


def measure(experiment: Experiment, trial: Trial) -> Measured:
    """Train `trial` for a few steps, in a folder that is removed.

    Raises:
        UsageError: it failed.
    """
    experiment.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".measured-", dir=experiment.output_dir) as place:
        folder = Path(place) / "run"
        words = [*experiment.options(trial, folder), "--max_steps", str(STEPS)]
        words += ["--logging_steps", "1", "--no-load_best_model_at_end"]
        ((_, ended),) = Runner(1, experiment.gpus_per_run).run([(folder, words)])
        if ended.code:
            raise UsageError([f"a first run of {STEPS} steps of {trial} failed: {ended.last_line}"])
        run = read_run(folder)
        used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        speed = run.tokens_per_second or 1.0
        beside = ended.seconds - STEPS * (run.tokens_per_step or 0.0) / speed
        return Measured(speed, max(beside, 0.0), used / (run.num_parameters or 1), run.flops_per_token or 1.0)


def seconds_of(plan: Plan, measured: Measured) -> float:
    """Return how long a run of `plan` takes, by its FLOPs; evaluations count, with a third of a step's."""
    tokens = plan.total_steps * plan.train_batch_size * plan.block_size
    evaluations = plan.total_steps / plan.eval_steps * (plan.validation_blocks or 0) * plan.block_size / 3
    cost = plan.flops_per_token / measured.flops_per_token / measured.tokens_per_second
    return measured.seconds_beside + (tokens + evaluations) * cost


def forecast(plans: Sequence[Plan], measured: Measured, jobs: int, folder: Path) -> str:
    """Return the line that tells what the runs of `plans`, `jobs` at a time, will take."""
    flops = sum(p.flops_per_token * p.total_steps * p.train_batch_size * p.block_size for p in plans)
    hours = sum(seconds_of(plan, measured) for plan in plans) / jobs / 3600
    disk = sum(plan.num_parameters for plan in plans) * measured.bytes_per_parameter
    free = shutil.disk_usage(folder).free
    warning = "; more than is free there" if disk > free else ""
    return (
        f"{counted(len(plans), 'run')} to train, {flops:.3g} FLOPs, about {hours:.2g} hours ({jobs} at a time, by a "
        f"step that was measured), {disk / 2**30:.2g} GiB on disk ({free / 2**30:.3g} GiB are free{warning})"
    )
