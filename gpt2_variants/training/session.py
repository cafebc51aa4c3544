"""A session of training, from the data to the last step."""

import contextlib
import dataclasses
import datetime
import functools
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import GPT2Config

from .. import hub_client, nodes, warm_start
from ..config.options import Options
from ..config.resolve import load_data, plan
from ..data import Data, unigram_perplexity
from ..faults import UsageError
from ..folders import FolderLock
from ..measuring import flops_per_token
from ..ranks import main_rank, world_size
from ..records import RunRecord, device_name, git_commit, versions
from ..warm_start import WarmStart
from .engine import init_distributed, keep_freed_memory
from .loop import Loop, Trained
from .resume import agree_on_checkpoint, identity, sharding
from .stopping import Stopper


def train(run: Options) -> Trained:
    """Train a resolved `run` to its end, or until a signal or a loss that is not finite stops it.

    Raises:
        UsageError: data, tokenizer or checkpoint do not fit what was asked; nothing was written.
    """
    data = load_data(run)
    config = _model_config(run, data)
    total_steps, ds_config = plan(run, len(data.train))
    stopper = Stopper()
    init_distributed()
    keep_freed_memory()
    if blind := nodes.nodes_without(Path(run.output_dir)):
        raise UsageError(
            [f"--output_dir {run.output_dir}: {', '.join(blind)} do not see it; give a folder that all nodes share"]
        )
    resume_from = agree_on_checkpoint(run, identity(run, data, ds_config), sharding(ds_config))
    warm = _warm_start(run, config) if resume_from is None else None
    if run.push_to_hub:
        _claim_repository(run)
    lock = _lock(run)
    record = _open_record(run, data, config, ds_config, resume_from)
    if warm is not None:
        record.update(warm_start=str(warm))
    stopper.when_stuck(functools.partial(_say_stuck, record))
    try:
        loop = Loop(run, data, config, ds_config, total_steps, record, stopper, warm, resume_from)
        return dataclasses.replace(loop.run(), lock=lock)
    except BaseException as err:
        with contextlib.suppress(OSError):  # on a full disk the status stays as it was
            record.update(status="failed", reason=f"{type(err).__name__}: {err}".splitlines()[0])
        raise
    finally:
        stopper.close()


def _say_stuck(record: RunRecord, number: int) -> None:
    name = signal.Signals(number).name
    record.update(
        status="failed", reason=f"{name}, and the step did not end: is a rank gone? The checkpoints are whole"
    )


def _model_config(run: Options, data: Data) -> GPT2Config:
    config = run.make_config(data.vocab_size)
    mask_token_id = getattr(config, "mask_token_id", None)
    has_mask = mask_token_id is not None and data.tokenizer.mask_token_id == mask_token_id
    needed = data.vocab_size + (0 if has_mask else run.spec.extra_vocabulary)
    if config.vocab_size < needed:
        raise UsageError(
            [
                f"--tokenizer {run.tokenizer}: needs a vocabulary of {needed} entries, the model has "
                f"vocab_size={config.vocab_size}; leave vocab_size out of --model_args, or give the model's tokenizer"
            ]
        )
    config.bos_token_id, config.eos_token_id = data.tokenizer.bos_token_id, data.tokenizer.eos_token_id
    return config


def _warm_start(run: Options, config: GPT2Config) -> WarmStart | None:
    """What the model takes over from `--init_from`, said on rank 0. Raises `UsageError`."""
    if run.init_from is None:
        return None
    try:
        warm = warm_start.read(run.init_from, run.spec, config)
    except warm_start.WarmStartError as err:
        raise UsageError([str(err)]) from err
    if main_rank():
        print(warm, file=sys.stderr)
    return warm


def _claim_repository(run: Options) -> None:
    """Make the Hub repository that the run will be pushed to: the proof that it can be. Raises `UsageError`."""
    fault: list[str | None] = [None]
    if main_rank():
        try:
            hub_client.claim(run.hub_name, run.hub_private)
        except hub_client.PushError as err:
            fault = [f"--hub_model_id {run.hub_name}: cannot be made on the Hub: {err}"]
    dist.broadcast_object_list(fault)
    if fault[0]:
        raise UsageError([fault[0]])


def _lock(run: Options) -> FolderLock:
    """The run's folder, locked by rank 0 against other runs; made if need be. Raises `UsageError` on all ranks."""
    lock = FolderLock(Path(run.output_dir))
    fault = [lock.acquire() if main_rank() else None]
    dist.broadcast_object_list(fault)
    if fault[0]:
        raise UsageError([fault[0]])
    return lock


def _open_record(run: Options, data: Data, config: GPT2Config, ds_config: dict, resume_from: Path | None) -> RunRecord:
    """Create the run's folder (rank 0), with `run.json` and `ds_config.json`."""
    with torch.device("meta"):
        model = run.spec.model_class(config)
    num_parameters = model.num_parameters()
    record = RunRecord(Path(run.output_dir), writes=main_rank())
    start = {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "world_size": world_size(),
        "device": device_name(),
        "resumed_from": str(resume_from) if resume_from else None,
    }
    if main_rank():
        record.update(
            status="running",
            reason=None,
            variant=run.variant,
            options=dataclasses.asdict(run),
            data=data.description,
            data_fingerprint=data.fingerprint,
            unigram_perplexity=unigram_perplexity(data.train, data.validation, data.vocab_size),
            num_parameters=num_parameters,
            flops_per_token=flops_per_token(
                num_parameters, config.n_layer, config.n_embd, run.block_size, model.positions(run.block_size)
            ),
            versions=versions(),
            git_commit=git_commit(),
            starts=[*record.facts.get("starts", []), start],
        )
        record.write_json("ds_config.json", ds_config)
    return record
