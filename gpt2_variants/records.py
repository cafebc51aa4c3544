"""`run.json`, and what it tells of the machine and the packages."""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch


class RunRecord:
    """`run.json`: what the run is and how it stands. Replaced atomically at each change; only rank 0 writes."""

    def __init__(self, folder: Path, writes: bool):
        self.path = folder / "run.json"
        self._writes = writes
        self.facts: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}

    def update(self, **facts: Any) -> None:
        """Change `facts` and write the file."""
        self.facts.update(facts)
        self.write_json(self.path.name, self.facts)

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as `name` in the run's folder, whole or not at all."""
        if not self._writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = self.path.with_name(f".{name}.tmp")
        aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, self.path.with_name(name))


def versions() -> dict[str, str]:
    """Python and the packages that decide a run's results."""
    packages = ("torch", "transformers", "deepspeed", "datasets", "tokenizers")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def device_name() -> str:
    """The GPU's name, or the CPU's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({os.cpu_count()} cores)"
    return f"{platform.machine()} CPU ({os.cpu_count()} cores)"


def git_commit() -> str | None:
    """The commit of the package's own files, with "-dirty" where they differ from it; None outside a repository."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed package may lie in another's repository
        return git("describe", "--always", "--dirty", "--abbrev=40")
    return None
