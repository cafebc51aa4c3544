"""The picture of a report for a page such as a README: its forest plot at equal cost, and curves of validation loss.

    python benchmarks/picture.py benchmarks/results/amd-epyc-2-cores/compare.html      # writes compare.svg beside it

It is drawn from the figures that the report holds, by the report's own drawing, as one SVG for light and dark pages.
The curves are the baseline's and, spread from the best loss to the worst, as many more as stay apart in one chart.
Exit codes: 0 drawn, 2 faults in what was asked.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

import command_line
from gpt2_variants import drawing
from gpt2_variants.faults import UsageError

WIDTH, GAP, TITLE = 374.4, 24.0, 26.0  # of a figure, between two, and above one, in points
LEGEND = 19.0  # of a line of the legend
FONT = "font-family:system-ui,sans-serif"
CHARTS = {"tokens": "training tokens", "flops": "training FLOPs"}


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    head, _, rest = (__doc__ or "").partition("\n\n")
    parser = command_line.Parser(head, rest)
    parser.add_argument("page", type=Path, metavar="PAGE", help="a report.html, or another page that `report` wrote")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the SVG (default: beside the page, by its name)")
    return parser


def figures_of(page: Path) -> dict[str, Any]:
    """Return the figures that a report holds: its `runs` and its `differences`.

    Raises:
        UsageError: the page cannot be read, or holds none.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as err:
        raise UsageError([f"{page}: cannot be read ({err.strerror}); give a report.html"]) from err
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    if not found:
        raise UsageError([f"{page}: holds no figures; give a page that `python -m gpt2_variants report` wrote"])
    figures = json.loads(found[1])
    if not any(one["at_equal"] == "flops" for one in figures["differences"]):
        raise UsageError([f"{page}: compares nothing at equal cost; give a report of gpt2 and another variant"])
    return figures


def rows_of(differences: Sequence[dict[str, Any]]) -> list[drawing.Row]:
    """Return a row of the forest plot for each difference at equal cost."""
    return [
        drawing.Row(name_of(one["group"]), one["loss"], one["loss_low"], one["loss_high"], one["verdict"], "")
        for one in differences
        if one["at_equal"] == "flops" and one["loss"] is not None
    ]


def name_of(group: str) -> str:
    """Return a group's label without the length of its schedule, which the axis shows."""
    return re.sub(r", total_steps=\d+", "", group)


def curves_of(figures: dict[str, Any]) -> dict[str, list[drawing.Line]]:
    """Return the lines of each chart: axis of `CHARTS` -> a mean of validation losses over the seeds, in its band."""
    groups: dict[str, list[list[dict[str, Any]]]] = {}
    for run in figures["runs"]:
        if run["status"] == "finished" and run["evaluations"]:
            groups.setdefault(run["group"], []).append(run["evaluations"])
    whole = max(runs[0][-1]["tokens"] for runs in groups.values())
    # a schedule that ends earlier, at equal cost, is no curve to hold against the others
    groups = {name: runs for name, runs in groups.items() if runs[0][-1]["tokens"] == whole}
    baseline = figures["differences"][0]["baseline"]
    final = {name: fmean(run[-1]["eval_loss"] for run in runs) for name, runs in groups.items()}
    others = sorted(groups.keys() - {baseline}, key=final.__getitem__)
    shown = min(len(others), drawing.MOST_TOGETHER - 1)
    spread = [others[round(n * (len(others) - 1) / max(shown - 1, 1))] for n in range(shown)]
    names = [name for name in (baseline, *spread) if name in groups]
    styles = drawing.styles([name == baseline for name in names])
    return {
        axis: [_line(name, groups[name], axis, style) for name, style in zip(names, styles, strict=True)]
        for axis in CHARTS
    }


def _line(name: str, runs: Sequence[Sequence[dict[str, Any]]], axis: str, style: drawing.Style) -> drawing.Line:
    steps = sorted(set.intersection(*({record["steps"] for record in run} for run in runs)))
    at = [[record for record in run if record["steps"] in steps] for run in runs]
    losses = [[records[n]["eval_loss"] for records in at] for n in range(len(steps))]
    places = [fmean(records[n][axis] for records in at) for n in range(len(steps))]
    means, low, high = ([of(values) for values in losses] for of in (fmean, min, max))
    return drawing.Line(style, places, means, low, high, label=name_of(name), reference=style.colour == drawing.INK)


def picture(figures: dict[str, Any]) -> str:
    """Return the SVG: the forest plot at the left, the charts and what their lines are at the right."""
    baseline = figures["differences"][0]["baseline"]
    curves = curves_of(figures)
    with drawing.look():
        forest = drawing.forest(rows_of(figures["differences"]), "nats per token; to the left is better", baseline)
        charts = [drawing.chart(lines, CHARTS[axis], "validation loss, nats") for axis, lines in curves.items()]
    left = [(f"At equal training FLOPs: validation loss less {baseline}'s", drawing.svg(forest.figure, "forest", ""))]
    right = [
        (f"Validation loss against {CHARTS[axis]}", drawing.svg(drawn.figure, f"curves-{axis}", ""))
        for axis, drawn in zip(CHARTS, charts, strict=True)
    ]
    root = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg", role="img")
    root.set("xmlns:xlink", "http://www.w3.org/1999/xlink")
    root.set("aria-label", "A forest plot of differences with their intervals, and curves of validation loss")
    ElementTree.SubElement(root, "style").text = drawing.stylesheet()
    ElementTree.SubElement(root, "rect", width="100%", height="100%", rx="6", fill="var(--box)")
    bottoms = [_column(root, GAP, left), _column(root, 2 * GAP + WIDTH, right)]
    bottoms[1] = _legend(root, 2 * GAP + WIDTH, bottoms[1], next(iter(curves.values())))
    width, height = 3 * GAP + 2 * WIDTH, max(bottoms) + GAP / 2
    root.attrib |= {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}", "height": f"{height:g}"}
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _column(root: ElementTree.Element, x: float, figures: Sequence[tuple[str, str]]) -> float:
    """Put figures with their titles below one another; where they end."""
    y = 0.0
    for title, svg in figures:
        _text(root, x, y + TITLE - 5, title, "font-weight:600")
        drawn = ElementTree.fromstring(svg.replace(" href=", " xlink_href="))
        height = float(drawn.attrib["viewBox"].split()[3])
        drawn.attrib.pop("aria-label")
        drawn.attrib |= {"x": f"{x:g}", "y": f"{y + TITLE:g}", "width": f"{WIDTH:g}", "height": f"{height:g}"}
        for element in drawn.iter():  # outside of HTML a reference within an SVG is XLink's for older viewers
            if reference := element.attrib.pop("xlink_href", None):
                element.set("xlink:href", reference)
        root.append(drawn)
        y += TITLE + height
    return y


def _legend(root: ElementTree.Element, x: float, y: float, lines: Sequence[drawing.Line]) -> float:
    """Say what the lines are, two on a row, and that a band is of seeds; where it ends."""
    for n, line in enumerate(lines):
        left, middle = x + n % 2 * 0.6 * WIDTH, y + (n // 2 + 0.5) * LEGEND
        stroke = {"stroke": f"var(--{line.style.variable})", "stroke-width": "2.4"}
        ends = {"x1": f"{left:g}", "x2": f"{left + 22:g}", "y1": f"{middle:g}", "y2": f"{middle:g}"}
        ElementTree.SubElement(root, "line", **ends, **stroke)
        _text(root, left + 28, middle + 4, line.label, size="11.5")
    bottom = y + -(-len(lines) // 2) * LEGEND
    said = "Lines are means over the seeds, bands reach from least to greatest."
    _text(root, x, bottom + LEGEND - 5, said, size="11.5")
    return bottom + LEGEND


def _text(root: ElementTree.Element, x: float, y: float, words: str, style: str = "", size: str = "12.5") -> None:
    where = {"x": f"{x:g}", "y": f"{y:g}", "fill": "var(--ink)", "font-size": size}
    ElementTree.SubElement(root, "text", **where, style=f"{FONT};{style}".rstrip(";")).text = words


def parse(argv: list[str] | None = None) -> tuple[Path, dict[str, Any]]:
    """Return where the picture goes, and the figures that it is of.

    Raises:
        UsageError: the page cannot be read, or matplotlib is missing.
    """
    asked = make_parser().parse_args(argv)
    drawing.need_matplotlib()
    return asked.output or asked.page.with_suffix(".svg"), figures_of(asked.page)


def draw(plan: tuple[Path, dict[str, Any]]) -> int:
    """Write the picture, and say where it lies; the exit code."""
    path, figures = plan
    path.write_text(picture(figures), encoding="utf-8")
    print(path)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Draw what the command line asks for; the exit code."""
    return command_line.carry_out(parse, argv, draw)


if __name__ == "__main__":
    raise SystemExit(main())
