"""The page of the throughput benchmark: its tables, notes and chart."""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gpt2_variants.config.deepspeed_json import ds_config_path
from results_page import Column, Table
from throughput_cases import Plan, has_deepspeed

GIB = 1024**3

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


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Return the tables of the page."""
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
            [row for row in measured if row["is_variant"]],
            legend,
        )
    ]
    if compared := [row for row in measured if not row["is_variant"]]:
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
    if failed := [row for row in rows if row["failure"] is not None]:
        found.append(Table("Not measured", (Column("case", "case"), Column("failure", "why")), failed))
    return found


def notes(plan: Plan, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return how the figures were taken, in words."""
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
        f"{'compiled' if first.plan.compile else 'not compiled'}, DeepSpeed config {ds_config_path(run).name}"
        f"{'' if has_deepspeed() else ', by a plain loop, as DeepSpeed is not installed'}. Random tokens.",
        f"Each case in a process of its own; {plan.warmup_steps} steps of warm-up, then {plan.rounds} rounds of "
        f"{plan.steps} timed steps: {in_turn}. Relative speeds are the median, the least and the "
        "most over the rounds.",
    ]


def chart(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw bars: positions a second and peak memory of each case. Without matplotlib none, and a line says so."""
    path.unlink(missing_ok=True)  # an older run's would lie beside other figures
    if importlib.util.find_spec("matplotlib") is None:
        print(f"{path.name}: left out; pip install matplotlib draws it", file=sys.stderr)
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [row for row in reversed(rows) if row["failure"] is None]
    names = [row["case"] for row in shown]
    colors = ["#1f4e79" if row["is_variant"] else "#8aa9c9" for row in shown]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 1 + 0.3 * len(shown)), layout="constrained", sharey=True)
    left.barh(names, [row["positions_per_second"] for row in shown], color=colors)
    left.set(xlabel="positions a second", title="speed")
    right.barh(names, [row["peak_memory_bytes"] / GIB for row in shown], color=colors)
    right.set(xlabel="GiB", title="peak memory")
    for axes in (left, right):
        axes.grid(axis="x", alpha=0.3)
    fig.savefig(path, dpi=120)
    plt.close(fig)
