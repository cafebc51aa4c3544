"""What every benchmark writes: its figures as JSON and as a Markdown page, headed by what they were measured on.

A benchmark takes `facts()` before it measures, and hands them with its tables to `write`. The files of one device lie
in one folder under `benchmarks/results/`.
"""

import datetime
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt2_variants.records import device_name, versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        key: of the value in a row.
        head: what stands above it, with the unit.
        format: how Python formats the value, as in ",.0f"; "" as it is.
        scale: what a number is multiplied by before it is shown; the JSON keeps it as it is.
    """

    key: str
    head: str
    format: str = ""
    scale: float = 1

    def show(self, row: dict[str, Any]) -> str:
        """Return the value of `row` as text; "-" where there is none."""
        value = row.get(self.key)
        if value is None:
            return "-"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            value = value * self.scale
        elif self.format:
            raise TypeError(f"column {self.key}: a number is needed for the format {self.format!r}, not {value!r}")
        return format(value, self.format).replace("|", "\\|")


@dataclass(frozen=True)
class Table:
    """A table of a results page.

    Attributes:
        title: its heading.
        columns: which of the rows' values are shown, from left to right.
        rows: key -> value each; the JSON has all of them, shown or not.
        legend: how to read it; stands below it.
    """

    title: str
    columns: Sequence[Column]
    rows: Sequence[dict[str, Any]]
    legend: str = ""

    def markdown(self) -> str:
        """Return the table with its heading and legend."""
        numbers = [all(isinstance(r.get(c.key), (int, float, type(None))) for r in self.rows) for c in self.columns]
        lines = [
            [c.head for c in self.columns],
            ["---:" if number else "---" for number in numbers],
            *([c.show(row) for c in self.columns] for row in self.rows),
        ]
        text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        return f"## {self.title}\n\n{text}\n" + (f"\n{self.legend}\n" if self.legend else "")


def facts() -> dict[str, Any]:
    """Return what figures depend on and a reader has to know: commit, device, versions, threads, date and command.

    `commit` is None outside a git checkout. `dirty` says that something other than results differed from the commit.
    """
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", ".", ":!benchmarks/results")),
        "device": device_name(),
        "versions": versions() | ({"cuda": torch.version.cuda} if torch.cuda.is_available() else {}),
        "threads": torch.get_num_threads(),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def folder(device: str) -> Path:
    """Return the folder of a device's results: `benchmarks/results/<its name in small letters and dashes>`."""
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def header(facts: dict[str, Any]) -> str:
    """Return `facts` as Markdown."""
    commit = facts["commit"] or "not a git checkout"
    state = " with changes that are not committed (dirty)" if facts["dirty"] else ""
    packages = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return "\n".join(
        (
            f"- command: `{facts['command']}`",
            f"- commit: {commit}{state}",
            f"- device: {facts['device']}, {facts['threads']} CPU threads",
            f"- versions: {packages}",
            f"- date: {facts['date']}",
        )
    )


def write(
    folder: Path, name: str, title: str, facts: dict[str, Any], tables: Sequence[Table], notes: Sequence[str] = ()
) -> None:
    """Write `<name>.json` and `<name>.md` in `folder`, which is made if need be.

    The JSON holds `facts` and, under "tables", the rows of each table by its title; the page the same with `notes`,
    each a paragraph, below the header.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {**facts, "notes": list(notes), "tables": {table.title: list(table.rows) for table in tables}}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    parts = [f"# {title}\n\n{header(facts)}\n", *(f"{note}\n" for note in notes), *(t.markdown() for t in tables)]
    (folder / f"{name}.md").write_text("\n".join(parts), encoding="utf-8")
