"""What a run says before its first step: what it is, what was chosen for the user, what the numbers to come mean."""

import math
from pathlib import Path

from ..config.options import Options
from ..config.plan import Plan
from ..words import counted

WHY = {
    "overlap_comm=true": "gradients are sent during the backward pass",
    "tf32=true": "float32 matrices are multiplied in TF32; --no-tf32 multiplies them in full",
}


def opening(options: Options, plan: Plan, device: str) -> list[str]:
    """Return the lines that a run begins with, where nothing unusual has to be said.

    Args:
        options: resolved.
        device: the name of this rank's device.
    """
    ranks = f"{counted(plan.world_size, 'rank')}, each on " if plan.world_size > 1 else ""
    tokens = plan.total_steps * plan.train_batch_size * plan.block_size
    return [
        f"{plan.variant}: {plan.num_parameters:,} parameters, in {plan.precision}, on {ranks}{device}, into "
        f"{options.output_dir}",
        f"data: {plan.data}",
        f"training: {counted(plan.total_steps, 'step')} of {plan.train_batch_size} x {plan.block_size} tokens, "
        f"{tokens:,} in all" + _chosen(options, plan),
        f"to come: loss, in nats per prediction of the step's batch ({_guess(plan)}); eval_: of the validation data, "
        "with perplexity = exp(loss) of the next token and the share of tokens predicted; all of it in "
        f"{Path(options.output_dir) / 'metrics.jsonl'}",
    ]


def _chosen(options: Options, plan: Plan) -> str:
    """Return what was chosen for the user, and by what."""
    by_preset = [choice for choice in options.chosen if not choice.startswith("preset=")]
    by_machine = [f"{choice} ({WHY[choice]})" for choice in plan.chosen if choice in WHY]
    said = ""
    if by_preset:
        why = ""
        if len(by_preset) < len(options.chosen):
            why = " (a CUDA device is here)" if options.preset == "seed" else " (no CUDA device is here)"
        said += f"; --preset {options.preset}{why} sets {', '.join(by_preset)}"
    if by_machine:
        said += f"; the machine, {', '.join(by_machine)}"
    return said


def _guess(plan: Plan) -> str:
    vocabulary = plan.model["vocab_size"]
    return f"{math.log(vocabulary):.2f} is guessing among {vocabulary:,} entries"
