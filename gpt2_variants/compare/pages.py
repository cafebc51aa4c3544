"""What an experiment adds to the page of its report: how the rates were chosen, and the ladder of sizes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import drawing
from ..report import Section, write
from ..report.runs import SavedRun
from ..report.tables import Table
from .experiment import Entry, Experiment, Trial, Unit
from .ladder import Point, PowerLaw, multiplier
from .state import FINISHED, finished_run, state
from .tuning import Choice


def write_report(experiment: Experiment, choices: Mapping[Unit, Choice]) -> None:
    """Write the report on the finished runs, and print where it is. Raises `UsageError`."""
    folders = result_folders(experiment)
    if not folders:
        print("no run is finished yet: there is nothing to report")
        return
    sections = [*_tuning(choices), *_ladder(experiment)]
    report = write(folders, experiment.output_dir / "report", sections, _about(experiment, choices))
    print(f"\n{report.terminal}\n")
    print(f"page        {report.page}")
    print(f"table       {report.table}")


def result_folders(experiment: Experiment) -> list[Path]:
    """Return the folders of the finished runs that are reported, in the order of entries, sizes and seeds."""
    trials = (
        Trial(entry, size, seed, purpose=purpose)
        for size, entry in experiment.units
        for purpose in experiment.equal
        for seed in experiment.seeds
    )
    folders = (experiment.output_dir / trial.folder for trial in trials)
    return [folder for folder in folders if state(folder) == FINISHED]


def _about(experiment: Experiment, choices: Mapping[Unit, Choice]) -> list[tuple[str, str]]:
    seeds = f"{', '.join(map(str, experiment.seeds))}; the same for every variant, so that differences pair"
    rows = [("command", experiment.command), ("seeds", seeds)]
    if choices:
        tuned = ", ".join(map(str, experiment.tuning_seeds))
        tried = sorted({rate for choice in choices.values() for rate in choice.losses})
        rates = ", ".join(f"{rate:g}" for rate in tried)
        rows.append(("learning rate", f"each variant's best of {rates} on seed {tuned}, which is not reported"))
    else:
        rows.append(("learning rate", "the same for every variant, chosen for none of them here"))
    if experiment.tokens_per_parameter is not None:
        rows.append(("length", f"{experiment.tokens_per_parameter:g} training tokens per parameter of GPT-2"))
    return rows


def _tuning(choices: Mapping[Unit, Choice]) -> list[Section]:
    if not choices:
        return []
    sizes = list(dict.fromkeys(size for size, _ in choices))
    return [_tuning_at(size, {e: c for (s, e), c in choices.items() if s == size}) for size in sizes]


def _tuning_at(size: str | None, choices: Mapping[Entry, Choice]) -> Section:
    rates = sorted({rate for choice in choices.values() for rate in choice.losses})
    rows, edges = [], []
    for entry, choice in choices.items():
        cells = [_loss(choice.losses.get(rate), rate == choice.rate) for rate in rates]
        rows.append([entry.label, *cells, "-" if choice.rate is None else f"{choice.rate:g}"])
        edges += [entry.label] if choice.edge else []
    words = (
        "Every variant was tried at the same learning rates on the same seed, which is not reported. It is reported at "
        "the rate of its lowest validation loss."
    )
    paragraphs = [words]
    if edges:
        paragraphs.append(f"The best rate of {', '.join(edges)} lies at the edge of what was tried.")
    name = f"tuning{f'-{size}' if size else ''}"
    title = f"The learning rate of each{f', at {size}' if size else ''}"
    head = ("variant", *(f"{rate:g}" for rate in rates), "chosen")
    legend = "Validation loss in nats per token by learning rate; * is the lowest. Diverged: the loss was not finite."
    table = Table(f"{title}: losses", "l" + "r" * (len(rates) + 1), head, rows, legend)
    chart = _rate_chart(choices, rates)
    return Section(title, paragraphs, [table], [(name, "Validation loss over the learning rate", "", chart)])


def _loss(value: float | None, best: bool) -> str:
    if value is None:
        return "-"
    return "diverged" if math.isinf(value) else f"{value:.4f}{' *' if best else ''}"


def _rate_chart(choices: Mapping[Entry, Choice], rates: Sequence[float]) -> Any:
    styles = drawing.styles([entry.is_baseline for entry in choices])
    with drawing.look():
        figure, axes = drawing.new_axes()
        for (entry, choice), style in zip(choices.items(), styles, strict=True):
            points = [(rate, choice.losses[rate]) for rate in rates if math.isfinite(choice.losses.get(rate, math.inf))]
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.plot(x, y, color=style.colour, linestyle=style.dash, marker=style.marker, label=entry.label)
        axes.set(xscale="log", xlabel="peak learning rate", ylabel="nats per token")
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.grid(True)
    return figure


def _ladder(experiment: Experiment) -> list[Section]:
    if len(experiment.sizes) < 2:
        return []
    points = {entry: _points(experiment, entry) for entry in experiment.entries}
    baseline = points[experiment.baseline]
    if not any(len(of_seed) > 1 for of_seed in baseline.values()):
        return [Section("The ladder of sizes", ["GPT-2 is not finished at two sizes of one seed yet."])]
    rows, sentences = [], []
    for entry in experiment.entries[1:]:
        try:
            found = multiplier(baseline, points[entry])
        except ValueError as err:
            sentences.append(f"{entry.label}: {err}.")
            continue
        cells = [_times(found.by_size.get(size)) for size in experiment.sizes if size]
        rows.append([entry.label, *cells, _per_tenfold(found.growth)])
        sentences += [_said(entry, found.growth)]
        if found.beyond:
            sentences.append(
                f"At {', '.join(found.beyond)} a loss of {entry.label} is lower than any of GPT-2's; there GPT-2's "
                "line is extended beyond its last run."
            )
    law = PowerLaw.fit([point for of_seed in baseline.values() for point in of_seed.values()])
    words = (
        f"GPT-2's validation loss falls as its compute to the power {law.exponent:.3f}, fitted over all its runs. The "
        "compute multiplier is how many times a variant's compute GPT-2 needs for the same loss, by the line through "
        "GPT-2's runs of the same seed: above 1 the variant saves compute."
    )
    if len(experiment.sizes) == 2:
        words += (
            " Any line fits two sizes: that the law is a line is an assumption, which the intervals do not include."
        )
    head = ("variant", *(size for size in experiment.sizes if size), "per tenfold compute")
    legend = (
        "The multiplier of each variant by itself, with its 95 % interval over the seeds (Student's t of the "
        "logarithm); the last column says how it changes with size."
    )
    table = Table("Compute multiplier", "l" + "r" * (len(head) - 1), head, rows, legend)
    figure = ("ladder", "Validation loss over training FLOPs", "One point a run.", _ladder_chart(points, law))
    return [Section("The ladder of sizes", [words, *sentences], [table], [figure])]


def _points(experiment: Experiment, entry: Entry) -> dict[int, dict[str, Point]]:
    """Return seed -> size -> FLOPs and loss of the finished runs of `entry` at equal tokens."""
    found: dict[int, dict[str, Point]] = {}
    for size in experiment.sizes:
        for seed in experiment.seeds:
            run = finished_run(experiment.output_dir / Trial(entry, size, seed).folder)
            if run is not None and size and (point := _point(run)):
                found.setdefault(seed, {})[size] = point
    return found


def _point(run: SavedRun) -> Point | None:
    flops, loss = run.place({"step": run.step}, "flops"), run.final.get("eval_loss")
    return (flops, loss) if flops and loss else None


def _times(found: Any) -> str:
    if found is None:
        return "-"
    if found.low is None:
        return f"{math.exp(found.mean):.3f} (one seed)"
    return f"{math.exp(found.mean):.3f} [{math.exp(found.low):.3f}, {math.exp(found.high):.3f}]"


def _per_tenfold(growth: Any) -> str:
    if growth is None:
        return "-"
    ends = [growth.mean, *([growth.low, growth.high] if growth.low is not None else [])]
    mean, *interval = (f"{10**end:.3f}" for end in ends)  # the slope is that of logarithms
    return f"x {mean}" + (f" [{', '.join(interval)}]" if interval else " (one seed)")


def _said(entry: Entry, growth: Any) -> str:
    if growth is None or growth.low is None:
        return f"{entry.label}: too few seeds or sizes to tell whether its multiplier changes with size."
    if growth.low <= 0 <= growth.high:
        return f"{entry.label}: no change of its multiplier with size was found ({_per_tenfold(growth)} per tenfold)."
    way = "grows" if growth.mean > 0 else "shrinks"
    return f"{entry.label}: its multiplier {way} with size ({_per_tenfold(growth)} for ten times the compute)."


def _ladder_chart(points: Mapping[Entry, Mapping[int, Mapping[str, Point]]], law: PowerLaw) -> Any:
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    styles = drawing.styles([entry.is_baseline for entry in points])
    with drawing.look():
        figure, axes = drawing.new_axes()
        ends: list[float] = []
        for (entry, of_seeds), style in zip(points.items(), styles, strict=True):
            found = sorted(point for of_seed in of_seeds.values() for point in of_seed.values())
            x, y = zip(*found, strict=True) if found else ((), ())
            ends += x
            axes.plot(x, y, color=style.colour, linestyle="none", marker=style.marker, label=entry.label)
        span = [min(ends), max(ends)]
        axes.plot(span, [law.loss(x) for x in span], color=drawing.INK, linewidth=1.0)
        axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="nats per token")
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(True)
    return figure
