"""The record of a run as a session of training begins."""

import dataclasses
import datetime
from pathlib import Path

from .. import variant_code
from ..config.deepspeed_json import find_ds_config
from ..config.options import Options
from ..config.plan import Plan, as_dict
from ..data import Data
from ..ranks import main_rank
from ..records import SCHEMA, RunRecord, device_name, git_commit, versions
from .resume import Start


def open_record(options: Options, plan: Plan, data: Data, start: Start) -> RunRecord:
    """Create the run's folder (rank 0), with `run.json` and `ds_config.json`."""
    record = RunRecord(Path(options.output_dir), writes=main_rank())
    if not main_rank():
        return record
    if not options.resumes:
        record.facts.clear()  # of a start that failed before its first step
    if not plan.load_best_model_at_end:
        record.facts.pop("best", None)  # of an earlier start that was to keep it
    this_start = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "world_size": plan.world_size,
        "device": device_name(),
        "resumed_from": str(start.checkpoint) if start.checkpoint else None,
        "changed": list(start.changes),
    }
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
        starts=[*record.facts.get("starts", []), this_start],
    )
    record.write_json("ds_config.json", plan.ds_config)
    if plan.spec.code is not None:
        plan.spec.code.copy_to(record.path.parent / variant_code.FOLDER)
    return record
