"""`run.json`, and what it tells of the machine and the packages.

Its schema, version 2 (version 1 had no number, and neither `plan` nor `asked`):

- `schema`: 2.
- `status`: running, finished, interrupted or failed; `reason`: why, in words, or null.
- `not_finite_at`: the step whose loss was not finite, of a run that ended by it; else null.
- `plan`: what the run is, every field of `config.plan.Plan` with its value.
- `asked`: option -> value, what was asked for on the command line, and the preset.
- `options`: all options with their values as resolved; `deepspeed_json`: the DeepSpeed JSON as it was given.
- `streams`: what the variant declares of its streams of predictions beside the next-token one, each with `name`,
  `title`, `caveat` and `sees_ahead`; missing in older records.
- `variant_check`: of a variant from a user's file, promise -> how it was answered before the first step.
- `variant`, `data`, `data_fingerprint`, `num_parameters`, `flops_per_token`: of the plan.
- `data_notes`: which files were read and which were not, the column taken, what was dropped.
- `wandb_run_id`, `wandb_url`: of the run on W&B, the latter where it is online.
- `unigram_perplexity`, `versions`, `git_commit`: of the data, the packages and the code.
- `starts`: one entry for each session: `time`, `world_size`, `device`, `resumed_from`, what `changed` since the
  checkpoint, and the seconds until the first step.
- `best`: step and figures of the best evaluation, with `--load_best_model_at_end`.
- `final_eval`, `train_seconds`: of a finished run, of the weights that were exported.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from .folders import write_aside
from .models.streams import Stream

SCHEMA = 2


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
        if self._writes:
            write_aside(self.path.with_name(name), json.dumps(value, indent=2) + "\n")


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts of the `run.json` in a run's folder.

    Raises:
        ValueError: it is no JSON object; says what to do.
        OSError: it cannot be read.
    """
    try:
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise ValueError(f"{folder}: run.json cannot be read ({err}); restore it, or leave the run out") from err
    if not isinstance(facts, dict):
        raise ValueError(f"{folder}: run.json holds no JSON object; restore it, or leave the run out")
    return facts


def never_began(folder: Path) -> bool:
    """Whether the run in `folder` ended before its first step, so that there is nothing of it to go on with."""
    try:
        status = read_facts(folder).get("status")
    except (OSError, ValueError):
        return False
    metrics = folder / "metrics.jsonl"
    trained = (metrics.is_file() and metrics.stat().st_size > 0) or any((folder / "checkpoints").glob("*"))
    return status in ("failed", "running") and not trained


def asked_options(facts: dict[str, Any]) -> dict[str, Any]:
    """Option -> value, what was asked of a run; of schema 1, which does not tell, all options that have a value."""
    if "asked" in facts:
        return dict(facts["asked"])
    options = facts.get("options")
    return {k: v for k, v in options.items() if v is not None} if isinstance(options, dict) else {}


def recorded_streams(facts: dict[str, Any]) -> list[Stream]:
    """The `streams` of a run's record; none of an older one."""
    told = facts.get("streams") or []
    return [Stream(of["name"], of["title"], of["caveat"], of.get("sees_ahead", 0)) for of in told]


def versions() -> dict[str, str]:
    """Python, this package, and the packages that decide a run's results."""
    packages = ("torch", "transformers", "deepspeed", "datasets", "tokenizers")
    # a checkout that is not installed has no metadata
    own = importlib.import_module(__package__)
    known = {"python": platform.python_version(), own.__name__: own.__version__}
    return known | {name: importlib.metadata.version(name) for name in packages}


def device_name() -> str:
    """The GPU's name, or the CPU's."""
    import torch

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
