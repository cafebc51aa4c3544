"""The report in a terminal: one table, at most 100 columns wide."""

import textwrap
from collections.abc import Sequence

from .differences import Difference, Verdict
from .groups import Group
from .tables import with_interval

WIDTH = 100
HEAD = ("run", "n", "loss", "at equal", "less the baseline's, nats [95 %]", "verdict")
AXIS = {"tokens": "tokens", "flops": "FLOPs", "time": "time"}


def terminal_table(groups: Sequence[Group], verdicts: Sequence[Verdict]) -> str:
    """Return a row for each group, and of its differences one below the other; long names go on in the lines below."""
    # of alternatives of one variant each has the differences that are of its own runs
    by_group = {
        group.label: [d for v in verdicts for d in v.differences if d.group.label == group.label] for group in groups
    }
    rows = []
    for group in groups:
        loss = group.final("eval_loss")
        cells = [str(len(group.runs)), "-" if loss is None else f"{loss.mean:.4f}"]
        below = [_difference(found) for found in by_group[group.label]] or [["-", "", ""]]
        if group.is_baseline:
            below = [["", "", "the baseline"]]
        for v in verdicts:
            if v.not_comparable and v.group.label == group.label:
                below = [["", "", "not comparable"]]
        rows.append((group.label, cells, below))
    columns = [[HEAD[1], *(cells[0] for _, cells, _ in rows)], [HEAD[2], *(cells[1] for _, cells, _ in rows)]]
    columns += [[HEAD[3 + n], *(part[n] for _, _, below in rows for part in below)] for n in range(3)]
    widths = [max(map(len, column)) for column in columns]
    longest = max(len(HEAD[0]), *(len(label) for label, _, _ in rows)) if rows else len(HEAD[0])
    first = min(longest, WIDTH - sum(widths) - 2 * len(widths))
    lines = [_line([HEAD[0], *HEAD[1:]], first, widths), "-" * (first + sum(widths) + 2 * len(widths))]
    for label, cells, below in rows:
        names = textwrap.wrap(label, first) or [""]
        for n in range(max(len(names), len(below))):
            name = names[n] if n < len(names) else ""
            found = below[n] if n < len(below) else ["", "", ""]
            lines.append(_line([name, *(cells if n == 0 else ["", ""]), *found], first, widths))
    return "\n".join(lines)


def _line(cells: Sequence[str], first: int, widths: Sequence[int]) -> str:
    name, *others = cells
    numbers = [cell.rjust(width) for cell, width in zip(others[:2], widths[:2], strict=True)]
    words = [cell.ljust(width) for cell, width in zip(others[2:], widths[2:], strict=True)]
    return "  ".join([name.ljust(first), *numbers, *words]).rstrip()


def _difference(found: Difference) -> list[str]:
    estimate = found.estimate
    return [AXIS[found.axis], with_interval(estimate.mean, estimate.low, estimate.high, ".4f"), found.word]
