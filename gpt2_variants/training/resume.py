"""Which checkpoint a run goes on from, if it may, and what is different from there on."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.options import Options
from ..config.plan import SHARE, TOLD_ELSEWHERE, Plan, as_dict
from ..config.recovered import facts_of_run
from ..faults import UsageError
from ..folders import CHECKPOINTS
from ..ranks import decided_by_rank_0
from ..records import status_of
from ..words import counted
from . import checkpoint

# Parameters of a schedule that other fields of a plan tell too.
_OF_SCHEDULE = ("warmup_max_lr", "warmup_num_steps", "total_num_steps")
# The option by which each part of the identity is asked for, where its name does not say it.
_ASKED_BY = {"precision": "bf16", "optimizer": "deepspeed_config", "data": "dataset", "variant_code": "variant"}


@dataclass(frozen=True)
class Start:
    """Where a session of training begins.

    Attributes:
        checkpoint: what it goes on from; None: from the beginning.
        step: optimizer steps done there.
        sharding: how the optimizer's states were cut into files there.
        changes: a line for each thing that is different from there on.
        logged: of a checkpoint of this very run, the steps whose figures were logged until then; None: not known.
    """

    checkpoint: Path | None = None
    step: int = 0
    sharding: dict[str, int] | None = None
    changes: tuple[str, ...] = ()
    logged: dict[str, Any] | None = None


def agree_on_start(options: Options, plan: Plan) -> Start:
    """Return where to begin, which rank 0 chooses and verifies; it says what changes. All ranks raise `UsageError`."""
    return decided_by_rank_0(lambda: _choose(options, plan)) if options.resumes else Start()


def _choose(options: Options, plan: Plan) -> Start:
    asked = str(options.resume_from_checkpoint)
    path = _newest(Path(options.output_dir)) if asked == "auto" else _named(Path(asked))
    if path is None:
        print("no checkpoint yet: starting", file=sys.stderr)
        return Start()
    path = path.resolve()  # as a run's folder is compared: it may be named in several ways
    _say_if_died(Path(options.output_dir))
    print(f"resuming from {path}", file=sys.stderr)
    manifest = checkpoint.read_manifest(path)
    lines = _contradictions(path, manifest, plan) or _sharding_faults(path, manifest["cut"], plan)
    if manifest["step"] > plan.total_steps:
        lines.append(
            f"--resume_from_checkpoint {path}: has done {counted(manifest['step'], 'step')}, and the run is to have "
            f"{plan.total_steps}; give more --max_steps, or an earlier checkpoint"
        )
    if lines:
        raise UsageError(lines)
    changes = tuple(_changes(manifest.get("plan"), plan))
    for line in changes:
        print(f"from step {manifest['step']} on: {line}", file=sys.stderr)
    own = path.parent == (Path(options.output_dir) / CHECKPOINTS).resolve()
    logged = (manifest.get("record") or {}).get("logged") if own else None
    return Start(path, manifest["step"], manifest["cut"], changes, logged)


def _say_if_died(folder: Path) -> None:
    facts = facts_of_run(folder).facts
    if status_of(facts) == "died":
        process = facts["starts"][-1]["process"]
        print(f"{folder}: died: process {process['pid']} on {process['host']} is gone", file=sys.stderr)


def _newest(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a run or, where it has none, the one that its last start went on from."""
    path = _newest_in(folder / CHECKPOINTS)
    if path is not None:
        return path
    try:
        starts = facts_of_run(folder).facts.get("starts") or [{}]
    except ValueError as err:
        raise UsageError([str(err)]) from err
    before = starts[-1].get("resumed_from")
    if before is None or Path(before).parent == (folder / CHECKPOINTS).resolve():
        return None
    return _whole(Path(before))


def _named(path: Path) -> Path:
    """Return the checkpoint that a path means: a run's folder and its `checkpoints` mean the newest one in it."""
    for root in (path / "checkpoints", path):
        if root.name == "checkpoints" and root.is_dir():
            newest = _newest_in(root.resolve())
            if newest is None:
                raise UsageError([f"--resume_from_checkpoint {path}: holds no whole checkpoint; give another run"])
            return newest
    return _whole(path)


def _newest_in(root: Path) -> Path | None:
    """Return the newest checkpoint to go on from; those that are passed over are said."""
    path, passed_over = checkpoint.newest_valid(root)
    for line in passed_over:
        print(line, file=sys.stderr)
    return path


def _whole(path: Path) -> Path:
    path = path.resolve()
    if fault := checkpoint.fault_of(path):
        raise UsageError([f"--resume_from_checkpoint {path}: {fault}; give another, or auto for the newest valid one"])
    return path


def _contradictions(path: Path, manifest: dict[str, Any], plan: Plan) -> list[str]:
    """Return a line for each thing that decides weights or data, and differs from the checkpoint's."""
    saved, now = manifest["identity"], json.loads(json.dumps(plan.identity()))
    if saved["variant"] != now["variant"]:
        now = {"variant": now["variant"]}  # all else follows from it
    own_names = {"dataset", "tokenizer", "model"}
    if saved["block_size"] != plan.block_size:
        own_names.add("data")  # other blocks are other data
    lines = []
    for name, value in now.items():
        if name in own_names or name not in saved or saved[name] == value:
            continue
        before = saved.get("dataset", "other data") if name == "data" else saved[name]
        if name == "variant_code":
            value, before = plan.variant_file, "another content of it; the run's own copy lies in its code/"
        elif name == "data":
            value = now["dataset"]
            same_name = "; its text, its tokenizer or its cutting has changed since" if before == value else ""
            before = f"the training data of {before}{same_name}"
        else:
            before = f"{name} {before}"
        option = _ASKED_BY.get(name, name)
        shown = f"({name} {value})" if option in ("bf16", "deepspeed_config") else value
        lines.append(
            f"--{option} {shown}: {path} was made with {before}; leave it out, or start anew in another --output_dir"
        )
    model = now.get("model", {})
    before = _saved_model(path, saved)
    skipped = {"vocab_size"} if saved.get("data") != now.get("data") else set()
    skipped |= {"n_positions"} if saved.get("block_size") != now.get("block_size") else set()
    names = [name for name in model if name in before and model[name] != before[name] and name not in skipped]
    if names:
        ours, theirs = (", ".join(f"{name}={fields[name]}" for name in names) for fields in (model, before))
        lines.append(
            f"--model_args {ours}: {path} was made with {theirs}; leave it out (and --size), or start anew in another "
            "--output_dir"
        )
    return lines


def _saved_model(path: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Return the config fields of a checkpoint; an older one tells them by the model's config that it holds."""
    config = path / checkpoint.MODEL / "config.json"
    if "model" in saved:
        return saved["model"]
    return json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}


def _sharding_faults(path: Path, saved: dict[str, int], plan: Plan) -> list[str]:
    now = plan.sharding()
    if saved == now:
        return []
    if saved["zero_stage"] != now["zero_stage"] and {saved["zero_stage"], now["zero_stage"]} != {1, 2}:
        return [
            f"--resume_from_checkpoint {path}: was made with ZeRO stage {saved['zero_stage']}, and cannot go on at "
            f"stage {now['zero_stage']} (only 1 and 2 can be exchanged); give the DeepSpeed config it was made with"
        ]
    before, after = (f"{counted(s['world_size'], 'rank')} at ZeRO stage {s['zero_stage']}" for s in (saved, now))
    print(f"the checkpoint was made with {before}; going on with {after}", file=sys.stderr)
    return []


def _changes(saved: dict[str, Any] | None, plan: Plan) -> list[str]:
    """Return how the plan differs from the one that made the checkpoint; nothing where it does not tell."""
    if saved is None:
        return []
    now = json.loads(json.dumps(as_dict(plan)))
    told = {"chosen", "ds_config", "model", "num_parameters", "flops_per_token", *SHARE, *TOLD_ELSEWHERE}
    lines = []
    for name, value in now.items():
        if name in told or name not in saved or saved[name] == value:
            continue
        before = saved[name]
        if name in ("schedule", "optimizer"):
            before, value = (
                {"type": x["type"], **{k: v for k, v in x["params"].items() if k not in _OF_SCHEDULE}}
                for x in (before, value)
            )
        if before != value:
            lines.append(f"{name} {_in_words(value)}, before it was {_in_words(before)}")
    return lines


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={v}" for k, v in value.items()) or "nothing"
    return str(value)
