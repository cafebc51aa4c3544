"""The order of an experiment: check all, say what it takes, tune, train, report. It can be gone on with at any time."""

import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from ..config.command_line import parse
from ..config.plan import Plan
from ..drawing import need_matplotlib
from ..faults import UsageError
from ..folders import write_aside
from ..report.statistics import need_scipy
from ..steady_output import goes_on_unheard
from ..training.session import prepare
from ..words import counted
from . import forecast
from .experiment import Experiment, Trial, Unit
from .runner import Runner, Stopped
from .state import DIVERGED, OPEN, differences, finished_run, state
from .tuning import Choice, choose, extended

CLOSE = 0.005  # two lengths of training that differ by less are the same


@dataclass
class Session:
    """An experiment on its way.

    Attributes:
        experiment: what is run.
        rates: the learning rates tried so far.
        choices: what they came to.
        failures: what did not finish, a line each.
        plans: the plans made so far, by what decides them.
    """

    experiment: Experiment
    rates: list[float] = field(default_factory=list)
    choices: dict[Unit, Choice] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    plans: dict[tuple, Plan] = field(default_factory=dict)

    def plan(self, trial: Trial) -> Plan:
        """Return the plan of `trial`, but for its seed. Raises `UsageError` with its faults."""
        key = (trial.entry, trial.size, trial.rate, trial.steps)
        if key not in self.plans:
            new = self.experiment.output_dir / "new" / trial.folder  # is never made: a plan is that of a new run
            _, self.plans[key] = prepare(parse(self.experiment.options(trial, new)))
        return self.plans[key]

    def with_length(self, trial: Trial) -> Trial:
        """Return `trial` with as many steps as its size and what it is to be equal in ask for."""
        experiment, base = self.experiment, experiment_base(self.experiment, trial)
        steps = None
        if experiment.tokens_per_parameter is not None:
            plan = self.plan(base)
            tokens = experiment.tokens_per_parameter * plan.num_parameters
            steps = max(1, round(tokens / (plan.train_batch_size * plan.block_size)))
        trial = replace(trial, steps=steps)
        if trial.purpose in ("tuning", "tokens") or trial.entry.is_baseline:
            return trial
        theirs, ours = self.plan(replace(base, steps=steps)), self.plan(trial)
        ratio = theirs.flops_per_token / ours.flops_per_token
        if trial.purpose == "time":
            ratio = self._speed(trial) / self._speed(base)
        return replace(trial, steps=max(1, round(theirs.total_steps * ratio)))

    def _speed(self, trial: Trial) -> float:
        """Return tokens per second over the finished runs at equal tokens. Raises `UsageError` where there is none."""
        trials = [replace(trial, seed=seed, purpose="tokens") for seed in self.experiment.seeds]
        runs = [finished_run(self.experiment.output_dir / trial.folder) for trial in trials]
        speeds = [run.tokens_per_second for run in runs if run is not None and run.tokens_per_second]
        if not speeds:
            raise UsageError([f"--equal time: no run of {trial.entry.label} at equal tokens is finished to go by"])
        return statistics.median_high(speeds)

    def tuning(self) -> list[Trial]:
        """Return the runs that try the rates there are."""
        return [self.with_length(trial) for trial in self.experiment.tuning(self.rates)]

    def results(self, purpose: str) -> list[Trial]:
        """Return the runs that are reported; one that would be as long as that at equal tokens is left out."""
        chosen: dict[Unit, float | None] = dict.fromkeys(self.experiment.units)
        if self.experiment.rates:
            chosen = {unit: choice.rate for unit, choice in self.choices.items() if choice.rate is not None}
        trials = [self.with_length(trial) for trial in self.experiment.results(chosen, purpose)]
        if purpose == "tokens":
            return trials
        return [t for t in trials if not t.entry.is_baseline and not self._as_long(t, self.plan(t).total_steps)]

    def _as_long(self, trial: Trial, steps: int) -> bool:
        at_tokens = self.with_length(replace(trial, steps=None, purpose="tokens"))
        return math.isclose(steps, self.plan(at_tokens).total_steps, rel_tol=CLOSE)

    def check(self, trials: Iterable[Trial]) -> None:
        """Raise `UsageError` with all faults of the runs, and with what finished ones were trained with otherwise."""
        lines: dict[str, None] = {}
        for trial in trials:
            try:
                plan, folder = self.plan(trial), self.experiment.output_dir / trial.folder
                cure = "give another folder, or the options that it was trained with"
                for difference in differences(folder, plan):
                    lines[f"--output_dir {folder}: was trained with {difference}; {cure}"] = None
            except UsageError as err:
                lines |= dict.fromkeys(err.lines)
        if lines:
            raise UsageError(list(lines))

    def train(self, trials: Sequence[Trial], what: str) -> None:
        """Train what of `trials` is this process's and not finished. Raises `Stopped` after a signal."""
        experiment = self.experiment
        mine = [t for t in trials if experiment.is_mine(t.unit)]
        left = [t for t in mine if state(experiment.output_dir / t.folder) == OPEN]
        if left:
            say(f"{what}: {counted(len(left), 'run')} to do, {len(mine) - len(left)} done already")
        runner = Runner(experiment.jobs, experiment.gpus_per_run)
        folders = [experiment.output_dir / t.folder for t in left]
        again = ("--resume_from_checkpoint", "auto")  # what was interrupted goes on
        work = [(place, [*experiment.options(t, place), *again]) for t, place in zip(left, folders, strict=True)]
        for done, (index, ended) in enumerate(runner.run(work), start=1):
            folder = folders[index]
            run = finished_run(folder)
            loss = "-" if run is None else f"loss {run.final.get('eval_loss', math.nan):.4f}"
            if run is None:
                diverged = state(folder) == DIVERGED
                loss = "the loss was not finite" if diverged else f"failed ({ended.code}): {ended.last_line}"
                if not (diverged and left[index].purpose == "tuning"):
                    self.failures.append(f"{left[index]}: {loss}; see {folder}.log")
            say(f"[{done}/{len(left)}] {left[index]}: {loss}, {ended.seconds:.0f} s")

    def choose_rates(self) -> None:
        """Choose each entry's rate; try one more step of the grid, for all, where some entry's best is at its edge."""
        mine = [unit for unit in self.experiment.units if self.experiment.is_mine(unit)]
        self.choices = {unit: choose(self.experiment, unit, self.rates) for unit in mine}
        if more := extended(self.rates, list(self.choices.values())):
            say(f"a best rate lies at the edge of the grid: {', '.join(f'{rate:g}' for rate in more)} for every entry")
            self.rates = sorted([*self.rates, *more])
            self.train(self.tuning(), "tuning")
            self.choices = {unit: choose(self.experiment, unit, self.rates) for unit in mine}
        for (size, entry), choice in self.choices.items():
            at = f" at {size}" if size else ""
            if choice.rate is None:
                self.failures.append(f"{entry.label}{at}: no learning rate gave a finite loss; it is left out")
            elif choice.edge:
                say(f"{entry.label}{at}: its best rate, {choice.rate:g}, lies at the edge of what was tried")


def experiment_base(experiment: Experiment, trial: Trial) -> Trial:
    """Return the baseline's run that `trial` is to be equal to, at equal tokens."""
    return replace(trial, entry=experiment.baseline, steps=None, purpose="tokens")


def compare(experiment: Experiment, dry_run: bool = False) -> int:
    """Run the experiment, what of it is not there already, and write its report.

    Returns:
        The exit code: 0; 1 if a run failed, which is said; 128 and a signal's number after a signal.

    Raises:
        UsageError: the options do not fit; nothing was written.
    """
    need_matplotlib()
    need_scipy()
    session = Session(experiment, sorted(experiment.rates))
    tuning = session.tuning()
    results = _results_to_come(session) if experiment.rates else session.results("tokens")
    session.check(tuning or results)  # where rates are tuned, the results are checked when theirs are chosen
    left = [t for t in [*tuning, *results] if state(experiment.output_dir / t.folder) == OPEN]
    if left:
        measured = forecast.measure(experiment, experiment_base(experiment, left[0]))
        plans = [session.plan(trial) for trial in left]
        say(forecast.forecast(plans, measured, experiment.jobs, experiment.output_dir))
        if more := [axis for axis in experiment.equal if axis != "tokens"]:
            say(f"and those that are to end at equal {' and '.join(more)}, where that is not the same")
    if dry_run:
        return 0
    write_aside(experiment.output_dir / "experiment.json", experiment.saved())
    with goes_on_unheard():
        try:
            _run(session, tuning)
        except Stopped as err:
            say(f"stopped by {err}; the same command goes on from here")
            return 128 + err.number
        return _finish(session)


def _results_to_come(session: Session) -> list[Trial]:
    """Return the runs that are reported, while their rates are not chosen: at the first of the rates."""
    rates: dict[Unit, float | None] = dict.fromkeys(session.experiment.units, session.rates[0])
    return [session.with_length(trial) for trial in session.experiment.results(rates)]


def _run(session: Session, tuning: Sequence[Trial]) -> None:
    experiment = session.experiment
    if experiment.rates:
        session.train(tuning, "tuning")
        session.choose_rates()
    for purpose in experiment.equal:
        trials = session.results(purpose)
        session.check(t for t in trials if experiment.is_mine(t.unit))
        session.train(trials, "runs" if purpose == "tokens" else f"runs to equal {purpose}")


def _finish(session: Session) -> int:
    experiment = session.experiment
    for line in session.failures:
        say(f"not finished: {line}")
    if experiment.rates:
        session.choices = {unit: choose(experiment, unit, session.rates) for unit in experiment.units}
        told = {
            f"{entry.label}{f' {size}' if size else ''}": dict(c.losses) for (size, entry), c in session.choices.items()
        }
        write_aside(experiment.output_dir / "tuning.json", json.dumps(told, indent=2) + "\n")
    from .pages import write_report  # draws, which the runs do not need

    write_report(experiment, session.choices)
    return 1 if session.failures else 0


def say(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)
