"""The page of a report, `report.html`, and its table, `report.md`."""

import errno
import os
import sys
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from .. import drawing
from ..faults import RunError, UsageError
from ..folders import holds_run, write_aside
from ..reasons import disk_fault
from .charts import curves_of
from .compared import compared
from .differences import judge
from .figures import as_csv, as_json, download
from .forests import HOW_TO_READ, forests
from .groups import BASELINE, Group, make_groups
from .learned import all_learned, models_of
from .runs import SavedRun, read_run
from .sections import Section
from .statistics import need_scipy
from .tables import Table, against_tables, cost_table, plain, quality_table, stream_tables, table_of_runs
from .template import ShownFigure, render, shown
from .terminal import terminal_table
from .verdict import verdict_said

MOST_NAMED = 6  # variants in a page's title
FEW = 3  # verdicts whose figures need not be unfolded


@dataclass(frozen=True)
class Report:
    """What `write` wrote: the page, the table, the table's text, and a table for the terminal."""

    page: Path
    table: Path
    text: str
    terminal: str


@dataclass(frozen=True)
class _ShownSection:
    """A `Section`, with its figures as the page has them."""

    title: str
    paragraphs: Sequence[str]
    tables: Sequence[Table]
    figures: list[ShownFigure]


def write(
    folders: Sequence[Path],
    output_dir: Path | None = None,
    sections: Sequence[Section] = (),
    about: Sequence[tuple[str, str]] = (),
) -> Report:
    """Write `report.html`, one page with all in it, and `report.md`.

    Args:
        folders: of runs, and of models, of which the pictures alone are drawn.
        output_dir: where to; by default `report` in the run's folder, or in the deepest folder that all are in; of
            one model, a folder beside it.
        sections: what the command that made the runs adds, after the verdict.
        about: (label, text) of what it adds to what was compared.

    Raises:
        UsageError: a line for each folder that holds neither a run nor a model, or for each of these models that cannot
            be read; or the report cannot be written, or matplotlib or, for several runs, scipy is missing.
        RunError: the disk is full.
    """
    drawing.need_matplotlib()
    runs, models = _read(folders)
    if len(runs) > 1:
        need_scipy()
    out = output_dir or _default_place(folders, is_model=not runs)
    if out.exists() and not out.is_dir():
        raise UsageError([f"--output_dir {out}: is a file; a folder is needed"])
    groups = make_groups(runs)
    verdicts = judge(groups)
    title = _title(groups)
    words = verdict_said(verdicts, groups) if len(runs) > 1 else []
    box = compared(groups)
    facts = list({**dict(box.common), **dict(about)}.items())  # the command knows better how a rate was chosen
    tables = against_tables(verdicts)
    if groups:
        tables += [quality_table(groups), *stream_tables(groups), cost_table(groups)]
    learned = all_learned(models_of(groups), models)

    parts = [f"# {plain(title)}"]
    if words:
        parts += ["## Is it better?", *(plain(str(said)) for said in words)]
    if facts:
        rows = [*facts, *((f"to repeat {label}", command) for label, command in box.commands)]
        parts += ["## What was compared", "\n".join(f"- {plain(label)}: {plain(said)}" for label, said in rows)]
    parts += [box.apart.markdown().rstrip()] if box.apart else []
    parts += [part for section in sections for part in section.markdown()]
    parts += [table.markdown().rstrip() for table in tables]
    if learned:
        parts += ["## What the models learned", *(plain(line) for model in learned for line in model.lines)]
    parts += [table_of_runs(groups).markdown().rstrip()] if groups else []
    text = "\n\n".join(parts)
    page = render(
        title=title,
        words=words,
        forests=forests(verdicts),
        how_to_read=HOW_TO_READ,
        unfolded=len(verdicts) <= FEW,
        facts=facts,
        apart=box.apart,
        commands=box.commands,
        sections=[_shown(section) for section in sections],
        curves=curves_of(groups),
        tables=tables,
        learned=learned,
        runs=table_of_runs(groups) if groups else None,
        links=_links(runs, out),
        tracked=_tracked(groups),
        downloads={name: download(rows) for name, rows in as_csv(groups, verdicts).items()},
        data=Markup(as_json(groups, verdicts)),
    )
    try:
        for name, content in (("report.html", page), ("report.md", text + "\n")):
            write_aside(out / name, content)
    except OSError as err:
        if err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunError(f"{out}: the report was not written: {disk_fault(err)}") from err
        raise UsageError([f"--output_dir {out}: cannot be written ({err.strerror}); give another folder"]) from err
    return Report(out / "report.html", out / "report.md", text, terminal_table(groups, verdicts))


def _title(groups: Sequence[Group]) -> str:
    variants = list(dict.fromkeys(group.first.variant for group in groups))
    if len(variants) > MOST_NAMED:
        others = [name for name in variants if name != BASELINE]
        return f"{len(others)} variants" + (f" and {BASELINE}" if len(others) < len(variants) else "")
    return ", ".join(variants) or "What a model learned"


def _shown(section: Section) -> _ShownSection:
    figures = [shown(name, title, text, drawing.Drawn(figure, {})) for name, title, text, figure in section.figures]
    return _ShownSection(section.title, section.paragraphs, section.tables, figures)


def _links(runs: Sequence[SavedRun], out: Path) -> dict[str, str]:
    """Return name of a run's folder -> its URL, relative to the page."""
    relative = {str(run.folder): os.path.relpath(run.folder.resolve(), out.resolve()) for run in runs}
    return {name: urllib.parse.quote(Path(path).as_posix()) + "/" for name, path in relative.items()}


def _tracked(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Return (label, URL) of the runs that stand on W&B, as far as their records say."""
    found = [
        (f"{group.label}, seed {run.seed}", str(run.facts.get("wandb_url"))) for group in groups for run in group.runs
    ]
    return [(label, url) for label, url in found if url.startswith(("https://", "http://"))]


def _read(folders: Sequence[Path]) -> tuple[list[SavedRun], list[tuple[Path, str]]]:
    """Return the runs, and (folder, title) of the models, among `folders`; one named twice counts once."""
    runs, models, faults = [], [], []
    for folder in {path.resolve(): path for path in folders}.values():
        try:
            if holds_run(folder):
                runs.append(run := read_run(folder))
                if run.damage:
                    print(f"{folder}/{run.damage}", file=sys.stderr)
            elif (folder / "config.json").is_file():
                models.append((folder, str(folder)))
            elif not (len(folders) > 1 and (folder / "report.html").is_file()):  # written here; runs/* names it too
                cure = "give a run's folder, such as runs/gpt2, or a model's, such as runs/gpt2/model"
                faults.append(f"{folder}: holds no run and no model (no run.json, no config.json); {cure}")
        except UsageError as err:
            faults += err.lines
    if faults:
        raise UsageError(faults)
    return runs, models


def _default_place(folders: Sequence[Path], is_model: bool) -> Path:
    if len(folders) == 1:
        return folders[0].parent / f"{folders[0].name}-report" if is_model else folders[0] / "report"
    common = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    return (common.relative_to(Path.cwd()) if common.is_relative_to(Path.cwd()) else common) / "report"
