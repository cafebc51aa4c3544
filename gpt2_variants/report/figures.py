"""The figures of a page for other programs: as JSON within it, and as CSV files that it offers."""

import base64
import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from .differences import Verdict
from .groups import Group
from .runs import AXES

# "<" and ">" would end the script that JSON stands in, "&" may begin an entity, and the others end lines in JavaScript.
UNSAFE = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}


def as_json(groups: Sequence[Group], verdicts: Sequence[Verdict]) -> str:
    """Return runs with their evaluations, and the differences, as JSON that may stand in a script of a page.

    What is not a number is null.
    """
    found = {
        "runs": [_run(group, run) for group in groups for run in group.runs],
        "differences": _differences(verdicts),
    }
    return json.dumps(_finite(found), allow_nan=False).translate(UNSAFE)


def as_csv(groups: Sequence[Group], verdicts: Sequence[Verdict]) -> dict[str, str]:
    """Return name of a CSV file -> its text: the evaluations of all runs, and the differences where there are some."""
    evaluations = [
        {**{k: v for k, v in run.items() if k != "evaluations"}, **record}
        for group in groups
        for run in (_run(group, one) for one in group.runs)
        for record in run["evaluations"]
    ]
    files = {"evaluations.csv": evaluations, "differences.csv": _differences(verdicts)}
    return {name: _text(rows) for name, rows in files.items() if rows}


def download(text: str) -> str:
    """Return a `data:` URI of a CSV file."""
    return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"


def _run(group: Group, run: Any) -> dict[str, Any]:
    evaluations = [
        {axis: run.place(record, axis) for axis in AXES} | {k: v for k, v in record.items() if k.startswith("eval_")}
        for record in run.evaluations
    ]
    told = {"group": group.label, "variant": run.variant, "seed": run.seed, "folder": str(run.folder)}
    return {**told, "status": run.status, "evaluations": evaluations}


def _differences(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    return [
        {
            "group": found.group.label,
            "baseline": found.baseline.label,
            "at_equal": found.axis,
            "place": found.place,
            "loss": found.estimate.mean,
            "loss_low": found.estimate.low,
            "loss_high": found.estimate.high,
            "n": found.estimate.n,
            "paired": found.estimate.paired,
            "p": found.estimate.p,
            "p_adjusted": found.p_adjusted,
            "perplexity_percent": found.percent,
            "perplexity_percent_low": found.percent_low,
            "perplexity_percent_high": found.percent_high,
            "verdict": found.word,
        }
        for verdict in verdicts
        for found in verdict.differences
    ]


def _text(rows: list[dict[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
