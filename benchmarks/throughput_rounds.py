"""How the cases of the throughput benchmark are measured: in rounds, beside their references; figures for each."""

import contextlib
import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import command_line
from gpt2_variants.measuring import peak_flops
from throughput_cases import Plan
from training_case import Case, CaseFailed, Worker


@dataclass
class Measured:
    """What was measured of a case.

    Attributes:
        facts: of the case, its first process and its memory.
        seconds: of each timed step, round by round.
        relative: round by round: the positions a second over those of the reference.
        failure: why there is nothing, or not all.
    """

    case: Case
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: list[list[float]] = field(default_factory=list)
    relative: list[float] = field(default_factory=list)
    failure: str | None = None

    def positions_per_second(self, last_round_only: bool = False) -> float:
        """Return the positions per second of the median step."""
        seconds = self.seconds[-1] if last_round_only else [s for taken in self.seconds for s in taken]
        return self.facts["positions_per_step"] / statistics.median(seconds)

    def row(self) -> dict[str, Any]:
        """Return the figures, for the tables."""
        case, run, facts = self.case, self.case.run, self.facts
        row = {
            "case": case.name,
            "is_variant": case.is_variant,
            "what": case.what,
            "variant": run.variant,
            "loop": case.loop,
            "model": case.model,
            "dtype": case.dtype,
            "size": run.size,
            "attn_implementation": "eager" if case.model == "published" else run.attn_implementation,
            "gradient_checkpointing": run.gradient_checkpointing or case.model == "published",
            "compile": case.plan.compile and case.model != "published",
            "failure": self.failure,
            **facts,
        }
        if self.failure is not None:
            return row
        seconds = [s for taken in self.seconds for s in taken]
        low, median, high = (float(x) for x in np.percentile(seconds, (10, 50, 90)))
        tokens_per_second = facts["tokens_per_step"] / median
        peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        return row | {
            "batch": f"{facts['sequences']} x {facts['block_size']}",
            "seconds_per_step": median,
            "seconds_per_step_p10": low,
            "seconds_per_step_p90": high,
            "tokens_per_second": tokens_per_second,
            "positions_per_second": self.positions_per_second(),
            "mfu": mfu(tokens_per_second, facts["flops_per_token"], peak),
            "reference": case.reference,
            "relative_speed": statistics.median(self.relative) if self.relative else None,
            "relative_speed_min": min(self.relative, default=None),
            "relative_speed_max": max(self.relative, default=None),
            "relative_speed_rounds": self.relative,
            "seconds": self.seconds,
        }


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None) -> float | None:
    """Return the part of the device's `peak` FLOP/s that training makes use of; None where the peak is not known."""
    return None if peak is None else tokens_per_second * flops_per_token / peak


def measure(plan: Plan) -> list[Measured]:
    """Measure every case of `plan`; those that fail say why.

    On a CPU a case's process and its reference's live side by side, and take their rounds in turn: what else the
    machine does meanwhile falls on both. GPUs have no room for two at once: there, all cases are gone through once a
    round, each in a new process, and set against their reference of the same round.
    """
    results = {case.name: Measured(case) for case in plan.cases}
    with tempfile.TemporaryDirectory(prefix="throughput-") as caches:
        (_in_turn if torch.cuda.is_available() else _side_by_side)(plan, results, Path(caches))
    return list(results.values())


def _side_by_side(plan: Plan, results: dict[str, Measured], caches: Path) -> None:
    with contextlib.ExitStack() as until_all_are_measured:
        references: dict[str, Callable[[], None]] = {}
        for number, case in enumerate(plan.cases):
            own, stays = results[case.name], any(later.reference == case.name for later in plan.cases[number:])
            with _noted(own), contextlib.ExitStack() as until_measured:
                stack = until_all_are_measured if stays else until_measured
                timed = stack.enter_context(warmed_up(plan, own, caches))
                other = references.get(case.reference)
                for index in range(plan.rounds):
                    if other is None:
                        timed()
                        continue
                    for take in (other, timed) if index % 2 else (timed, other):
                        take()
                    own.relative.append(_relative(own, results[case.reference]))
                if stays:
                    references[case.name] = _as_reference(case, timed)
            _say(own)


def _as_reference(case: Case, timed: Callable[[], None]) -> Callable[[], None]:
    def take() -> None:
        try:
            timed()
        except CaseFailed as err:
            raise CaseFailed(f"the reference {case.name}: {err}") from None

    return take


def _in_turn(plan: Plan, results: dict[str, Measured], caches: Path) -> None:
    for _ in range(plan.rounds):
        for case in plan.cases:
            own, reference = results[case.name], results.get(case.reference)
            if own.failure is None:
                with _noted(own), warmed_up(plan, own, caches) as timed:
                    timed()
                    if reference is not None and reference.failure is None:
                        own.relative.append(_relative(own, reference))
                _say(own)


def _relative(own: Measured, reference: Measured) -> float:
    return own.positions_per_second(last_round_only=True) / reference.positions_per_second(last_round_only=True)


@contextlib.contextmanager
def _noted(own: Measured) -> Iterator[None]:
    try:
        yield
    except CaseFailed as err:
        own.failure = str(err)


@contextlib.contextmanager
def warmed_up(plan: Plan, own: Measured, caches: Path) -> Iterator[Callable[[], None]]:
    """Yield a warmed-up process for the case. What is given takes a round of timed steps."""
    worker = Worker(own.case, caches / re.sub(r"\W+", "-", own.case.name))
    try:
        first = worker.seconds(1)[0]
        if plan.warmup_steps > 1:
            worker.seconds(plan.warmup_steps - 1)
        if not own.facts:  # in a later round compiled code is there already
            own.facts = {**worker.facts, "first_step_seconds": first}

        def timed() -> None:
            own.seconds.append(worker.seconds(plan.steps))
            own.facts |= worker.memory()

        yield timed
    finally:
        worker.close()


def _say(own: Measured) -> None:
    if own.failure is None:
        row = own.row()
        relative = f", {row['relative_speed']:.3f} of {row['reference']}" if own.relative else ""
        text = f"{row['seconds_per_step'] * 1000:,.0f} ms a step, {row['tokens_per_second']:,.0f} tokens/s{relative}"
    else:
        text = f"not measured: {own.failure}"
    command_line.say(f"{own.case.name}: {text}")
