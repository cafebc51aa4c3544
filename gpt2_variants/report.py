"""What runs say of themselves when they are over: figures, curves, pictures, and which architecture is better.

One run gives a summary and a sample; one or more give a page, `report.html`, and a table, `report.md`.
"""

import dataclasses
import html
import importlib.util
import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from . import comparison, drawing
from .comparison import Difference, Group, Mean, SavedRun, Verdict
from .config.options import Options
from .evaluation import describe
from .faults import UsageError
from .folders import write_aside

DEMO_PROMPT = "The following statement"  # the built-in corpus is Python's language reference
MOST_POINTS = 200  # of a curve of training losses; more are averaged, which a chart this small shows as well
INFILL = (
    "Each token given its past and its right neighbour, which it has seen: not comparable with the next-token figures, "
    "nor with any other variant's."
)


# --- one run ----------------------------------------------------------------------------------------------------------


def summary(folder: Path) -> str:
    """The run's figures in a few lines.

    Raises:
        UsageError: `folder` holds no run, or one that cannot be read.
    """
    run = comparison.read_run(folder)
    parameters = "-" if run.num_parameters is None else f"{run.num_parameters:,}"
    lines = [f"{run.variant}, {parameters} parameters, {run.status}: {folder}"]
    lines += [text for text in (run.facts.get("data"), run.facts.get("reason")) if text]
    if run.training:
        train = run.training[-1]
        lines.append(
            f"training    loss {train['loss']:.4f} at step {train['step']}, {_number(train.get('tokens'), ',')} tokens "
            f"in {_number(train.get('elapsed_seconds'), '.0f')} s, "
            f"{_number(train.get('tokens_per_second'), ',.0f')} tokens/s"
        )
    if run.evaluations:
        final = run.evaluations[-1]
        next_token, *infill = describe(final)
        lines.append(f"validation  {next_token} at step {final['step']}")
        if unigram := run.unigram_perplexity:
            part = final["eval_perplexity"] / unigram
            lines.append(
                f"            unigram perplexity of the same text {unigram:.2f}; the model's is {part:.3f} of it"
            )
        lines += infill
    return "\n".join(lines)


def plot(folder: Path) -> Path:
    """Draw loss and perplexity against steps as `curves.png` in the run's folder. Needs matplotlib."""
    from matplotlib.figure import Figure

    run = comparison.read_run(folder)
    evaluations = run.evaluations
    fig = Figure(figsize=(11, 4), layout="constrained")
    left, right = fig.subplots(1, 2)
    steps = [r["step"] for r in run.training]
    left.plot(steps, [r["loss"] for r in run.training], label="training", color="#8aa9c9", linewidth=1)
    steps = [r["step"] for r in evaluations]
    left.plot(steps, [r["eval_loss"] for r in evaluations], label="validation", color="#1f4e79", marker="o")
    right.plot(steps, [r["eval_perplexity"] for r in evaluations], label="next token", color="#1f4e79", marker="o")
    if evaluations and "eval_infill_loss" in evaluations[-1]:
        left.plot(
            steps, [r["eval_infill_loss"] for r in evaluations], label="validation, infill", color="#c55a11", marker="s"
        )
        right.plot(
            steps,
            [r["eval_infill_perplexity"] for r in evaluations],
            label="infill (sees the right neighbour)",
            color="#c55a11",
            marker="s",
        )
    if run.unigram_perplexity:
        right.axhline(run.unigram_perplexity, color="gray", linestyle=":", label="unigram model")
    left.set(xlabel="optimizer steps", ylabel="loss, nats a token", title=f"{run.variant}: loss")
    right.set(xlabel="optimizer steps", ylabel="perplexity", yscale="log", title="validation perplexity")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    path = folder / "curves.png"
    fig.savefig(path, dpi=120)
    return path


def sample(model_folder: Path, prompt: str) -> str:
    """A continuation of `prompt`, sampled from an exported model, with the prompt. Raises `UsageError`."""
    from .inference import SavedModel

    saved = SavedModel(model_folder)
    return saved.decode(saved.generate(saved.encode(prompt))[0])


def show(run: Options) -> None:
    """Print what a finished `run` came to, with its plot and its report; the demo ends with a sample too."""
    folder = Path(run.output_dir)
    command = f"python -m gpt2_variants report {shlex.quote(str(folder))}"
    print(summary(folder))
    if importlib.util.find_spec("matplotlib"):
        print(f"plot        {plot(folder)}")
        try:
            print(f"report      {write([folder]).page}")
        except UsageError as err:  # the run is finished all the same
            print(f"report      none: {'; '.join(err.lines)}; then {command}")
    else:
        print(f"plot        none: pip install matplotlib, then {command}")
    print(f"model       {folder / 'model'}")
    if run.preset == "demo":
        try:
            print(f"sample      {sample(folder / 'model', DEMO_PROMPT)!r}")
        except UsageError as err:  # of a tokenizer that cannot encode the prompt; the run is finished all the same
            print(f"sample      none: {'; '.join(err.lines)}")
    print(f"compare     {command} OTHER_RUN ...")
    print(f"try         python -m gpt2_variants generate --model {folder / 'model'} --prompt {DEMO_PROMPT!r}")


# --- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table of the report; `legend` says how to read it. `align` has l or r for each column."""

    title: str
    align: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    legend: str = ""

    def markdown(self) -> str:
        """With its heading and legend."""
        rules = ["---:" if side == "r" else "---" for side in self.align]
        rows = [self.head, rules, *([_plain(cell).replace("|", "\\|") for cell in row] for row in self.rows)]
        text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"## {self.title}\n\n{text}\n" + (f"\n{_plain(self.legend)}\n" if self.legend else "")

    def html(self) -> str:
        """In a box of its own that scrolls where the page is narrow."""

        def row(cells: Sequence[str], tag: str) -> str:
            pairs = zip(self.align, cells, strict=True)
            return "<tr>" + "".join(f'<{tag} class="{side}">{html.escape(cell)}</{tag}>' for side, cell in pairs)

        body = "".join(row(cells, "td") for cells in self.rows)
        legend = f"<p>{html.escape(self.legend)}</p>" if self.legend else ""
        scrolled = f'<div class="wide" tabindex="0"><table>{row(self.head, "th")}{body}</table></div>'
        return f"<section><h2>{html.escape(self.title)}</h2>{scrolled}{legend}</section>"


def _plain(text: str) -> str:
    """On one line, and nothing in it is taken for HTML."""
    return " ".join(text.replace("<", "&lt;").split())


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _mean(value: Mean | None, form: str, scale: float = 1.0) -> str:
    if value is None:
        return "-"
    # counts are the same for every seed; of figures that would be a chance too small to see
    spread = "" if not value.sd else f" ± {value.sd / scale:{form}}"
    return f"{value.mean / scale:{form}}{spread}"


def _signed(value: float, form: str) -> str:
    return format(value, f"+{form}").replace("-", "\N{MINUS SIGN}")


def _flops(value: float) -> str:
    return re.sub(r"e\+0*", "e", f"{value:.4g}")


def _quality(groups: Sequence[Group]) -> Table:
    rows = []
    for group in groups:
        ratio = group.mean(
            lambda run: (
                run.final["eval_perplexity"] / run.unigram_perplexity
                if run.unigram_perplexity and "eval_perplexity" in run.final
                else None
            )
        )
        rows.append(
            [
                group.label,
                str(len(group.runs)),
                _mean(group.final("eval_loss"), ".4f"),
                _mean(group.final("eval_perplexity"), ",.2f"),
                _mean(group.final("eval_accuracy"), ".4f"),
                _mean(ratio, ".3f"),
                _mean(group.mean(lambda run: run.step), ",.0f"),
                _mean(group.mean(lambda run: run.tokens), ",.0f"),
                _flops(group.flops.mean) if group.flops else "-",
            ]
        )
    head = ("run", "n", "loss", "perplexity", "accuracy", "of unigram", "steps", "tokens", "training FLOPs")
    legend = (
        "Of the last evaluation, on validation text: loss in nats per token, its exp, the part of the tokens predicted "
        "right; each token given its past alone. n: runs that differ in the seed only; the figures are their mean ± "
        "sample standard deviation. Of unigram: the perplexity over that of a model which knows the tokens' "
        "frequencies alone."
    )
    if any(not group.finished for group in groups):
        legend += " Runs that are not finished stand alone, with the last that they logged."
    return Table("Validation", "lrrrrrrrr", head, rows, legend)


def _infill(groups: Sequence[Group]) -> list[Table]:
    names = ("eval_infill_loss", "eval_infill_perplexity", "eval_infill_accuracy")
    rows = [
        [group.label, str(len(group.runs)), *(_mean(group.final(n), f) for n, f in zip(names, (".4f", ",.2f", ".4f")))]
        for group in groups
        if group.has_infill
    ]
    head = ("run", "n", "infill loss", "infill perplexity", "infill accuracy")
    return [Table("Infill (has seen the right neighbour)", "lrrrr", head, rows, INFILL)] if rows else []


def _cost(groups: Sequence[Group]) -> Table:
    rows = [
        [
            group.label,
            _mean(group.mean(lambda run: run.num_parameters), ",.0f"),
            _flops(group.first.flops_per_token) if group.first.flops_per_token else "-",
            _mean(group.on_its_machine(lambda run: run.tokens_per_second), ",.0f"),
            _mean(group.on_its_machine(lambda run: run.peak_memory_bytes), ",.2f", 2**30),
            _mean(group.on_its_machine(lambda run: run.seconds), ",.0f"),
            group.machine or "several, or not known",
        ]
        for group in groups
    ]
    kinds = {run.on_cpu for group in groups for run in group.runs if run.machine}
    memory = {
        frozenset({True}): "the resident set of the process, on a CPU",
        frozenset({False}): "GPU memory by torch's allocator, of the first process",
    }.get(frozenset(kinds), "GPU memory on a GPU, the resident set of the process on a CPU")
    head = ("run", "parameters", "FLOPs per token", "tokens/s", "peak memory, GiB", "training, s", "machine")
    legend = (
        "FLOPs per token: of training, forward and backward, per token of data. Tokens/s: the median of those logged. "
        f"Peak memory: {memory}. Training: without evaluations and checkpoints. Tokens/s, memory and time compare "
        "between runs on the same machine only."
    )
    return Table("Cost", "lrrrrrl", head, rows, legend)


def _against(verdicts: Sequence[Verdict]) -> Table:
    def cells(found: Difference | None, form: Callable[[float], str]) -> list[str]:
        if found is None:
            return ["-", "-", "-"]
        error = "" if found.error is None else f" ± {found.error:.4f}"
        return [form(found.place), _signed(found.loss, ".4f") + error, _signed(found.percent, ".2f") + " %"]

    rows = []
    for v in verdicts:
        ratios = [
            _number(v.ratios[n], ".2f") for n in ("flops_per_token", "tokens_per_second", "peak_memory", "seconds")
        ]
        at = [*cells(v.at_tokens, "{:,.0f}".format), *cells(v.at_flops, _flops)]
        rows.append([v.group.label, v.baseline.label, *at, *ratios])
    head = ["run", "against", "at equal tokens", "loss", "perplexity", "at equal FLOPs", "loss", "perplexity"]
    head += ["FLOPs per token, times", "tokens/s, times", "memory, times", "time, times"]
    legend = (
        "Below 0 is better than the baseline. Equal tokens, equal FLOPs: the most that both reached; before a run's "
        "end its loss is interpolated between evaluations. ± is the standard error of the difference, from two seeds "
        "each on. Times: the cost over the baseline's."
    )
    return Table("Against the baseline", "ll" + "r" * 10, head, rows, legend)


def _list_of_runs(groups: Sequence[Group]) -> Table:
    rows = []
    for run in (run for group in groups for run in group.runs):
        status = run.status + (f": {run.facts['reason']}" if run.facts.get("reason") else "")
        commit = str(run.facts.get("git_commit") or "-")[:9]
        seed = "-" if run.seed is None else str(run.seed)
        final = run.final.get("eval_perplexity")
        rows.append([str(run.folder), run.variant, seed, f"{run.step:,}", _number(final, ",.2f"), commit, status])
    return Table("Runs", "llrrrll", ("folder", "variant", "seed", "step", "perplexity", "commit", "status"), rows)


# --- the verdict in words ---------------------------------------------------------------------------------------------


def verdict_text(verdicts: Sequence[Verdict], groups: Sequence[Group]) -> list[str]:
    """Paragraphs: whether each group is better than the baseline, and what to mind in comparing them."""
    lines = []
    if not any(group.is_baseline and group.finished for group in groups):
        lines.append("No finished run of gpt2, the baseline, is among these: add one to compare with.")
    elif not verdicts:
        lines.append("No finished run of a variant is among these to compare with gpt2.")
    for v in verdicts:
        against = f"{v.group.label} against {v.baseline.label}: "
        if v.not_comparable:
            lines.append(" ".join([f"{against}their perplexities are not comparable: {v.not_comparable}.", *v.notes]))
            continue
        parts = []
        if v.at_tokens:
            parts.append(f"at equal data ({v.at_tokens.place:,.0f} training tokens) {_difference(v.at_tokens)}")
        if v.at_flops:
            same = v.at_tokens and _difference(v.at_flops) == _difference(v.at_tokens)
            found = "the same" if same else _difference(v.at_flops)
            parts.append(f"at equal cost ({_flops(v.at_flops.place)} training FLOPs) {found}")
        compared = "; ".join(parts) or "they have no evaluation in common"
        lines.append(" ".join([f"{against}{compared}.", *_certainty(v), *v.notes]))
    return lines + _warnings(groups)


def _difference(found: Difference) -> str:
    way = "lower" if found.loss < 0 else "higher"
    error = "" if found.error is None else f" ± {found.error:.4f}"
    return f"perplexity {abs(found.percent):.1f} % {way} (loss {_signed(found.loss, '.4f')}{error} nats)"


def _certainty(v: Verdict) -> list[str]:
    numbers = len(v.group.runs), len(v.baseline.runs)
    if min(numbers) < 2:
        seeds = "One seed each" if max(numbers) == 1 else f"{numbers[0]} and {numbers[1]} runs"
        return [f"{seeds}: a difference of one seed cannot be told from chance; train at least two of each."]
    words = []
    for name, found in (("equal data", v.at_tokens), ("equal cost", v.at_flops)):
        if found is not None:
            better = "better" if found.loss < 0 else "worse"
            clear = f"{better}, by more than two standard errors"
            words.append(f"at {name} {clear if found.clear else 'not told from chance (within two standard errors)'}")
    return [f"With {numbers[0]} and {numbers[1]} seeds: {'; '.join(words)}."] if words else []


def _warnings(groups: Sequence[Group]) -> list[str]:
    lines = []
    for group in groups:
        seeds = [run.seed for run in group.runs]
        if len(set(seeds)) < len(seeds):
            lines.append(f"{group.label}: a seed stands more than once; the spread is then not that of seeds.")
        if group.finished and group.machine is None:
            lines.append(f"{group.label}: no one machine is on record; time, speed and memory are left out.")
        if not group.finished:
            lines.append(f"{group.label}: not finished, and not compared.")
    return lines


# --- the charts -------------------------------------------------------------------------------------------------------


def _curve(group: Group, axis: str, records: str, key: str, style: drawing.Style) -> drawing.Line | None:
    """The mean of `key` over the group's runs, at the steps that all of them logged, and its band."""
    by_step: list[dict[int, tuple[float, float]]] = []
    for run in group.runs:
        logged = [(r, run.place(r, axis)) for r in getattr(run, records) if r.get(key) is not None]
        by_step.append({r["step"]: (place, r[key]) for r, place in logged if place is not None})
    steps = sorted(set.intersection(*map(set, by_step)))
    if not steps:
        return None
    x, y, low, high = [], [], [], []
    size = -(-len(steps) // MOST_POINTS)
    for first in range(0, len(steps), size):
        part = steps[first : first + size]
        places, values = ([fmean(found[step][n] for step in part) for found in by_step] for n in (0, 1))
        x.append(fmean(places))
        y.append(fmean(values))
        low.append(min(values))
        high.append(max(values))
    band = {"low": low, "high": high} if len(group.runs) > 1 else {}
    return drawing.Line(style, x, y, **band, marked=records == "evaluations")


@dataclass(frozen=True)
class _Chart:
    name: str
    title: str
    caption: str
    records: str
    key: str
    y_label: str
    log: bool = False
    of_infill: bool = False  # groups with infill, and their figures of it


CHARTS = (
    _Chart("loss", "Validation loss", "", "evaluations", "eval_loss", "nats per token"),
    _Chart("perplexity", "Validation perplexity", "", "evaluations", "eval_perplexity", "perplexity", log=True),
    _Chart("accuracy", "Validation accuracy", "", "evaluations", "eval_accuracy", "part predicted right"),
    _Chart("training", "Training loss", "", "training", "loss", "nats per token"),
    _Chart(
        "infill",
        "Infill perplexity: has seen the right neighbour",
        INFILL,
        "evaluations",
        "eval_infill_perplexity",
        "infill perplexity",
        log=True,
        of_infill=True,
    ),
    _Chart(
        "training-both",
        "Training loss of next token and infill together",
        "The mean over both streams, half of which has seen the right neighbour.",
        "training",
        "loss",
        "nats per prediction",
        of_infill=True,
    ),
)
AXIS_NAMES = {"tokens": "tokens", "steps": "steps", "time": "time", "flops": "FLOPs"}


def _charts_html(groups: Sequence[Group], styles: Sequence[drawing.Style]) -> str:
    figures = []
    for chart in CHARTS:
        shown = list(zip(groups, styles, strict=True))
        if chart.of_infill or chart.key == "loss":
            shown = [(group, style) for group, style in shown if group.has_infill == chart.of_infill]
        drawn = []
        for axis in comparison.AXES:
            found = (_curve(group, axis, chart.records, chart.key, style) for group, style in shown)
            lines = [line for line in found if line is not None]
            if not lines:
                continue
            scale, x_label = drawing.unit(axis, max(max(line.x) for line in lines))
            lines = [dataclasses.replace(line, x=[x / scale for x in line.x]) for line in lines]
            unigrams = {run.unigram_perplexity for group, _ in shown for run in group.runs}
            level = unigrams.pop() if chart.key == "eval_perplexity" and len(unigrams) == 1 else None
            with drawing.look():
                figure = drawing.chart(lines, x_label, chart.y_label, chart.log, level)
            svg = drawing.svg(figure, f"{chart.name}-{axis}", f"{chart.title} against {AXIS_NAMES[axis]}")
            drawn.append(f'<div class="on-{axis}">{svg}</div>')
        if drawn:
            caption = f"<p>{html.escape(chart.caption)}</p>" if chart.caption else ""
            title = f"<figcaption><h3>{html.escape(chart.title)}</h3>{caption}</figcaption>"
            figures.append(f"<figure>{title}{''.join(drawn)}</figure>")
    if not figures:
        return ""
    radios = "".join(
        f'<input type="radio" name="axis" id="axis-{axis}"{" checked" if n == 0 else ""}>'
        f'<label for="axis-{axis}">{AXIS_NAMES[axis]}</label>'
        for n, axis in enumerate(comparison.AXES)
    )
    legend = "".join(
        f"<li>{drawing.swatch(style)}{html.escape(group.label)}{_runs_of(group)}</li>"
        for group, style in zip(groups, styles, strict=True)
    )
    words = "A line of several runs is their mean, and the band reaches from the least of them to the greatest."
    many = f"<p>{words}</p>" if any(len(group.runs) > 1 for group in groups) else ""
    if len({group.machine for group in groups}) > 1:
        many += "<p>Against time the curves compare between runs on the same machine only.</p>"
    return (
        f'<section class="curves"><h2>Curves</h2><ul class="legend">{legend}</ul>{many}'
        f'<span class="against">against</span>{radios}<div class="grid">{"".join(figures)}</div></section>'
    )


def _runs_of(group: Group) -> str:
    return f" ({len(group.runs)} runs)" if len(group.runs) > 1 else ""


# --- the page ---------------------------------------------------------------------------------------------------------

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
    return "".join(f"#axis-{axis}:checked~.grid .on-{axis}{{display:block!important}}" for axis in comparison.AXES)


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)


@dataclass(frozen=True)
class _Learned:
    """The pictures of a model: a section of the page, and the same in words."""

    html: str
    lines: list[str]


def _learned(folder: Path, title: str, number: int) -> _Learned:
    """What the model in `folder` learned, or that there is nothing to show. Raises `UsageError`."""
    from .pictures import pictures_of

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


def write(folders: Sequence[Path], output_dir: Path | None = None) -> Report:
    """Write `report.html`, one page with all in it, and `report.md`.

    Args:
        folders: of runs, and of models, of which the pictures alone are drawn.
        output_dir: where to; by default `report` in the run's folder, or in the deepest folder that all are in; of
            one model, a folder beside it.

    Raises:
        UsageError: a line for each folder that holds neither a run nor a model, or for each of these models that cannot
            be read; or the report cannot be written, or matplotlib is missing.
    """
    drawing.need_matplotlib()
    runs, models = _read(folders)
    out = output_dir or _default_place(folders, is_model=not runs)
    if out.exists() and not out.is_dir():
        raise UsageError([f"--output_dir {out}: is a file; a folder is needed"])
    groups = comparison.make_groups(runs)
    verdicts = comparison.judge(groups)
    title = ", ".join(dict.fromkeys(group.first.variant for group in groups)) or "What a model learned"
    words = verdict_text(verdicts, groups) if len(runs) > 1 else []
    tables = [_against(verdicts)] if verdicts else []
    if groups:
        tables += [_quality(groups), *_infill(groups), _cost(groups), _list_of_runs(groups)]

    learned = _all_learned(_models(groups), models)
    parts = [f"# {_plain(title)}"]
    if words:
        parts += ["## Is it better?", *map(_plain, words)]
    parts += [table.markdown().rstrip() for table in tables]
    if learned:
        parts += ["## What the models learned", *(_plain(line) for model in learned for line in model.lines)]
    text = "\n\n".join(parts)
    page = _page(title, words, tables, groups, "".join(model.html for model in learned))
    try:
        for name, content in (("report.html", page), ("report.md", text + "\n")):
            write_aside(out / name, content)
    except OSError as err:
        raise UsageError([f"--output_dir {out}: cannot be written ({err.strerror}); give another folder"]) from err
    return Report(out / "report.html", out / "report.md", text)


def _page(title: str, words: Sequence[str], tables: Sequence[Table], groups: Sequence[Group], learned: str) -> str:
    styles = drawing.styles([group.is_baseline for group in groups])
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<section class="verdict"><h2>Is it better?</h2>{_paragraphs(words)}</section>' if words else "",
        *(table.html() for table in tables[:-1]),
        _charts_html(groups, styles),
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
                runs.append(comparison.read_run(folder))
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
