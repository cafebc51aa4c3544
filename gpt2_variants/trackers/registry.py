"""TRACKERS: where a run's figures can go beside `metrics.jsonl`, by the names `--report_to` knows."""

import difflib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from .tensorboard import open_tensorboard
from .tracker import TrackedRun, Tracker
from .wandb import open_wandb, wandb_fault

ALL, NONE = "all", "none"  # words of `--report_to` beside the names


@dataclass(frozen=True)
class TrackerKind:
    """What the rest of the package needs to know of a tracker.

    Attributes:
        name: as on the command line.
        summary: a few words, for the help.
        package: what it needs, by the name that it is installed and imported by.
        open: the tracker of a run, ready for records; imports the package. Raises what the package raises.
        own_fault: why it could not do what it is asked for, though the package is there; None where it can.
    """

    name: str
    summary: str
    package: str
    open: Callable[[TrackedRun], Tracker]
    own_fault: Callable[[], str | None] = lambda: None

    def missing(self) -> str | None:
        """Return a line with the cure where its package is not installed on this machine; else None."""
        spec = find_spec(self.package)
        if spec is None or spec.origin is None:  # a folder of that name, as runs leave it, is taken for a package
            return f"{self.package} is not installed; pip install {self.package}"
        return None

    def fault(self) -> str | None:
        """Return in a line why it cannot be used here, with the cure; None where it can. One rank may ask the network.

        The package is not imported.
        """
        return self.missing() or self.own_fault()


TRACKERS: dict[str, TrackerKind] = {
    kind.name: kind
    for kind in (
        TrackerKind(
            name="wandb",
            summary="Weights & Biases, offline without an API key",
            package="wandb",
            open=open_wandb,
            own_fault=wandb_fault,
        ),
        TrackerKind(
            name="tensorboard",
            summary="event files in the run's folder",
            package="tensorboard",
            open=open_tensorboard,
        ),
    )
}


def parse_names(given: str | Iterable[str]) -> tuple[str, ...]:
    """Return the trackers that are named, once each and in the order of `TRACKERS`.

    Args:
        given: names between spaces or commas, or several such texts. "all" are those whose package is installed;
            "none", alone, or no texts at all are no tracker.

    Raises:
        ValueError: a name is not known, "none" stands beside another, or a text has no name; in one line, which begins
            with what was given.
    """
    texts = [given] if isinstance(given, str) else list(given)
    names = [name for text in texts for name in re.split(r"[\s,]+", text) if name]
    if texts and not names:
        raise ValueError(f"is empty: {_choices()}")
    unknown = [name for name in dict.fromkeys(names) if name not in (*TRACKERS, ALL, NONE)]
    if unknown:
        raise ValueError(f"{' '.join(unknown)}: not known{_meant(unknown)}; {_choices()}")
    if NONE in names:
        if set(names) != {NONE}:
            raise ValueError(f"{' '.join(names)}: none means no tracker; leave it out, or give it alone")
        return ()
    return tuple(name for name, kind in TRACKERS.items() if name in names or (ALL in names and kind.missing() is None))


def _choices() -> str:
    return f"any of {', '.join(TRACKERS)}, or {ALL}, or {NONE}"


def _meant(unknown: list[str]) -> str:
    """Return a question after the names that are near to what was given; "" where none is."""
    near = [
        match
        for name in unknown
        for match in difflib.get_close_matches(name.lower(), (*TRACKERS, ALL, NONE), n=1, cutoff=0.6)
    ]
    return f" (did you mean {', '.join(dict.fromkeys(near))}?)" if near else ""
