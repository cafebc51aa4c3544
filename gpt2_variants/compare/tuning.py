"""The learning rate of each entry, chosen on seeds that are not reported; every entry has the same trials."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from .experiment import Experiment, Trial, Unit
from .state import finished_run


@dataclass(frozen=True)
class Choice:
    """What trying the rates came to.

    Attributes:
        losses: rate -> validation loss in nats at the end, mean over the tuning seeds; infinite where a run diverged
            or failed.
        rate: the best; None: no rate gave a finite loss.
    """

    losses: Mapping[float, float]

    @property
    def rate(self) -> float | None:
        """The rate of the lowest loss."""
        best = min(self.losses, key=lambda rate: self.losses[rate], default=None)
        return None if best is None or math.isinf(self.losses[best]) else best

    @property
    def edge(self) -> int:
        """-1 if the best rate is the lowest that was tried, 1 if it is the highest; else 0."""
        tried = sorted(self.losses)
        return 0 if self.rate is None or len(tried) < 2 else (self.rate == tried[-1]) - (self.rate == tried[0])


def choose(experiment: Experiment, unit: Unit, rates: Sequence[float]) -> Choice:
    """Read the tuning runs of an entry at a size, at each of `rates`."""
    size, entry = unit
    losses = {}
    for rate in rates:
        trials = [Trial(entry, size, seed, rate, purpose="tuning") for seed in experiment.tuning_seeds]
        runs = [finished_run(experiment.output_dir / trial.folder) for trial in trials]
        losses[rate] = fmean(math.inf if run is None else run.final.get("eval_loss", math.inf) for run in runs)
    return Choice(losses)


def extended(rates: Sequence[float], choices: Sequence[Choice]) -> list[float]:
    """Return the rates to try beside `rates`: one step of the grid beyond each edge where an entry's best rate lies."""
    edges = {choice.edge for choice in choices}
    grid = sorted(rates)
    more = [_rounded(grid[0] ** 2 / grid[1])] if -1 in edges else []
    return more + ([_rounded(grid[-1] ** 2 / grid[-2])] if 1 in edges else [])


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")
