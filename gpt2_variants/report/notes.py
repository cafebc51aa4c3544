"""What else differs between a variant's runs and the baseline's, and may explain a difference: in sentences."""

import math
from collections.abc import Sequence

from ..registry import VARIANTS
from .groups import BASELINE, OF_LENGTH, Group, differing
from .runs import SavedRun

# Axis -> what groups that have come equally far on it are equal in.
AT = {"tokens": "equal data", "flops": "equal cost", "time": "equal time"}


def notes_on(group: Group, baseline: Group, same_machine: bool) -> list[str]:
    """Return notes on block size, batch, settings and machine."""
    ours, theirs = group.first, baseline.first
    notes = []
    if ours.block_size != theirs.block_size:
        notes.append(
            f"Their blocks have {ours.block_size} and {theirs.block_size} tokens: in the shorter ones tokens are "
            "predicted from less context, and that alone raises a perplexity."
        )
    per_step = [ours.tokens_per_step, theirs.tokens_per_step]
    if per_step[0] and per_step[1] and not math.isclose(per_step[0], per_step[1], rel_tol=0.01):
        notes.append(f"A step has {per_step[0]:,.0f} and {per_step[1]:,.0f} tokens.")
    notes += _notes_on_settings(ours, theirs)
    for group_of, run in ((group, ours), (baseline, theirs)):
        if run.plan.get("load_best_model_at_end"):
            notes.append(
                f"{group_of.label} exports the weights of its best evaluation; differences here are of its curve."
            )
    if not same_machine:
        notes.append("They did not run on the same machine: time, speed and memory are not compared.")
    return notes


def _notes_on_settings(ours: SavedRun, theirs: SavedRun) -> list[str]:
    # of data set, tokenizer, block size and schedules that were cut more is said than that they differ
    apart = {"block_size", "dataset", "tokenizer", *_own_fields(ours)}
    if ours.settings.get("total_steps") != theirs.settings.get("total_steps"):
        apart |= OF_LENGTH
    names = [name for name in differing(ours, theirs) if name not in apart]
    pairs = {n: f"{ours.settings.get(n, 'default')} and {theirs.settings.get(n, 'default')}" for n in names}
    notes = []
    if rates := pairs.pop("learning_rate", None):
        notes.append(
            f"Their learning rates differ, {rates}: that is fair if each was tuned for its own variant with equal "
            "effort; else it may explain a difference."
        )
    if pairs:
        told = ", ".join(f"{name} {values}" for name, values in pairs.items())
        notes.append(f"Settings differ beside the variant: {told}.")
    return notes


def notes_on_schedules(axis: str, stood: Sequence[tuple[Group, float]], close: float) -> list[str]:
    """Return notes on groups that were cut in mid-schedule, where the rate is higher than at its end.

    Args:
        axis: of `AT`.
        stood: each group, and the step at which it stood there.
        close: how many times that step a schedule's end may be, to have ended there.
    """
    notes = []
    for group, step in stood:
        end = group.first.schedule_end
        if end <= close * step:
            continue
        how = f"--max_steps {step:.0f}"
        fair = f"a run with {how} would be the fair one"
        if axis != "tokens":
            fair = f"`python -m gpt2_variants compare --equal {axis}` trains the fair one, of {how}"
        notes.append(
            f"At {AT[axis]} {group.label} stood at step {step:,.0f} of {end:,}, cut in mid-schedule: its learning rate "
            f"had not decayed as far as at its end. That counts against it; {fair}."
        )
    return notes


def note_on_pairs(group: Group, baseline: Group) -> list[str]:
    """Return notes on seeds that stand in no pair, where groups were compared by pairs of seeds."""
    seeds = [{run.seed for run in side.runs} for side in (group, baseline)]
    return [
        f"They are compared by pairs of seeds; {side.label}'s {', '.join(map(str, sorted(left, key=str)))} are in none."
        for side, left in ((group, seeds[0] - seeds[1]), (baseline, seeds[1] - seeds[0]))
        if left
    ]


def _own_fields(run: SavedRun) -> set[str]:
    """Return the config fields that the variant of `run` has beyond the baseline's, and what tells the variant."""
    return {"variant_code", *(run.plan.get("model") or {})} - {*VARIANTS[BASELINE].config_fields()}
