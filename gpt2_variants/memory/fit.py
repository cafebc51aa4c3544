"""Whether a run fits a card, in a line with the cure."""

from typing import NamedTuple

from .meter import NoEstimate
from .peak import GIB, Card, Demand


class Verdict(NamedTuple):
    """What is to be said of a run's memory on a card.

    Attributes:
        line: in words.
        fits: whether the estimate is within the card's room; None: there is no estimate.
        hopeless: the model's states alone are more than the card has.
    """

    line: str
    fits: bool | None
    hopeless: bool


def verdict(demand: Demand, card: Card, quick: bool = False) -> Verdict:
    """Hold the estimate of a run against `card`, and say what would make it fit.

    Args:
        quick: where the run fits without torch.compile too, that is not gone through, which takes seconds.
    """
    plan = demand.plan
    where = f"{card.name} ({card.size / GIB:.1f} GiB)"
    states = demand.states().at_step
    if states > card.size:
        return Verdict(
            f"memory: weights, gradients and optimizer states alone take {states / GIB:.1f} GiB of {where}; more GPUs, "
            "--deepspeed_config zero3.json on several of them or zero3_offload.json, or a smaller --size",
            fits=False,
            hopeless=True,
        )
    try:
        if quick and demand.compiled and demand.uncompiled.peak(plan.per_device_train_batch_size) <= card.room:
            demand = demand.uncompiled
        peak = demand.peak(plan.per_device_train_batch_size)
        kind = "with" if demand.compiled else "without"
        estimate = f"memory: an estimate of {peak / GIB:.1f} GiB a GPU {kind} torch.compile"
        if peak <= card.room:
            return Verdict(f"{estimate}; fits {where}: yes", fits=True, hopeless=False)
        smaller = demand.largest_that_fits(card.room)
    except NoEstimate as err:
        return Verdict(f"memory: no estimate: {err}", fits=None, hopeless=False)
    cures = [] if smaller is None else [f"--per_device_train_batch_size {smaller} (the same curve)"]
    if not plan.gradient_checkpointing:
        cures.append("--gradient_checkpointing")
    if smaller is None:
        cures.append("more GPUs or a higher ZeRO stage")
    return Verdict(
        f"{estimate}; fits {where}: no, with {(card.size - card.room) / GIB:.0f} GiB left for CUDA; add "
        + ", or ".join(cures),
        fits=False,
        hopeless=False,
    )
