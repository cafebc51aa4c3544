"""The tables of a report, for its page and as Markdown."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .differences import Difference, Verdict
from .groups import Group, Mean, streams_of

MEASURES = {"tokens": "tokens", "flops": "FLOPs", "time": "seconds"}  # that groups are compared at
FIGURES = {"loss": ".4f", "perplexity": ",.2f", "accuracy": ".4f"}  # of a stream, and their forms


@dataclass(frozen=True)
class Table:
    """A table of the report; `legend` says how to read it. `align` has l or r for each column."""

    title: str
    align: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    legend: str = ""

    def markdown(self) -> str:
        """Return the table as Markdown, with its heading and legend."""
        rules = ["---:" if side == "r" else "---" for side in self.align]
        rows = [self.head, rules, *([plain(cell).replace("|", "\\|") for cell in row] for row in self.rows)]
        text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"## {plain(self.title)}\n\n{text}\n" + (f"\n{plain(self.legend)}\n" if self.legend else "")


def plain(text: str) -> str:
    """Return the text on one line, such that nothing in it is taken for HTML."""
    return " ".join(text.replace("<", "&lt;").split())


def number(value: float | None, form: str) -> str:
    """Return `value` by the format `form`; a dash where there is none."""
    return "-" if value is None else format(value, form)


def _mean_in_interval(value: Mean | None, form: str) -> str:
    """Return what `_mean` does, with the 95 % interval of the mean."""
    if value is None or not value.interval:
        return _mean(value, form)
    low, high = value.interval
    return f"{_mean(value, form)} [{low:{form}}, {high:{form}}]"


def _mean(value: Mean | None, form: str, scale: float = 1.0) -> str:
    if value is None:
        return "-"
    # counts are the same for every seed; of figures that would be a chance too small to see
    spread = "" if not value.sd else f" ± {value.sd / scale:{form}}"
    return f"{value.mean / scale:{form}}{spread}"


def signed(value: float, form: str) -> str:
    """Return `value` by the format `form`, with its sign."""
    return format(value, f"+{form}").replace("-", "\N{MINUS SIGN}")


def with_interval(value: float | None, low: float | None, high: float | None, form: str) -> str:
    """Return a signed difference and its interval, "+0.2 [-0.1, +0.5]"; a dash where there is no interval."""
    if value is None or low is None or high is None:
        return "-"
    return f"{signed(value, form)} [{signed(low, form)}, {signed(high, form)}]"


def p_text(p: float) -> str:
    """Such as "p = 0.012", or "p < 0.001"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def flops_text(value: float) -> str:
    """Return a number of FLOPs, to four digits."""
    return re.sub(r"e\+0*", "e", f"{value:.4g}")


def quality_table(groups: Sequence[Group]) -> Table:
    """Return the figures of each group's last evaluation."""
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
                _mean_in_interval(group.final("eval_loss"), ".4f"),
                _mean_in_interval(group.final("eval_perplexity"), ",.2f"),
                _mean_in_interval(group.final("eval_accuracy"), ".4f"),
                _mean(ratio, ".3f"),
                _mean(group.mean(lambda run: run.step), ",.0f"),
                _mean(group.mean(lambda run: run.tokens), ",.0f"),
                flops_text(group.flops.mean) if group.flops else "-",
            ]
        )
    head = ("run", "n", "loss", "perplexity", "accuracy", "of unigram", "steps", "tokens", "training FLOPs")
    legend = (
        "The figures are of the last evaluation on validation text: the loss in nats per token, its exponential, and "
        "the share of tokens that are predicted right, each from its past alone. n is the number of runs, which differ "
        "in the seed only; the figures are their mean ± sample standard deviation, and in brackets the 95 % interval "
        "of the mean by Student's t. Of unigram: the perplexity over that of a model which knows only how frequent "
        "each token is."
    )
    if any(not group.finished for group in groups):
        legend += " A run that is not finished stands by itself, with the last figures that it logged."
    return Table("Validation", "lrrrrrrrr", head, rows, legend)


def stream_tables(groups: Sequence[Group]) -> list[Table]:
    """Return a table per stream beside the next-token one, of the groups that have it, with title and caveat."""
    tables = []
    for stream in streams_of(groups):
        figures = [(f"eval_{stream.name}_{name}", form) for name, form in FIGURES.items()]
        rows = [
            [group.label, str(len(group.runs)), *(_mean(group.final(name), form) for name, form in figures)]
            for group in groups
            if stream in group.streams
        ]
        head = ("run", "n", *(f"{stream.name} {name}" for name in FIGURES))
        tables.append(Table(stream.title, "lrrrr", head, rows, stream.caveat))
    return tables


def cost_table(groups: Sequence[Group]) -> Table:
    """Return what each group's model and training cost."""
    rows = [
        [
            group.label,
            _mean(group.mean(lambda run: run.num_parameters), ",.0f"),
            flops_text(group.first.flops_per_token) if group.first.flops_per_token else "-",
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
        "FLOPs per token are those of training, forward and backward, per token of data. Tokens/s is the median of "
        f"those logged. Peak memory is {memory}. The time of training leaves out evaluations and checkpoints. Compare "
        "tokens/s, memory and time of runs on the same machine only."
    )
    return Table("Cost", "lrrrrrl", head, rows, legend)


def against_tables(verdicts: Sequence[Verdict]) -> list[Table]:
    """Return each group's differences from its baseline, and its cost over the baseline's; none without verdicts."""
    if not verdicts:
        return []
    rows = [
        [v.group.name, v.baseline.name, MEASURES[found.axis], *_difference_cells(found)]
        for v in verdicts
        for found in v.differences
    ]
    head = ("run", "against", "at equal", "place", "seeds", "loss, nats", "perplexity", "p", "verdict")
    legend = (
        "Below 0 is better than the baseline. Both are compared at the most tokens, training FLOPs or seconds of "
        "training on the same machine that both reached; of groups that differ in the length of their schedule alone, "
        "those are taken whose ends lie nearest to one another. Cut means that a run is read before the end of its "
        "schedule, its loss interpolated between evaluations. In brackets stands the 95 % interval over the seeds: by "
        "Student's t of the differences between pairs of one seed, where both saw the same data in the same order, "
        "else by Welch's t. p is that of no difference, adjusted by Holm for all comparisons of this table at one "
        "measure; below 0.05 the verdict is better or worse."
    )
    costs = ("flops_per_token", "tokens_per_second", "peak_memory", "seconds")
    ratios = [[v.group.name, v.baseline.name, *(number(v.ratios[cost], ".2f") for cost in costs)] for v in verdicts]
    cost_head = ("run", "against", "FLOPs per token", "tokens/s", "memory", "time")
    return [
        Table("Against the baseline", "lllrlrrrl", head, rows, legend),
        Table(
            "Times the baseline's cost", "llrrrr", cost_head, ratios, "1.50 means half as much again as the baseline."
        ),
    ]


def _difference_cells(found: Difference) -> list[str]:
    estimate = found.estimate
    place = flops_text(found.place) if found.axis == "flops" else f"{found.place:,.0f}"
    if not found.at_the_end:
        place += ", cut"
    seeds = f"{estimate.n} pairs" if estimate.paired else f"{len(found.group.runs)} and {len(found.baseline.runs)}"
    percent = with_interval(found.percent, found.percent_low, found.percent_high, ".2f")
    return [
        place,
        seeds,
        with_interval(estimate.mean, estimate.low, estimate.high, ".4f"),
        percent if percent == "-" else f"{percent} %",
        "-" if found.p_adjusted is None else p_text(found.p_adjusted).lstrip("p= "),
        found.word,
    ]


def table_of_runs(groups: Sequence[Group]) -> Table:
    """Return a table of every run, with its folder and status."""
    rows = []
    for run in (run for group in groups for run in group.runs):
        status = run.status + (f": {run.facts['reason']}" if run.facts.get("reason") else "")
        status += f"; {run.damage}" if run.damage else ""
        commit = str(run.facts.get("git_commit") or "-")[:9]
        seed = "-" if run.seed is None else str(run.seed)
        final = run.final.get("eval_perplexity")
        rows.append([str(run.folder), run.variant, seed, f"{run.step:,}", number(final, ",.2f"), commit, status])
    return Table("Runs", "llrrrll", ("folder", "variant", "seed", "step", "perplexity", "commit", "status"), rows)
