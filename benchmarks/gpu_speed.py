"""Training as it is, at full size: cases and their references, all variants, a profile, how many blocks are compiled
together; and decoding.

A case and a round is an item, so that a break costs little. Relative speeds are of the same round.
"""

import contextlib
import functools
import re
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

import decode
import throughput
import throughput_page
from gpt2_variants.models.causal_kernels import KERNELS
from gpt2_variants.models.duo_predict_attention import DuoPredictAttention
from gpt2_variants.models.modeling_base import BLOCKS_TOGETHER, VariantLMHeadModel
from gpt2_variants.registry import VARIANTS
from gpu_items import Day, Item, Row, Scale, Skipped
from results_page import Column, Table
from throughput_cases import Plan
from throughput_rounds import Measured, warmed_up
from training_case import Case, Trainer

PROFILED = ("gpt2", "duo_predict")
SHOWN = 40  # kernels of a profile; what is left is added up
# where compiled code stays between the rounds of a case
CACHES = Path(tempfile.gettempdir()) / "gpt2-variants-on-gpu"


@functools.cache
def plan_of(scale: Scale, variants: tuple[str, ...], compare: bool, rounds: int) -> Plan:
    """Return what throughput.py would measure of these variants."""
    options = [*scale.training, "--rounds", str(rounds), "--variants", *variants]
    return throughput.parse(options + ["--compare"] * compare)


def references_plan(day: Day) -> Plan:
    """gpt2 and duo_predict, with their references."""
    return plan_of(day.scale, PROFILED, True, day.scale.rounds)


def variants_plan(day: Day) -> Plan:
    """Return all variants."""
    return plan_of(day.scale, tuple(VARIANTS), False, 1)


def item_name(case: Case, number: int) -> str:
    """Return the item of a case's round."""
    return f"{case.name}, round {number + 1}"


def one_round(make_plan: Callable[[Day], Plan], name: str, number: int, day: Day) -> list[Row]:
    """Return a round of a case, in a process of its own: its facts, and the seconds of its steps."""
    plan = make_plan(day)
    own = Measured(next(case for case in plan.cases if case.name == name))
    CACHES.mkdir(exist_ok=True)
    if number == 0:  # the first step is to show what compiling costs
        shutil.rmtree(CACHES / re.sub(r"\W+", "-", name), ignore_errors=True)
    with warmed_up(plan, own, CACHES) as timed:
        timed()
    return [{"case": name, "round": number, "facts": own.facts, "seconds": own.seconds[0]}]


def round_items(make_plan: Callable[[Day], Plan], day: Day) -> list[Item]:
    """Return an item for each round and case, round by round."""
    plan = make_plan(day)
    return [
        # the first round compiles
        Item(
            item_name(case, number),
            functools.partial(one_round, make_plan, case.name, number),
            45 if number else 90,
            400,
        )
        for number in range(plan.rounds)
        for case in plan.cases
    ]


def throughput_rows(plan: Plan, rows: dict[str, list[Row]]) -> list[Row]:
    """Return the rows of throughput.py's tables, of the rounds that there are so far."""
    rounds: dict[str, dict[int, Row]] = {}
    for row in (row for own in rows.values() for row in own):
        rounds.setdefault(row["case"], {})[row["round"]] = row
    speeds = {
        name: {i: row["facts"]["positions_per_step"] / statistics.median(row["seconds"]) for i, row in own.items()}
        for name, own in rounds.items()
    }
    found = []
    for case in plan.cases:
        if case.name not in rounds:
            continue
        own, against = rounds[case.name], speeds.get(case.reference or "", {})
        measured = Measured(case, seconds=[own[number]["seconds"] for number in sorted(own)])
        for number in sorted(own, reverse=True):  # the facts of the first, the memory of the last
            measured.facts = {**measured.facts, **own[number]["facts"]}
        measured.relative = [speeds[case.name][i] / against[i] for i in sorted(own.keys() & against.keys())]
        found.append(measured.row())
    return found


def throughput_tables(make_plan: Callable[[Day], Plan], day: Day, rows: dict[str, list[Row]]) -> list[Table]:
    """Return the tables of throughput.py's page."""
    return throughput_page.tables(throughput_rows(make_plan(day), rows))


def profile(variant: str, day: Day) -> list[Row]:
    """A step by kernels: how often each is run and how long it takes, the longest first.

    `share` is of all kernels' time; the first row has the step by the clock as well, of a step without the profiler.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    case = next(case for case in references_plan(day).cases if case.name == variant)
    on_cuda = day.device.type == "cuda"
    trainer = Trainer(case)
    trainer.seconds(4)
    step = statistics.median(trainer.seconds(3))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with torch.profiler.profile(activities=activities) as found:
        trainer.seconds(1)
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    time_of = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    events = [event for event in found.key_averages() if event.device_type == wanted]
    kernels = sorted(((e.key, e.count, getattr(e, time_of) / 1e6) for e in events), key=lambda k: -k[2])
    kernels = [kernel for kernel in kernels if kernel[2] > 0]
    if not kernels:
        raise RuntimeError("the profiler saw no kernels")
    total = sum(seconds for *_, seconds in kernels)
    first = {"what": variant, "kernel": "all", "calls": sum(k[1] for k in kernels), "seconds": total, "share": 1.0}
    rows = [first | {"step_seconds": step}]
    rest = kernels[SHOWN:]
    shown = kernels[:SHOWN]
    if rest:
        shown.append((f"{len(rest)} others", sum(k[1] for k in rest), sum(k[2] for k in rest)))
    rows += [
        {"what": variant, "kernel": name[:120], "calls": calls, "seconds": seconds, "share": seconds / total}
        for name, calls, seconds in shown
    ]
    return rows


def compiled_together(variant: str, together: int, kernel: str, day: Day) -> list[Row]:
    """Return a step with so many blocks compiled together, and the first one, with the compilation.

    `kernel`: of duo-predict's attention, as for `duo_attention`.
    """
    if kernel != KERNELS[0] and day.device.type != "cuda":
        raise Skipped("on CUDA only")
    plan = plan_of(day.scale, (variant,), False, 1)
    case = replace(plan.cases[0], run=replace(plan.cases[0].run, compile=True))
    grouped = functools.partialmethod(VariantLMHeadModel.compile_parts, together=together)
    torch._dynamo.reset()
    with contextlib.ExitStack() as stack:
        caches = stack.enter_context(tempfile.TemporaryDirectory())
        environment = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton"}
        stack.enter_context(mock.patch.dict("os.environ", environment))
        stack.enter_context(mock.patch.object(VariantLMHeadModel, "compile_parts", grouped))
        stack.enter_context(mock.patch.object(DuoPredictAttention, "kernel", kernel))
        trainer = Trainer(case)
        first = trainer.seconds(1)[0]
        if plan.warmup_steps > 1:
            trainer.seconds(plan.warmup_steps - 1)
        seconds = statistics.median(trainer.seconds(plan.steps))
    return [
        {
            "what": variant,
            "kernel": kernel if variant == "duo_predict" else None,
            "together": together,
            "first_step_seconds": first,
            "seconds": seconds,
            "tokens_per_second": trainer.facts["tokens_per_step"] / seconds,
            **trainer.memory(),
        }
    ]


def tuning_items(day: Day) -> list[Item]:
    """Return the items of blocks compiled together; and of the kernels of duo-predict's attention, beside the first."""
    asked = [(name, number, KERNELS[0]) for name in PROFILED for number in day.scale.together]
    asked += [("duo_predict", BLOCKS_TOGETHER, kernel) for kernel in KERNELS[1:]]
    return [
        Item(
            f"{name}, {number} at a time{'' if kernel == KERNELS[0] else f', {kernel}'}",
            functools.partial(compiled_together, name, number, kernel),
            seconds=75,
            alone=True,
        )
        for name, number, kernel in asked
    ]


def decoding(variant: str, day: Day) -> list[Row]:
    """Return the variant's rows of decode.py, and gpt2's of the same rounds."""
    return decode.measure(decode_plan(day, [variant]))


def decode_plan(day: Day, variants: Sequence[str]) -> decode.Plan:
    """Return what decode.py would measure."""
    return decode.parse([*day.scale.decoding, "--variants", *variants])


def decode_rows(rows: dict[str, list[Row]]) -> list[Row]:
    """Return the rows of decode.py's table: each variant's own, gpt2's of its own item, by batch size."""
    found = [row for name, own in rows.items() for row in own if row["case"] == name]
    return sorted(found, key=lambda row: row["batch"])


def decode_tables(rows: dict[str, list[Row]]) -> list[Table]:
    """Return the tables of decode.py's page."""
    return decode.tables(decode_rows(rows))


PROFILE_COLUMNS = (
    Column("what", "variant"),
    Column("kernel", "kernel"),
    Column("calls", "calls", ",.0f"),
    Column("seconds", "ms", ",.2f", 1000),
    Column("share", "%", ".1f", 100),
    Column("step_seconds", "ms of the step by the clock", ",.2f", 1000),
)
TOGETHER_COLUMNS = (
    Column("what", "variant"),
    Column("kernel", "by"),
    Column("together", "blocks compiled together"),
    Column("first_step_seconds", "first step s", ".1f"),
    Column("seconds", "ms a step", ",.1f", 1000),
    Column("tokens_per_second", "tokens/s", ",.0f"),
    Column("peak_memory_bytes", "peak GiB", ".2f", 1 / 1024**3),
)
