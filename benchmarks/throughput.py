"""Speed and memory of training, variant by variant, and against references, on one device.

    python benchmarks/throughput.py --preset seed --compare      # on a CUDA device: the recipe at full size
    python benchmarks/throughput.py --compare                    # without one: a small model, some minutes

Writes throughput.json, throughput.md and throughput.png under benchmarks/results/<device>/. Exit codes: 0 all measured,
1 some case could not be (its row says why), 2 faults in what was asked.
"""

import argparse
import contextlib
import importlib.util
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import command_line
import results_page
from gpt2_variants.config.command_line import parse as parse_run
from gpt2_variants.config.deepspeed_json import ds_config_path, resolve_ds_config
from gpt2_variants.config.options import Options
from gpt2_variants.faults import UsageError
from gpt2_variants.measuring import peak_flops
from gpt2_variants.ranks import world_size
from gpt2_variants.registry import GPT2_VOCABULARY, VARIANTS
from results_page import Column, Table, goal, goals_table
from training_case import Case, CaseFailed, Worker

GIB = 1024**3
NANO_VOCABULARY = 4_000  # of the tokenizer that the demo trains

# What `--preset` fills in. seed: the recipe, in one micro-batch, duo_predict with its own 512 tokens. demo: steps of
# half a second or more on 2 CPU cores; in shorter ones, what a step costs whatever its size would decide.
PRESETS: dict[str, dict[str, Any]] = {
    "seed": {"per_device_train_batch_size": 64, "steps": 10, "warmup_steps": 5, "rounds": 2},
    "demo": {"per_device_train_batch_size": 16, "block_size": 256, "steps": 1, "warmup_steps": 2, "rounds": 5},
}
PASSED_ON = ("size", "block_size", "per_device_train_batch_size", "attn_implementation", "deepspeed_config")
SPEED_GOAL, RELATIVE_GOAL, MEMORY_GOAL, DEEPSPEED_GOAL = 240_000, 0.95, 72, {"cuda": 1.03, "cpu": 1.05}
DEEPSPEED_GOAL_SECONDS = 0.5  # on a CPU it counts for steps from here on


@dataclass(frozen=True)
class Plan:
    """What is to be measured: the cases, how often, and where the results go (None: the device's folder)."""

    preset: str
    cases: list[Case]
    steps: int
    warmup_steps: int
    rounds: int
    output_dir: Path | None


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
        """By the median step."""
        seconds = self.seconds[-1] if last_round_only else [s for taken in self.seconds for s in taken]
        return self.facts["positions_per_step"] / statistics.median(seconds)

    def row(self) -> dict[str, Any]:
        """The figures, for the tables."""
        case, run, facts = self.case, self.case.run, self.facts
        row = {
            "case": case.name,
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
    """The part of the device's `peak` FLOP/s that training makes use of; None where the peak is not known."""
    return None if peak is None else tokens_per_second * flops_per_token / peak


def make_parser() -> argparse.ArgumentParser:
    """The command line. Numbers stay strings, so that `parse` can tell all faults at once."""
    parser = command_line.Parser(
        __doc__, epilog="Every case runs in a process of its own on one device; several GPUs are not measured."
    )
    add = parser.add_argument
    add("--preset", default="auto", help=f"auto (seed where there is a CUDA device, else demo), {', '.join(PRESETS)}")
    add("--variants", nargs="+", default=list(VARIANTS), metavar="NAME", help="which (default: all)")
    add("--size", help="the models' size, as for train_ds.py (default: the preset's)")
    add("--model_args", nargs="*", metavar="FIELD=VALUE", help="config fields, as for train_ds.py")
    add("--block_size", help="tokens per sequence (seed: the variant's own; demo: 256)")
    add("--per_device_train_batch_size", help="sequences in a micro-batch; a step takes one (seed: 64, demo: 16)")
    add("--steps", help="timed optimizer steps a round (seed: 10, demo: 1)")
    add("--warmup_steps", help="steps before, of which the first is reported by itself (seed: 5, demo: 2)")
    add("--rounds", help="how often a case and its reference are timed in turn (seed: 2, demo: 5)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile of the blocks (default: on CUDA only)")
    add("--gradient_checkpointing", action="store_true", help="recompute the blocks in the backward pass")
    add("--attn_implementation", help="the attention backend (default: sdpa)")
    add("--dtype", help="bfloat16 or float32 (default: what the DeepSpeed JSON says)")
    add("--compare", action="store_true", help="also the references: plain loop, stock GPT-2, as published, dense mask")
    add("--deepspeed_config", help="a DeepSpeed JSON (default: ds_configs/zero1.json)")
    add("--output_dir", type=Path, help="where the results go (default: benchmarks/results/<device>)")
    return parser


def parse(argv: list[str] | None = None) -> Plan:
    """What the command line asks for. Raises `UsageError` with every fault at once."""
    given = make_parser().parse_args(argv)
    preset = given.preset
    if preset == "auto":
        preset = "seed" if torch.cuda.is_available() else "demo"
    if preset not in PRESETS:
        raise UsageError([f"--preset {preset}: not known; one of auto, {', '.join(PRESETS)}"])
    checks = command_line.Checks()
    lines = checks.lines
    if preset == "seed" and not torch.cuda.is_available():
        lines.append("--preset seed: there is no CUDA device, and a CPU takes minutes a step; use demo, or auto")
    if world_size() > 1:
        lines.append(f"WORLD_SIZE {world_size()}: one device is measured; start it with python, without a launcher")
    variants = checks.variants(given.variants)
    if given.compare and not {"gpt2", "duo_predict"} & set(given.variants):
        lines.append("--compare: the references are those of gpt2 and duo_predict; name one of them in --variants")
    if given.dtype not in (None, "bfloat16", "float32"):
        lines.append(f"--dtype {given.dtype}: bfloat16 or float32 is allowed")
    checks.folder("output_dir", given.output_dir)
    filled = {key: getattr(given, key, None) or value for key, value in PRESETS[preset].items()}
    numbers = {key: checks.whole(key, filled[key]) for key in ("steps", "warmup_steps", "rounds")}
    # No data are read and no folder is made, so a dry run of the built-in corpus is what is asked for.
    options = ["--preset", preset, "--dataset", "builtin", "--tokenizer", "builtin", "--report_to", "none", "--dry_run"]
    options += ["--max_steps", str(numbers["warmup_steps"] + numbers["steps"] * numbers["rounds"] * len(VARIANTS) * 2)]
    for key in PASSED_ON:
        if (value := filled.get(key, getattr(given, key))) is not None:
            options += [f"--{key}", str(value)]
    options += ["--gradient_checkpointing"] * given.gradient_checkpointing
    if given.compile is not None:
        options.append("--compile" if given.compile else "--no-compile")
    if given.model_args is not None:
        options += ["--model_args", *given.model_args]
    cases: list[Case] = []
    of_runs: dict[str, str] = {}  # what is wrong -> the line that says so; of several variants' lines the first
    for name in variants:
        try:
            cases.append(_case(parse_run([*options, "--variant", name]), given.dtype))
        except UsageError as err:
            of_runs = {line.split(": ")[0]: line for line in err.lines} | of_runs
    if lines := lines + list(of_runs.values()):
        raise UsageError(lines)
    if any(case.name == "gpt2" for case in cases):
        cases = [case if case.name == "gpt2" else replace(case, reference="gpt2") for case in cases]
        cases.sort(key=lambda case: case.name != "gpt2")  # a reference comes before what is set against it
    if given.compare:
        cases += [reference for case in cases for reference in references(case)]
    return Plan(preset=preset, cases=cases, output_dir=given.output_dir, **numbers)


def _case(run: Options, dtype: str | None) -> Case:
    vocabulary = NANO_VOCABULARY if run.size == "nano" else GPT2_VOCABULARY
    case = Case(run.spec.name, run, vocabulary, dtype or "bfloat16", what=run.spec.summary)
    stated = resolve_ds_config(run, world_size(), run.max_steps or 1).get("bf16", {}).get("enabled")
    return case if dtype or stated else replace(case, dtype="float32")


def references(case: Case) -> list[Case]:
    """What `--compare` sets a variant's case against."""
    plain = replace(case, name=f"{case.name}, plain loop", loop="plain", reference=case.name)
    plain = replace(plain, what="the same model, the same arithmetic, without DeepSpeed")
    if case.name == "duo_predict":
        dense = replace(plain, name="duo_predict, dense mask", model="dense_duo_predict", reference=plain.name)
        return [plain, replace(dense, what="plain loop; t_1 m_1 t_2 ... interleaved, a dense (2S-1)^2 mask in SDPA")]
    if case.name != "gpt2":
        return []
    stock = replace(plain, model="stock")
    eager, compiled = replace(case.run, compile=False), replace(case.run, compile=True)
    return [
        plain,
        replace(stock, name="stock", run=eager, what="GPT2LMHeadModel given labels, plain loop, not compiled"),
        replace(stock, name="stock, compiled", run=compiled, what="the same, compiled as a whole"),
        replace(
            stock,
            name="as published",
            model="published",
            run=eager,
            what="stock with eager attention and gradient checkpointing; float32 weights, bf16 autocast",
        ),
    ]


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
                timed = stack.enter_context(_worker(plan, own, caches))
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
                with _noted(own), _worker(plan, own, caches) as timed:
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
def _worker(plan: Plan, own: Measured, caches: Path) -> Iterator[Callable[[], None]]:
    """A process for the case, warmed up. What is given takes a round of timed steps."""
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


SHARED_COLUMNS = (
    Column("batch", "batch"),
    Column("seconds_per_step", "ms a step", ",.1f", 1000),
    Column("seconds_per_step_p10", "p10", ",.1f", 1000),
    Column("seconds_per_step_p90", "p90", ",.1f", 1000),
    Column("tokens_per_second", "tokens/s", ",.0f"),
    Column("positions_per_second", "positions/s", ",.0f"),
    Column("mfu", "MFU %", ".1f", 100),
    Column("peak_memory_bytes", "peak GiB", ".2f", 1 / GIB),
    Column("steady_memory_bytes", "steady GiB", ".2f", 1 / GIB),
    Column("first_step_seconds", "first step s", ".1f"),
)


def tables(rows: Sequence[dict[str, Any]], goals: Sequence[dict[str, Any]]) -> list[Table]:
    """The tables of the page."""
    measured = [row for row in rows if row["failure"] is None]
    memory = (
        "by torch's allocator" if torch.cuda.is_available() else "the process's resident set, libraries and all (RSS)"
    )
    legend = (
        "ms a step: the median, and the 10th and 90th percentile. tokens/s: tokens of data over the median step; "
        "positions/s: what the blocks compute, 2S-1 a sequence for duo_predict. MFU: 6N + 12LES FLOPs a position, "
        "attention in full, against the device's dense bf16 peak; - where that is not known. "
        f"peak and steady: {memory}, at most and after the timed steps. first step: with the compilation, if any."
    )

    def relative(to: str) -> list[Column]:
        shown = {"relative_speed": f"positions/s over {to}'s", "relative_speed_min": "min", "relative_speed_max": "max"}
        return [Column(key, head, ".3f") for key, head in shown.items()]

    found = [
        Table(
            "Variants",
            (Column("case", "variant"), *SHARED_COLUMNS, *relative("gpt2")),
            [row for row in measured if is_variant(row)],
            legend,
        )
    ]
    if compared := [row for row in measured if not is_variant(row)]:
        found.append(
            Table(
                "References",
                (
                    Column("case", "case"),
                    Column("what", "what"),
                    *SHARED_COLUMNS,
                    *relative("the reference"),
                    Column("reference", "reference"),
                ),
                compared,
            )
        )
    if goals:
        found.append(goals_table(goals))
    if failed := [row for row in rows if row["failure"] is not None]:
        found.append(Table("Not measured", (Column("case", "case"), Column("failure", "why")), failed))
    return found


def is_variant(row: dict[str, Any]) -> bool:
    """Whether the row is a variant as it is trained, and no reference."""
    return row["loop"] == "deepspeed"


def goals(rows: Sequence[dict[str, Any]], preset: str) -> list[dict[str, Any]]:
    """The project's goals that these figures can judge."""
    by_name = {row["case"]: row for row in rows if row["failure"] is None}
    found = []

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (plain := by_name.get("gpt2, plain loop")) and plain["relative_speed"] is not None:
        limit, cost = DEEPSPEED_GOAL[device], plain["relative_speed"]
        if device == "cuda" or plain["seconds_per_step"] >= DEEPSPEED_GOAL_SECONDS:
            found.append(goal("DeepSpeed's step over the plain loop's", f"<= {limit}", cost, cost <= limit))
    if (stock := by_name.get("stock")) and stock["relative_speed"] is not None:
        ours = stock["relative_speed"]
        found.append(goal("gpt2's step over the stock loop's, not compiled", "<= 1", ours, ours <= 1))
    if preset == "seed" and device == "cuda" and "gpt2" in by_name:
        speed = by_name["gpt2"]["tokens_per_second"]
        found.append(goal("gpt2, tokens/s on one H100", f">= {SPEED_GOAL:,}", speed, speed >= SPEED_GOAL, ",.0f"))
        for row in filter(is_variant, by_name.values()):
            peak, relative = row["peak_memory_bytes"] / GIB, row["relative_speed"]
            found.append(goal(f"{row['case']}, peak GiB", f"< {MEMORY_GOAL}", peak, peak < MEMORY_GOAL, ".1f"))
            if relative is not None:
                what = f"{row['case']}, positions/s over gpt2's"
                found.append(goal(what, f">= {RELATIVE_GOAL}", relative, relative >= RELATIVE_GOAL))
    return found


def notes(plan: Plan, rows: Sequence[dict[str, Any]]) -> list[str]:
    """How the figures were taken, in words."""
    run, first = plan.cases[0].run, plan.cases[0]
    arguments = " ".join(f"{key}={value}" for key, value in run.model_args.items())
    in_turn = (
        "each round goes through all cases, in new processes"
        if torch.cuda.is_available()
        else "a case and its reference take their rounds in turn, in processes that live side by side"
    )
    return [
        f"Preset {plan.preset}, size {run.size}{f' ({arguments})' if arguments else ''}, vocabulary "
        f"{first.vocabulary:,} and what the variant adds, {first.dtype}, attention {run.attn_implementation}, "
        f"gradient checkpointing {'on' if run.gradient_checkpointing else 'off'}, blocks "
        f"{'compiled' if first.plan.compile else 'not compiled'}, DeepSpeed config {ds_config_path(run).name}. "
        "Random tokens.",
        f"Each case in a process of its own; {plan.warmup_steps} steps of warm-up, then {plan.rounds} rounds of "
        f"{plan.steps} timed steps: {in_turn}. Relative speeds are the median, the least and the "
        "most over the rounds.",
    ]


def chart(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Bars: positions a second and peak memory of each case. Without matplotlib none, and a line says so."""
    path.unlink(missing_ok=True)  # an older run's would lie beside other figures
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{path.name}: left out; pip install matplotlib draws it", file=sys.stderr)
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in reversed(rows) if row["failure"] is None]
    names = [row["case"] for row in shown]
    colors = ["#1f4e79" if is_variant(row) else "#8aa9c9" for row in shown]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 1 + 0.3 * len(shown)), layout="constrained", sharey=True)
    left.barh(names, [row["positions_per_second"] for row in shown], color=colors)
    left.set(xlabel="positions a second", title="speed")
    right.barh(names, [row["peak_memory_bytes"] / GIB for row in shown], color=colors)
    right.set(xlabel="GiB", title="peak memory")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; its exit code."""
    return command_line.carry_out(parse, argv, carry_out)


def carry_out(plan: Plan) -> int:
    """Measure, and write and print the results; the exit code."""
    facts = results_page.facts()
    rows = [measured.row() for measured in measure(plan)]
    folder = plan.output_dir or results_page.folder(facts["device"])
    page = tables(rows, goals(rows, plan.preset))
    results_page.write(folder, "throughput", "Throughput and memory of training", facts, page, notes(plan, rows))
    chart(rows, folder / "throughput.png")
    print((folder / "throughput.md").read_text())
    return 1 if any(row["failure"] is not None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
