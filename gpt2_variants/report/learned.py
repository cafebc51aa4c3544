"""What the models learned, as pictures and in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import drawing
from ..faults import UsageError
from .groups import Group
from .template import ShownFigure, shown


@dataclass(frozen=True)
class Learned:
    """What one model learned.

    Attributes:
        title: the model's.
        figures: empty where there is none.
        lines: the same in words, or why there is none.
    """

    title: str
    figures: list[ShownFigure]
    lines: list[str]


def models_of(groups: Sequence[Group]) -> list[tuple[Path, str]]:
    """Return one model for each group, that of the first run that has one, with a title."""
    found = []
    for group in groups:
        run = next((run for run in group.runs if (run.folder / "model" / "config.json").is_file()), None)
        if run is not None:
            seed = f", seed {run.seed}" if len(group.runs) > 1 else ""
            found.append((run.folder / "model", f"{group.label}{seed}"))
    return found


def all_learned(of_runs: Sequence[tuple[Path, str]], named: Sequence[tuple[Path, str]]) -> list[Learned]:
    """Return what the runs' models and the models that were asked for learned.

    Raises:
        UsageError: a model of `named` cannot be read; of a run's it is said on the page.
    """
    learned, faults = [], []
    for number, (folder, title) in enumerate((*of_runs, *named)):
        try:
            learned.append(_learned(folder, title, number))
        except UsageError as err:
            lines = [line.removeprefix("--model ") for line in err.lines]
            if number >= len(of_runs):
                faults += lines
            learned.append(Learned(title, [], [f"{title}: no pictures of what it learned: {'; '.join(lines)}"]))
    if faults:
        raise UsageError(faults)
    return learned


def _learned(folder: Path, title: str, number: int) -> Learned:
    from ..pictures import pictures_of

    pictures = pictures_of(folder)
    if not pictures:
        return Learned(title, [], [f"{title}: adds nothing to GPT-2 that could be drawn."])
    figures = []
    for picture in pictures:
        with drawing.look():
            drawn = drawing.Drawn(picture.draw(), {})
        figures.append(shown(f"model{number}-{picture.name}", picture.title, picture.caption, drawn))
    return Learned(title, figures, [f"{title}: {picture.title}. {picture.caption}" for picture in pictures])
