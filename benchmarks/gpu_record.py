"""What came of the items so far: kept as JSON, so that the next call goes on; and a page of it.

`on_gpu.json`: `facts` of the last call that did anything, `scale`, and `stages`: name -> item -> what
`gpu_process.answer_to` gave, with `seconds`, `commit` and `date`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import decode
import gpu_speed
import results_page
import throughput_page
from gpt2_variants.folders import write_aside
from gpt2_variants.registry import VARIANTS
from gpu_items import Day, Row, Stage
from results_page import Column, Table

NAME = "on_gpu"
TO_DO, DONE, FAILED, SKIPPED = "to do", "done", "failed", "skipped"
STATES = (DONE, FAILED, SKIPPED, TO_DO)


class Record:
    """The record in a folder; what is there already is read.

    Raises:
        ValueError: what is there is of another scale or device, or no record.
    """

    def __init__(self, folder: Path, day: Day, facts: dict[str, Any]):
        self.folder, self.day, self.facts = folder, day, facts
        self.path = folder / f"{NAME}.json"
        self._stages: dict[str, dict[str, dict[str, Any]]] = {}
        if not self.path.exists():
            return
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            scale, device = found["scale"], found["device"]
            self._stages = found["stages"]
        except (ValueError, KeyError, TypeError) as err:
            raise ValueError(f"{self.path}: cannot be read ({err!r}); take it away, or give another folder") from err
        for what, there, here in (("scale", scale, day.scale_name), ("device", device, facts["device"])):
            if there != here:
                raise ValueError(f"{self.path}: is of the {what} {there}, not {here}; give another --output_dir")

    def state(self, stage: str, item: str) -> str:
        """Return the state of an item: one of `STATES`."""
        return self._stages.get(stage, {}).get(item, {}).get("status", TO_DO)

    def why(self, stage: str, item: str) -> str:
        """Return why an item failed or was skipped."""
        return self._stages[stage][item].get("why", "")

    def forget(self, stage: str, states: Sequence[str] = STATES) -> None:
        """Have the items of a stage that are in one of `states` done again."""
        own = self._stages.get(stage, {})
        self._stages[stage] = {name: one for name, one in own.items() if one["status"] not in states}

    def note(self, stage: str, item: str, answer: dict[str, Any], seconds: float) -> None:
        """Put down what came of an item, and write the record."""
        stamp = {"seconds": round(seconds, 1), "commit": self.facts["commit"], "date": self.facts["date"]}
        self._stages.setdefault(stage, {})[item] = {**answer, **stamp}
        self.write()

    def write(self) -> None:
        """Write `on_gpu.json`."""
        found = {**self.facts, "scale": self.day.scale_name, "stages": self._stages}
        write_aside(self.path, json.dumps(found, indent=1) + "\n")

    def rows(self, stage: str) -> dict[str, list[Row]]:
        """Item -> its rows, of those that have any."""
        return {name: one["rows"] for name, one in self._stages.get(stage, {}).items() if one["rows"]}

    def write_pages(self, stages: Mapping[str, Stage]) -> None:
        """Write `on_gpu.md`; and throughput's and decode's own results, as far as there are figures for them."""
        overview, told = [], []
        for stage in stages.values():
            states = {item.name: self.state(stage.name, item.name) for item in stage.items(self.day)}
            counted = {state: list(states.values()).count(state) for state in STATES}
            overview.append({"stage": stage.name, "what": stage.what, **counted})
            told += [
                {"stage": stage.name, "item": name, "state": state, "why": self.why(stage.name, name)}
                for name, state in states.items()
                if state in (FAILED, SKIPPED)
            ]
        tables = [Table("Stages", [Column(key, key) for key in ("stage", "what", *STATES)], overview)]
        if told:
            columns = [Column(key, key) for key in ("stage", "item", "state", "why")]
            tables.append(Table("Failed or skipped", columns, told))
        for stage in stages.values():
            if rows := self.rows(stage.name):
                tables += [replace(table, title=f"{stage.name}: {table.title}") for table in stage.tables(rows)]
        parts = [f"# A day on this device\n\n{results_page.header(self.facts)}\n", *(f"{n}\n" for n in self._notes())]
        write_aside(self.folder / f"{NAME}.md", "\n".join([*parts, *(table.markdown() for table in tables)]))
        self._write_throughput()
        self._write_decode()

    def _notes(self) -> list[str]:
        notes = []
        if self.day.scale_name == "tiny":
            notes.append("**A rehearsal at toy size: it shows that everything runs, and its figures mean nothing.**")
        commits = {one["commit"] for own in self._stages.values() for one in own.values()}
        if len(commits) > 1:
            notes.append(f"Items are of several commits: {', '.join(sorted(str(c) for c in commits))}.")
        return notes

    def _write_throughput(self) -> None:
        """Write all variants, and the references beside gpt2 and duo_predict, in the form of throughput.py."""
        plan = gpu_speed.variants_plan(self.day)
        references = gpu_speed.references_plan(self.day)
        rows = gpu_speed.throughput_rows(plan, self.rows("variants"))
        compared = gpu_speed.throughput_rows(references, self.rows("references"))
        known = {row["case"] for row in rows}
        rows += [row for row in compared if row["case"] not in known]
        if rows:
            title, notes = "Throughput and memory of training", throughput_page.notes(plan, rows)
            notes.append(f"References: {references.rounds} rounds.")
            tables = throughput_page.tables(rows)
            results_page.write(self.folder, "throughput", title, self.facts, tables, [*self._notes(), *notes])
            throughput_page.chart(rows, self.folder / "throughput.png")

    def _write_decode(self) -> None:
        if rows := gpu_speed.decode_rows(self.rows("decoding")):
            notes = decode.notes(gpu_speed.decode_plan(self.day, list(VARIANTS)))
            tables = decode.tables(rows)
            results_page.write(self.folder, "decode", "Inference speed", self.facts, tables, [*self._notes(), *notes])
