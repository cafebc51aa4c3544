"""The record of a run as a session of training begins."""

import dataclasses
import datetime
import sys
from pathlib import Path

from .. import variant_code
from ..config.deepspeed_json import find_ds_config
from ..config.options import Options
from ..config.plan import Plan, as_dict
from ..config.recovered import facts_of_run
from ..data import Data
from ..folders import kept_aside
from ..processes import this_process
from ..ranks import main_rank
from ..records import SCHEMA, RunRecord, device_name, git_commit, status_of, versions
from .resume import Start


def open_record(options: Options, plan: Plan, data: Data, start: Start) -> RunRecord:
    """Create the run's folder (rank 0), with `run.json` and `ds_config.json`."""
    folder = Path(options.output_dir)
    if not main_rank():
        return RunRecord(folder, writes=False, facts={})
    facts, recovered_from, why = facts_of_run(folder)
    if not options.resumes:
        facts = {}  # of a start that failed before its first step
    if (folder / "run.json").exists() and why:
        print(
            f"{folder}: run.json {why}: it is written anew; the old one is {kept_aside(folder / 'run.json').name}",
            file=sys.stderr,
        )
    record = RunRecord(folder, writes=True, facts=facts)
    if not plan.load_best_model_at_end:
        record.facts.pop("best", None)  # of an earlier start that was to keep it
    this_start = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "world_size": plan.world_size,
        "device": device_name(),
        "resumed_from": str(start.checkpoint) if start.checkpoint else None,
        "changed": list(start.changes),
        "process": this_process(),
    }
    if recovered_from is not None:
        this_start["rebuilt_from"] = recovered_from.name
    *earlier, last = record.facts.get("starts") or [None]
    if last is not None:
        earlier = [*earlier, {**last, "ended": status_of(record.facts)}]
    resolved = {k: v for k, v in dataclasses.asdict(options).items() if k not in ("asked", "chosen", "saved_ds_config")}
    record.update(
        schema=SCHEMA,
        status="running",
        reason=None,
        not_finite_at=None,
        variant=plan.variant,
        streams=[dataclasses.asdict(stream) for stream in plan.spec.model_class.streams],
        plan=as_dict(plan),
        asked={**options.asked, "preset": options.preset},
        options={k: getattr(plan, k, v) if v is None else v for k, v in resolved.items()},
        deepspeed_json=find_ds_config(options)[1],
        data=plan.data,
        data_fingerprint=plan.data_fingerprint,
        data_notes=data.notes,
        unigram_perplexity=data.unigram_perplexity,
        num_parameters=plan.num_parameters,
        flops_per_token=plan.flops_per_token,
        versions=versions(),
        git_commit=git_commit(),
        starts=[*earlier, this_start],
    )
    record.write_json("ds_config.json", plan.ds_config)
    if plan.spec.code is not None:
        plan.spec.code.copy_to(record.path.parent / variant_code.FOLDER)
    return record
