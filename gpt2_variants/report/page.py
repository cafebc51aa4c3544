"""The page of a report, `report.html`, and its table, `report.md`."""

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import drawing
from ..faults import UsageError
from ..folders import write_aside
from .charts import charts_html
from .differences import judge
from .groups import Group, make_groups
from .runs import AXES, SavedRun, read_run
from .sections import Section
from .statistics import need_scipy
from .tables import Table, against_tables, cost_table, infill_tables, plain, quality_table, table_of_runs
from .verdict import verdict_text

STYLE = """
*{box-sizing:border-box}
:root{color-scheme:light dark;--page:#fdfdfb;--box:#fff}
@media(prefers-color-scheme:dark){:root{--page:#17191c;--box:#1e2125}}
body{margin:0 auto;padding:1.2rem clamp(.8rem,3vw,2.5rem) 3rem;max-width:1500px;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:.2rem 0 .6rem}
h2{font-size:1.15rem;margin:2rem 0 .6rem}
h3{font-size:1rem;margin:0}
p{max-width:75ch;margin:.4rem 0}
section>p,figcaption p{color:var(--muted);font-size:.9rem}
.verdict p{color:var(--ink);font-size:1rem}
.wide{overflow-x:auto;border:1px solid var(--faint);border-radius:6px;background:var(--box)}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums;overflow-wrap:normal}
th,td{padding:.4rem .7rem;white-space:nowrap;border-top:1px solid var(--faint)}
tr:first-child>*{border-top:0}
th{font-weight:600;color:var(--muted);white-space:normal;vertical-align:bottom;line-height:1.25}
td:first-child,th:first-child{min-width:7rem}
.l{text-align:left}.r{text-align:right}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,360px),1fr));gap:1rem;margin-top:.8rem}
figure{margin:0;padding:.8rem;border:1px solid var(--faint);border-radius:6px;background:var(--box);min-width:0;
display:flex;flex-direction:column;gap:.5rem}
figure svg *{stroke-linejoin:round;stroke-linecap:butt}
figure svg{display:block;width:100%;height:auto}
figure p{margin:.2rem 0 0;color:var(--muted);font-size:.9rem}
section>h3{margin:1.2rem 0 0}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif!important}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;padding:0;margin:.3rem 0 .6rem;font-size:.92rem}
.swatch{width:28px;height:12px;margin-right:.4rem;vertical-align:-1px}
.against{color:var(--muted);margin-right:.4rem}
.curves>input{position:absolute;opacity:0}
.curves>label{display:inline-block;padding:.3rem .8rem;margin:0 .3rem .3rem 0;border:1px solid var(--muted);
border-radius:99px;cursor:pointer}
.curves>input:checked+label{background:var(--ink);color:var(--page);border-color:var(--ink)}
.curves>input:focus-visible+label{outline:2px solid var(--c0);outline-offset:2px}
.curves .grid figure>div{display:none}
"""


def _switch() -> str:
    return "".join(f"#axis-{axis}:checked~.grid .on-{axis}{{display:block!important}}" for axis in AXES)


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


@dataclass(frozen=True)
class _Learned:
    """The pictures of a model: a section of the page, and the same in words."""

    html: str
    lines: list[str]


def _learned(folder: Path, title: str, number: int) -> _Learned:
    """What the model in `folder` learned, or that there is nothing to show. Raises `UsageError`."""
    from ..pictures import pictures_of

    pictures = pictures_of(folder)
    if not pictures:
        return _in_words(f"{title}: adds nothing to GPT-2 that could be drawn.")
    figures = []
    for picture in pictures:
        with drawing.look():
            figure = picture.draw()
        svg = drawing.svg(figure, f"model{number}-{picture.name}", picture.title)
        name, caption = html.escape(picture.title), html.escape(picture.caption)
        figures.append(f"<figure><figcaption><h3>{name}</h3></figcaption>{svg}<p>{caption}</p></figure>")
    section = f'<h3>{html.escape(title)}</h3><div class="grid">{"".join(figures)}</div>'
    return _Learned(section, [f"{title}: {picture.title}. {picture.caption}" for picture in pictures])


def _in_words(line: str) -> _Learned:
    return _Learned(_paragraphs([line]), [line])


def _all_learned(of_runs: Sequence[tuple[Path, str]], named: Sequence[tuple[Path, str]]) -> list[_Learned]:
    """`_learned` of the runs' models and of the models that were asked for: the latter's faults are faults."""
    learned, faults = [], []
    for number, (folder, title) in enumerate((*of_runs, *named)):
        try:
            learned.append(_learned(folder, title, number))
        except UsageError as err:
            lines = [line.removeprefix("--model ") for line in err.lines]
            if number >= len(of_runs):
                faults += lines
            learned.append(_in_words(f"{title}: no pictures of what it learned: {'; '.join(lines)}"))
    if faults:
        raise UsageError(faults)
    return learned


@dataclass(frozen=True)
class Report:
    """What `write` wrote: the page, the table, and the table's text."""

    page: Path
    table: Path
    text: str


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
    title = ", ".join(dict.fromkeys(group.first.variant for group in groups)) or "What a model learned"
    words = verdict_text(verdicts, groups) if len(runs) > 1 else []
    tables = against_tables(verdicts)
    if groups:
        tables += [quality_table(groups), *infill_tables(groups), cost_table(groups), table_of_runs(groups)]

    learned = _all_learned(_models(groups), models)
    parts = [f"# {plain(title)}"]
    if words:
        parts += ["## Is it better?", *map(plain, words)]
    if about:
        parts += ["## What was compared", "\n".join(f"- {plain(label)}: {plain(said)}" for label, said in about)]
    parts += [part for section in sections for part in section.markdown()]
    parts += [table.markdown().rstrip() for table in tables]
    if learned:
        parts += ["## What the models learned", *(plain(line) for model in learned for line in model.lines)]
    text = "\n\n".join(parts)
    added = _about_html(about) + "".join(map(_section_html, sections))
    page = _page(title, words, added, tables, groups, "".join(model.html for model in learned))
    try:
        for name, content in (("report.html", page), ("report.md", text + "\n")):
            write_aside(out / name, content)
    except OSError as err:
        raise UsageError([f"--output_dir {out}: cannot be written ({err.strerror}); give another folder"]) from err
    return Report(out / "report.html", out / "report.md", text)


def _about_html(about: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<dt>{html.escape(label)}</dt><dd>{html.escape(said)}</dd>" for label, said in about)
    return f"<section><h2>What was compared</h2><dl>{rows}</dl></section>" if about else ""


def _section_html(section: Section) -> str:
    figures = []
    for name, title, caption, figure in section.figures:
        svg = drawing.svg(figure, name, title)
        heading = f"<figcaption><h3>{html.escape(title)}</h3></figcaption>"
        figures.append(f"<figure>{heading}{svg}<p>{html.escape(caption)}</p></figure>")
    shown = f'<div class="grid">{"".join(figures)}</div>' if figures else ""
    tables = "".join(table.html() for table in section.tables)
    title = f"<h2>{html.escape(section.title)}</h2>"
    return f"<section>{title}{_paragraphs(section.paragraphs)}{shown}</section>{tables}"


def _page(
    title: str, words: Sequence[str], added: str, tables: Sequence[Table], groups: Sequence[Group], learned: str
) -> str:
    styles = drawing.styles([group.is_baseline for group in groups])
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<section class="verdict"><h2>Is it better?</h2>{_paragraphs(words)}</section>' if words else "",
        added,
        *(table.html() for table in tables[:-1]),
        charts_html(groups, styles),
        f"<section><h2>What the models learned</h2>{learned}</section>" if learned else "",
        *(table.html() for table in tables[-1:]),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{drawing.stylesheet()}{STYLE}{_switch()}</style></head>\n"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _read(folders: Sequence[Path]) -> tuple[list[SavedRun], list[tuple[Path, str]]]:
    """The runs, and (folder, title) of the models, among `folders`; one named twice counts once."""
    runs, models, faults = [], [], []
    for folder in {path.resolve(): path for path in folders}.values():
        try:
            if (folder / "run.json").exists():
                runs.append(read_run(folder))
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


def _models(groups: Sequence[Group]) -> list[tuple[Path, str]]:
    """Of each group the model of one run, the first that has one."""
    found = []
    for group in groups:
        run = next((run for run in group.runs if (run.folder / "model" / "config.json").is_file()), None)
        if run is not None:
            seed = f", seed {run.seed}" if len(group.runs) > 1 else ""
            found.append((run.folder / "model", f"{group.label}{seed}"))
    return found


def _default_place(folders: Sequence[Path], is_model: bool) -> Path:
    if len(folders) == 1:
        return folders[0].parent / f"{folders[0].name}-report" if is_model else folders[0] / "report"
    common = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    return (common.relative_to(Path.cwd()) if common.is_relative_to(Path.cwd()) else common) / "report"
