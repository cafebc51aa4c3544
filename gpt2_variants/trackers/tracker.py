"""What every tracker does, and what it is told of the run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, record: dict[str, Any]) -> None:
        """Take one record; "step" is among its keys."""

    def close(self) -> None:
        """Take no more records."""


@dataclass(frozen=True)
class TrackedRun:
    """The run whose figures a tracker is opened for.

    Attributes:
        folder: of the run; a tracker keeps its files in a folder of its own in it.
        name: what the run is shown as.
        group: what it is compared within: the variant's family.
        facts: `run.json`, with "variant" among its keys.
        resume_step: optimizer steps done before; what was logged of later ones is logged again. 0 at the start.
        remember: called with facts by name, keeps them in `run.json`: they stand in `facts` when the run goes on.
    """

    folder: Path
    name: str
    group: str
    facts: dict[str, Any]
    resume_step: int
    remember: Callable[..., None]


def tagged(record: dict[str, Any]) -> dict[str, Any]:
    """Return the values of `record`, but for its step, as curves are called: `train/loss`, `eval/perplexity`."""
    return {f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}": v for k, v in record.items() if k != "step"}
