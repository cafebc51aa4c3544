"""All that is to be known on a GPU, in stages that can be stopped and gone on with: first whether results are right.

    python benchmarks/on_gpu.py                                       # on a CUDA device; call it again until it is done
    python benchmarks/on_gpu.py --scale tiny --output_dir rehearsal   # the same at toy size, on a CPU too

Writes on_gpu.json, which holds what is done, and on_gpu.md under benchmarks/results/<device>/, and throughput's and
decode's results in their own form. Nothing is fetched. Exit codes: 0 all done; 1 something failed: the last lines say
what; 2 faults in what was asked; 3 the time is up: the same command goes on.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import command_line
import results_page
from gpu_items import SCALES, Day, Item, Stage
from gpu_process import StageProcess
from gpu_record import DONE, FAILED, SKIPPED, STATES, TO_DO, Record
from gpu_stages import stages

NAMES = ("correctness", "references", "attention", "profile", "tuning", "variants", "decoding", "curve")
REDO = {"all": STATES, "failed": (FAILED,), "skipped": (SKIPPED,)}


@dataclass(frozen=True)
class Plan:
    """What is to be done; `minutes` of this call, 0: as many as it takes; `redo`: which states are forgotten first."""

    day: Day
    stages: list[str]
    redo: tuple[str, ...]
    minutes: int
    list_only: bool
    output_dir: Path | None


def make_parser() -> argparse.ArgumentParser:
    """Return the command line. Numbers stay strings, so that `parse` can tell all faults at once."""
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add(
        "--stages",
        nargs="+",
        default=list(NAMES),
        metavar="NAME",
        help=f"stages to run: {', '.join(NAMES)} (default: all)",
    )
    add("--list", action="store_true", help="print the stages' items and how they stand, and end")
    add("--redo", nargs="?", const="all", metavar="WHICH", help="do items again: all, or those that failed or skipped")
    add("--minutes", default="9", help="end this call after so many; begin nothing longer; 0: no end (default: 9)")
    add("--scale", default="full", help="full, or tiny: a rehearsal at toy size (default: full)")
    add("--dataset", help="what the curve is trained on, as for train_ds.py (default: builtin)")
    add("--tokenizer", help="the tokenizer of the curve, as for train_ds.py (default: builtin)")
    add("--output_dir", type=Path, help="where the results go (default: benchmarks/results/<device>)")
    return parser


def parse(argv: list[str] | None = None) -> Plan:
    """Return what the command line asks for. Raises `UsageError` with every fault at once."""
    given = make_parser().parse_args(argv)
    checks = command_line.Checks()
    lines = checks.lines
    asked = checks.of("stages", given.stages, NAMES)
    if given.redo is not None and given.redo not in REDO:
        lines.append(f"--redo {given.redo}: one of {', '.join(REDO)}")
    if given.scale not in SCALES:
        lines.append(f"--scale {given.scale}: one of {', '.join(SCALES)}")
    if given.scale == "full" and not torch.cuda.is_available():
        lines.append("--scale full: there is no CUDA device; --scale tiny --output_dir FOLDER rehearses on a CPU")
    if given.scale == "tiny" and (given.output_dir is None or inside(given.output_dir, results_page.RESULTS)):
        lines.append(f"--scale tiny: give --output_dir, a folder outside {results_page.RESULTS}, where figures count")
    minutes = checks.whole("minutes", given.minutes, least=0)
    checks.folder("output_dir", given.output_dir)
    checks.done()
    return Plan(
        day=Day(given.scale, given.dataset, given.tokenizer),
        stages=[name for name in NAMES if name in asked],
        redo=REDO.get(given.redo, ()),
        minutes=minutes,
        list_only=given.list,
        output_dir=given.output_dir,
    )


def inside(path: Path, folder: Path) -> bool:
    """Return whether `path` is `folder` or lies in it."""
    return path.resolve().is_relative_to(folder.resolve())


class Clock:
    """The time of a call: `minutes`, 0: without an end."""

    def __init__(self, minutes: int):
        self._start, self._minutes = time.monotonic(), minutes
        self.begun = 0  # items

    def left(self) -> float:
        """Return seconds that are left."""
        return self._minutes * 60 - (time.monotonic() - self._start) if self._minutes else float("inf")

    def has_room(self, item: Item) -> bool:
        """Return whether an item may begin. The first of a call always may: it would never be done otherwise."""
        return self.begun == 0 or self.left() >= item.seconds


def carry_out_stage(stage: Stage, record: Record, clock: Clock, folder: Path) -> bool:
    """Do what is to do of a stage, and put it down item by item; whether the time was enough.

    An item that fails has its process replaced: what it did to the device is gone with it.
    """
    process: StageProcess | None = None
    try:
        for item in stage.items(record.day):
            if record.state(stage.name, item.name) != TO_DO:
                continue
            if not clock.has_room(item):
                return False
            process = process or StageProcess(stage.name, record.day, folder / f"{stage.name}.log")
            first, clock.begun, start = clock.begun == 0, clock.begun + 1, time.monotonic()
            limit = min(item.limit, max(clock.left(), 1))
            answer = process.ask(item.name, limit)
            if answer.pop("timed_out", False) and limit < item.limit and not first:
                return False  # the call's time was up, not the item's own: it is begun again
            taken = time.monotonic() - start
            record.note(stage.name, item.name, answer, taken)
            why = f": {answer['why']}" if "why" in answer else ""
            command_line.say(f"{stage.name}: {item.name}: {answer['status']}, {taken:.0f} s{why}")
            if answer["status"] == FAILED or item.alone:
                process.close()
                process = None
    finally:
        if process is not None:
            process.close()
    return True


def show(plan: Plan, every: Mapping[str, Stage], record: Record) -> None:
    """Print the stages' items and how they stand."""
    for name in plan.stages:
        print(f"{name}: {every[name].what}")
        for item in every[name].items(plan.day):
            print(f"  {record.state(name, item.name):<8} {item.name}")


def carry_out(plan: Plan) -> int:
    """Do the stages, write the results after each; the exit code."""
    clock, facts = Clock(plan.minutes), results_page.facts()
    folder = plan.output_dir or results_page.folder(facts["device"])
    try:
        record = Record(folder, plan.day, facts)
    except ValueError as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    every = stages(plan.day)
    if plan.list_only:
        show(plan, every, record)
        return 0
    for name in plan.stages:
        record.forget(name, plan.redo)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes of a stage end too
    enough = True
    with tempfile.TemporaryDirectory(prefix="on-gpu-") as logs:
        for name in plan.stages:
            enough = carry_out_stage(every[name], record, clock, Path(logs))
            record.write_pages(every)
            if not enough:
                break
    return told(plan, every, record, enough)


def told(plan: Plan, every: Mapping[str, Stage], record: Record, enough: bool) -> int:
    """Say at the end where the results are, what was skipped and what failed; the exit code."""
    print(record.folder / "on_gpu.md")
    states = [
        (name, item.name, record.state(name, item.name)) for name in plan.stages for item in every[name].items(plan.day)
    ]
    for state in (SKIPPED, FAILED):
        for name, item, _ in (one for one in states if one[2] == state):
            print(f"{state}: {name}: {item}: {record.why(name, item)}")
    counted = {state: sum(one[2] == state for one in states) for state in (DONE, SKIPPED, FAILED, TO_DO)}
    print(", ".join(f"{number} {state}" for state, number in counted.items()))
    if not enough:
        print("the time of this call is up: the same command goes on")
        return 3
    return 1 if counted[FAILED] else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    return command_line.carry_out(parse, argv, carry_out)


if __name__ == "__main__":
    sys.exit(main())
