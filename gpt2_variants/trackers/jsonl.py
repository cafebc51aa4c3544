"""`metrics.jsonl`, which every run writes."""

import json
from pathlib import Path
from typing import Any

from ..folders import write_aside


class JsonlTracker:
    """`metrics.jsonl`: one JSON object a line, flushed line by line; a resumed run goes on with no step twice."""

    def __init__(self, path: Path, resume_step: int):
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the half line of a killed process
                if record["step"] <= resume_step:
                    kept.append(line + "\n")
            write_aside(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def log(self, record: dict[str, Any]) -> None:
        """Write one line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order, without the half line of a killed process."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records
