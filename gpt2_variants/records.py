"""`run.json`, and what it tells of the machine and the packages.

Its schema, version 2 (version 1 had no number, and neither `plan` nor `asked`):

- `schema`: 2.
- `status`: running, finished, interrupted or failed; `reason`: why, in words, or null. A run whose process was killed
  says running for ever: `status_of` tells by `process` that it died.
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
  checkpoint, the seconds until the first step; `process`: of rank 0, as `processes.this_process` tells it (`pid`,
  `host`, `boot`, `namespace`, `started`); `rebuilt_from`: the checkpoint that this file was rebuilt from, where it was;
  `ended`, once there is a later one: with which status; `metrics_damaged`: how many lines of `metrics.jsonl` were no
  records and were dropped, `metrics_lost`: the steps whose records were lost with them, as in `logged`.
- `logged`: "training" and "evaluations" -> the steps up to the last checkpoint whose figures were logged, as ranges
  [first, last, every so many]: what `metrics.jsonl` must hold.
- `best`: step and figures of the best evaluation, with `--load_best_model_at_end`.
- `final_eval`, `train_seconds`: of a finished run, of the weights that were exported.

The manifest of each checkpoint holds the same as `record`, as it was when it was saved, but for `plan`, which stands
beside it: `config.recovered` rebuilds the file from there.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

from .folders import CHECKPOINTS, METRICS, TEMPORARY, holds_checkpoints, holds_nothing, write_aside
from .models.streams import Stream
from .processes import lives

SCHEMA = 2
_TEXT, _NUMBER, _WHOLE = (str, type(None)), (int, float, type(None)), (int, type(None))
# The types of those facts, and of those fields of a plan, that are read by their names.
_FACTS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys("status reason variant data data_fingerprint wandb_run_id wandb_url git_commit".split(), _TEXT),
    **dict.fromkeys("num_parameters flops_per_token unigram_perplexity train_seconds".split(), _NUMBER),
    **dict.fromkeys("plan asked options best hub versions variant_check logged".split(), (dict,)),
    **dict.fromkeys(("deepspeed_json", "final_eval"), (dict, type(None))),
    **dict.fromkeys("starts streams data_notes".split(), (list, type(None))),
    **dict.fromkeys(("schema", "not_finite_at"), _WHOLE),
}
_PLAN: dict[str, tuple[type, ...]] = {
    **dict.fromkeys("variant variant_file variant_code dataset tokenizer data size precision".split(), _TEXT),
    **dict.fromkeys(
        "world_size train_batch_size per_device_train_batch_size total_steps block_size seed".split(), _WHOLE
    ),
    **dict.fromkeys("model optimizer schedule numerics reading ds_config".split(), (dict, type(None))),
}
_JSON_NAMES = {dict: "an object", list: "a list", str: "text", int: "a whole number", float: "a number"}


class DamagedRecord(ValueError):
    """A `run.json` that is no record of a run: one line, with the cure. `why`: what is wrong with it."""

    def __init__(self, folder: Path, why: str):
        super().__init__(f"{folder}: run.json {why}; {cure(folder)}")
        self.why = why


class RunRecord:
    """`run.json`: what the run is and how it stands. Replaced atomically at each change; only rank 0 writes."""

    def __init__(self, folder: Path, writes: bool, facts: dict[str, Any] | None = None):
        """Take `facts`, or read those that stand in the folder, if any do. Raises ValueError as `read_facts`."""
        self.path = folder / "run.json"
        self._writes = writes
        if facts is None:
            facts = read_facts(folder) if self.path.exists() else {}
        self.facts: dict[str, Any] = facts

    def update(self, **facts: Any) -> None:
        """Change `facts` and write the file."""
        self.facts.update(facts)
        self.write_json(self.path.name, self.facts)

    def write_json(self, name: str, value: Any) -> None:
        """Write `value` as `name` in the run's folder, whole or not at all."""
        if self._writes:
            write_aside(self.path.with_name(name), json.dumps(value, indent=2) + "\n")


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the facts of the `run.json` in a run's folder.

    Raises:
        DamagedRecord: it is no record of a run.
        ValueError: the system does not let it be read; a line.
        FileNotFoundError: there is none.
    """
    try:
        content = (folder / "run.json").read_bytes()
    except FileNotFoundError:
        raise
    except IsADirectoryError as err:
        raise DamagedRecord(folder, "is a folder") from err
    except OSError as err:
        raise ValueError(
            f"{folder}: run.json cannot be read ({err.strerror}); give the permission, or leave the run out"
        ) from err
    if not content.strip(b"\0 \r\n\t"):
        raise DamagedRecord(folder, "is empty")
    try:
        facts = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as err:
        what = "is not text in UTF-8" if isinstance(err, UnicodeDecodeError) else f"cannot be read ({err})"
        raise DamagedRecord(folder, what) from err
    if why := fault_of_facts(facts):
        raise DamagedRecord(folder, why)
    return facts


def fault_of_facts(facts: Any) -> str | None:
    """Return in words, to stand after "run.json", what keeps a value of JSON from being a run's record, or None."""
    if not isinstance(facts, dict):
        return f"holds no JSON object, but {_in_json(facts)}"
    if not facts:
        return None
    plan = facts.get("plan", {})
    for types, values, where in ((_FACTS, facts, ""), (_PLAN, plan if isinstance(plan, dict) else {}, "plan.")):
        for name, allowed in types.items():
            value = values.get(name)
            if name in values and (not isinstance(value, allowed) or isinstance(value, bool)):
                return f"says {where}{name} is {_in_json(value)}, where {_JSON_NAMES[allowed[0]]} is needed"
    for name in ("starts", "streams"):
        for entry in facts.get(name) or ():
            if not isinstance(entry, dict) or (name == "streams" and not {"name", "title", "caveat"} <= entry.keys()):
                return f"has an entry of {name} that is none"
    return None


def _in_json(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else _JSON_NAMES[type(value)]


def cure(folder: Path) -> str:
    """Return what to do about a `run.json` that is damaged or gone."""
    if holds_checkpoints(folder):
        again = f"--resume_from_checkpoint auto --output_dir {shlex.quote(str(folder))}"
        return f"train_ds.py {again} rebuilds it from the newest checkpoint, or leave the run out"
    return "restore it, or leave the run out"


def status_of(facts: dict[str, Any]) -> str:
    """Return how a run stands, by its record: as `status` says, but "died" where the process that was running is gone.

    Of a process on another host, which cannot be asked, "running (on HOST)".
    """
    status = str(facts.get("status", "of unknown status"))
    starts = facts.get("starts") or [{}]
    process = starts[-1].get("process")
    if status != "running" or not isinstance(process, dict):
        return status
    alive = lives(process)
    if alive is None:
        return f"running (on {process.get('host')})"
    return status if alive else "died"


def never_began(folder: Path) -> bool:
    """Return whether the run in `folder` ended before its first step, so that there is nothing of it to go on with."""
    metrics = folder / METRICS
    checkpoints = (folder / CHECKPOINTS).glob("*")
    if (metrics.is_file() and not holds_nothing(metrics)) or any(not p.name.startswith(TEMPORARY) for p in checkpoints):
        return False
    try:
        return read_facts(folder).get("status") in ("failed", "running")
    except DamagedRecord:
        record = folder / "run.json"
        return record.is_file() and holds_nothing(record)
    except (OSError, ValueError):
        return False


def asked_options(facts: dict[str, Any]) -> dict[str, Any]:
    """Option -> value, what was asked of a run; of schema 1, which does not tell, all options that have a value."""
    if "asked" in facts:
        return dict(facts["asked"])
    options = facts.get("options")
    return {k: v for k, v in options.items() if v is not None} if isinstance(options, dict) else {}


def recorded_streams(facts: dict[str, Any]) -> list[Stream]:
    """Return the `streams` of a run's record; none of an older one."""
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
    """Return the GPU's name, or the CPU's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({os.cpu_count()} cores)"
    return f"{platform.machine()} CPU ({os.cpu_count()} cores)"


def git_commit() -> str | None:
    """Return the commit of the package's files, with "-dirty" where they differ from it; None outside a repository."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed package may lie in another's repository
        return git("describe", "--always", "--dirty", "--abbrev=40")
    return None
