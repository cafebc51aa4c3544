"""The micro-batch that fits a card, chosen for the user."""

import dataclasses
from typing import TYPE_CHECKING

from ..faults import UsageError
from ..words import counted
from .meter import NoEstimate
from .peak import GIB, Card, Demand

if TYPE_CHECKING:
    from ..config.options import Options


def with_fitting_micro_batch(options: "Options", demand: Demand, card: Card) -> tuple["Options", str]:
    """Return `options` with as many sequences per forward pass as fit `card`, of the same batch; and what to say of it.

    Args:
        demand: of the plan that `options` come to without.

    Raises:
        UsageError: not one sequence fits, or the model cannot be run without data.
    """
    plan = demand.plan
    where = f"{card.name} ({card.size / GIB:.1f} GiB)"
    try:
        micro = demand.largest_that_fits(card.room)
        if micro is None:
            raise UsageError(
                [
                    f"--auto_micro_batch: a single sequence takes an estimate of {demand.peak(1) / GIB:.1f} GiB, more "
                    f"than {where} has room for; add --gradient_checkpointing, more GPUs, or a higher ZeRO stage"
                ]
            )
        peak = demand.peak(micro)
    except NoEstimate as err:
        raise UsageError([f"--auto_micro_batch: {err}; give --per_device_train_batch_size"]) from err
    accumulated = plan.train_batch_size // (micro * plan.world_size)
    chosen = (
        *options.chosen,
        f"per_device_train_batch_size={micro}",
        f"gradient_accumulation_steps={accumulated}",
    )
    changed = dataclasses.replace(
        options,
        train_batch_size=plan.train_batch_size,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulated,
        chosen=chosen,
    )
    return changed, (
        f"--auto_micro_batch: {plan.train_batch_size} = {micro} per GPU x {accumulated} accumulated x "
        f"{counted(plan.world_size, 'GPU')}; an estimate of {peak / GIB:.1f} GiB of {where}"
    )
