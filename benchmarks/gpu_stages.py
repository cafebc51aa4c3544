"""The stages of a day on a GPU, in their order."""

import functools
from collections.abc import Callable
from typing import Any

import gpu_alone
import gpu_kernels
import gpu_models
import gpu_runs
import gpu_speed
from gpt2_variants.registry import VARIANTS
from gpu_items import Day, Item, Row, Stage, one_table
from results_page import Column, Table
from throughput_cases import Plan

CORRECTNESS_COLUMNS = (
    Column("what", "what"),
    Column("dtype", "dtype"),
    Column("ok", "as it should be"),
    Column("loss_error", "error of the loss", ".1e"),
    Column("loss_error_allowed", "allowed", ".1e"),
    Column("grad_error", "of the gradient", ".1e"),
    Column("grad_error_allowed", "allowed", ".1e"),
    Column("worst_error", "of the parameter farthest off", ".1e"),
    Column("worst_error_allowed", "allowed", ".1e"),
    Column("worst", "which"),
)
KERNEL_COLUMNS = (
    Column("what", "what"),
    Column("dtype", "dtype"),
    Column("ok", "as it should be"),
    Column("error", "largest error", ".1e"),
    Column("error_allowed", "allowed", ".1e"),
    Column("kept", "part of the weights that was kept", ".4f"),
    Column("slope", "loss along its gradient, over what that says", ".4f"),
    Column("slope_allowed", "allowed off 1", ".2f"),
)
RUN_COLUMNS = (
    Column("what", "what"),
    Column("ok", "as it should be"),
    Column("steps", "steps"),
    Column("equal_losses", "equal losses"),
    Column("first_difference", "first difference at"),
    Column("equal_weights", "equal weights"),
    Column("text", "text"),
)
CURVE_COLUMNS = (
    Column("what", "variant"),
    Column("how", "by"),
    Column("step", "step"),
    Column("loss", "training loss", ".4f"),
    Column("tokens_per_second", "tokens/s", ",.0f"),
    Column("eval_loss", "validation loss", ".4f"),
)


def correctness_items(day: Day) -> list[Item]:
    """Return the items of the first stage."""
    return gpu_models.items(day) + gpu_kernels.items(day) + gpu_runs.correctness_items(day)


def correctness_tables(rows: dict[str, list[Row]]) -> list[Table]:
    """Return the tables of the first stage: models, kernels and dropout, runs."""
    every = [row for own in rows.values() for row in own]
    parts = (
        (
            "Loss and gradients",
            CORRECTNESS_COLUMNS,
            "grad_error_allowed",
            "Against the CPU in float64: the loss in nats; the norm of all gradients' difference over their norm; the "
            "same of the parameter that is farthest off. Allowed: 4 times what the CPU is off in that dtype.",
        ),
        (
            "Kernels, dropout, saved models",
            KERNEL_COLUMNS,
            "error",
            "Errors: the norm of the difference from float64 over that of float64. Duo attention's reference drops "
            "what the kernel dropped, which is read off it with values that are unit vectors.",
        ),
        (
            "Dropout in both passes",
            KERNEL_COLUMNS,
            "slope",
            "By how much the loss changes along its gradient with the same seed, over what the gradient says: 1 where "
            "the backward pass drops what the forward pass dropped, about 0 where it does not.",
        ),
        ("Runs", RUN_COLUMNS, "equal_weights", "Runs of train_ds.py, compared bit for bit."),
    )
    found = []
    for title, columns, key, legend in parts:
        if own := [row for row in every if key in row]:
            used = [column for column in columns if any(column.key in row for row in own)]
            found.append(Table(title, used, own, legend))
    return found


def tuning_items(day: Day) -> list[Item]:
    """Blocks compiled together, kernels of duo-predict's attention, and the loss head's rows."""
    return gpu_speed.tuning_items(day) + gpu_alone.head_items(day)


def tuning_tables(rows: dict[str, list[Row]]) -> list[Table]:
    """Return the tables of blocks and of the loss head."""
    every = [row for own in rows.values() for row in own]
    parts = (
        ("Blocks compiled together", gpu_speed.TOGETHER_COLUMNS, "together"),
        ("Loss head by rows", gpu_alone.HEAD_COLUMNS, "rows_at_once"),
    )
    return [Table(title, columns, own) for title, columns, key in parts if (own := [r for r in every if key in r])]


def stages(day: Day) -> dict[str, Stage]:
    """Return name -> stage, in their order."""

    def by_rounds(make_plan: Callable[[Day], Plan]) -> dict[str, Any]:
        return {
            "items": functools.partial(gpu_speed.round_items, make_plan),
            "tables": functools.partial(gpu_speed.throughput_tables, make_plan, day),
        }

    profiles = one_table(
        "A step by kernels",
        gpu_speed.PROFILE_COLUMNS,
        "Of one step under the profiler: the time of kernels on the device, the longest first. The first row has the "
        "step by the clock as well, without the profiler: what is more there, the device did nothing.",
    )
    attention = one_table(
        "Attention alone",
        gpu_alone.ATTENTION_COLUMNS,
        "bf16, causal; duo-predict's over both of its streams. TFLOP/s: 7 products of which a half is needed, over the "
        "time of both passes.",
    )
    curve = one_table("Training losses", CURVE_COLUMNS, "The same data and seed for both; logged as train_ds.py does.")
    found = (
        Stage("correctness", "what is computed, against float64", correctness_items, correctness_tables),
        Stage(
            "references",
            "gpt2 and duo_predict beside what they are set against",
            **by_rounds(gpu_speed.references_plan),
        ),
        Stage("attention", "attention alone, by backend", gpu_alone.attention_items, attention),
        Stage("profile", "a step by kernels", profile_items, profiles),
        Stage("tuning", "blocks compiled together; rows of the loss head", tuning_items, tuning_tables),
        Stage("variants", "all variants' speed and memory", **by_rounds(gpu_speed.variants_plan)),
        Stage("decoding", "inference of all variants", decoding_items, gpu_speed.decode_tables),
        Stage("curve", "training losses over some hundred steps", gpu_runs.curve_items, curve),
    )
    return {stage.name: stage for stage in found}


def profile_items(day: Day) -> list[Item]:
    """Return the items of the profile."""
    return [Item(name, functools.partial(gpu_speed.profile, name), 120, 400, alone=True) for name in gpu_speed.PROFILED]


def decoding_items(day: Day) -> list[Item]:
    """Return the items of decoding."""
    return [Item(name, functools.partial(gpu_speed.decoding, name), 40) for name in VARIANTS]
