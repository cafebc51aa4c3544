"""A session of training, from the data to the last step."""

import contextlib
import dataclasses
import functools
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from transformers import GPT2Config

from .. import hub_client, nodes, warm_start
from ..config.options import Options
from ..config.plan import Plan, facts_of, make_plan
from ..config.recovered import facts_of_run
from ..config.resolve import load_data
from ..data import Data
from ..faults import UsageError
from ..folders import FolderLock
from ..memory import Card, Demand, card, verdict, with_fitting_micro_batch
from ..ranks import decided_by_rank_0, has_cuda, main_rank, world_size
from ..reasons import reason_of
from ..records import RunRecord, device_name
from ..warm_start import WarmStart
from .arithmetic import arithmetic
from .engine import init_distributed, keep_freed_memory
from .loop import Loop, Trained
from .opening import opening
from .recording import open_record
from .resume import Start, agree_on_start
from .stopping import Stopper
from .trial import try_out


def train(options: Options) -> Trained:
    """Train what resolved `options` ask for, to its end, or until a signal or a loss that is not finite stops it.

    Raises:
        UsageError: optimizer, data, tokenizer or checkpoint do not fit what was asked; nothing was written.
    """
    try_out(options)
    data, plan = prepare(options)
    for note in data.notes if main_rank() else ():
        print(f"data: {note}", file=sys.stderr)
    if main_rank():
        for line in opening(options, plan, device_name()):
            print(line, file=sys.stderr)
    with arithmetic(plan), contextlib.closing(Stopper()) as stopper:
        return _train(options, data, plan, stopper)


def _train(options: Options, data: Data, plan: Plan, stopper: Stopper) -> Trained:
    config = plan.model_config()
    init_distributed()
    keep_freed_memory()
    folder = Path(options.output_dir)
    if blind := nodes.nodes_without(folder):
        raise UsageError(
            [f"--output_dir {folder}: {', '.join(blind)} do not see it; give a folder that all nodes share"]
        )
    if has_cuda():
        _check_memory(plan)
    start = agree_on_start(options, plan)
    if _nothing_left(folder, plan, start):
        return Trained(exit_code=0, config=config, tokenizer=data.tokenizer)
    warm = _warm_start(options, config) if start.checkpoint is None else None
    checked = decided_by_rank_0(functools.partial(_check, options, plan, start))
    if options.push_to_hub:
        decided_by_rank_0(functools.partial(_claim_repository, options))
    lock = FolderLock(folder)
    decided_by_rank_0(functools.partial(_lock, lock))
    record = open_record(options, plan, data, start)
    if checked is not None:
        record.update(variant_check=checked)
    if warm is not None:
        record.update(warm_start=str(warm))
    stopper.when_stuck(functools.partial(_say_stuck, record))
    try:
        trained = Loop(plan, data, folder, record, stopper, warm, start).run()
        stopper.wait_for_all()
        return dataclasses.replace(trained, lock=lock, record=record)
    except BaseException as err:
        with contextlib.suppress(OSError):  # on a full disk the status stays as it was
            record.update(status="failed", reason=reason_of(err))
        lock.release()
        raise


def prepare(options: Options) -> tuple[Data, Plan]:
    """Return the data of resolved options, and their plan on the ranks there are. Raise `UsageError`."""
    data = load_data(options)
    facts, config, world = facts_of(data), _model_config(options, data), world_size()
    plan = make_plan(options, facts, config, world)
    if options.auto_micro_batch:
        options = _share_out(options, plan)
        plan = make_plan(options, facts, config, world)
    return data, plan


def _share_out(options: Options, plan: Plan) -> Options:
    """`options` with the micro-batch that fits the smallest card of all ranks, said on rank 0. Raises `UsageError`."""
    if world_size() > 1:
        init_distributed()
    smallest, demand = _smallest_card(), _demand(plan)
    choose = functools.partial(with_fitting_micro_batch, options, demand, smallest)
    options, line = decided_by_rank_0(choose) if world_size() > 1 else choose()
    if main_rank():
        print(line, file=sys.stderr)
    return options


def _check_memory(plan: Plan) -> None:
    """Say on rank 0 where the run will not fit the smallest card of all ranks by estimate.

    Raises:
        UsageError: the model's states alone do not fit.
    """
    smallest = _smallest_card()

    def decide() -> None:
        said = verdict(_demand(plan), smallest, quick=True)
        if said.hopeless:
            raise UsageError([said.line])
        if not said.fits:
            print(said.line, file=sys.stderr)

    decided_by_rank_0(decide)


def _demand(plan: Plan) -> Demand:
    return Demand(plan, plan.spec.on_meta(plan.model_config()), plan.compile)


def _smallest_card() -> Card:
    """Return the card with the least memory of all ranks. A collective."""
    cards = [card()] * world_size()
    if len(cards) > 1:
        dist.all_gather_object(cards, cards[0])
    return min(cards, key=lambda of_rank: of_rank.size)


def _say_stuck(record: RunRecord, number: int) -> None:
    name = signal.Signals(number).name
    record.update(
        status="failed", reason=f"{name}, and the step did not end: is a rank gone? The checkpoints are whole"
    )


def _nothing_left(folder: Path, plan: Plan, start: Start) -> bool:
    """Return whether the run has been trained to its end and exported; said on rank 0."""
    if start.checkpoint is None or start.step < plan.total_steps or start.checkpoint.parent != _checkpoints(folder):
        return False
    finished = facts_of_run(folder).facts.get("status") == "finished" and (folder / "model" / "config.json").is_file()
    if finished and main_rank():
        print(
            f"{folder}: finished at step {start.step}, nothing is left to do; more --max_steps or --num_train_epochs "
            f"train on, and python -m gpt2_variants push {folder} pushes it",
            file=sys.stderr,
        )
    return finished


def _checkpoints(folder: Path) -> Path:
    return (folder / "checkpoints").resolve()


def _model_config(options: Options, data: Data) -> GPT2Config:
    config = options.make_config(data.vocab_size)
    mask_token_id = getattr(config, "mask_token_id", None)
    has_mask = mask_token_id is not None and data.tokenizer.mask_token_id == mask_token_id
    needed = data.vocab_size + (0 if has_mask else options.spec.extra_vocabulary)
    if config.vocab_size < needed:
        raise UsageError(
            [
                f"--tokenizer {options.tokenizer}: needs a vocabulary of {needed} entries, the model has "
                f"vocab_size={config.vocab_size}; leave vocab_size out of --model_args, or give the model's tokenizer"
            ]
        )
    config.bos_token_id, config.eos_token_id = data.tokenizer.bos_token_id, data.tokenizer.eos_token_id
    return config


def _warm_start(options: Options, config: GPT2Config) -> WarmStart | None:
    """Return what the model takes over from `--init_from`, said on rank 0. Raise `UsageError`."""
    if options.init_from is None:
        return None
    try:
        warm = warm_start.read(options.init_from, options.spec, config)
    except warm_start.WarmStartError as err:
        raise UsageError([str(err)]) from err
    if main_rank():
        print(warm, file=sys.stderr)
    return warm


def _check(options: Options, plan: Plan, start: Start) -> dict[str, str] | None:
    """Ask a user's own variant for its promises: name -> answer; None where that was done already, or is not needed.

    Raises:
        UsageError: one is broken.
    """
    variant = plan.spec
    if variant.code is None or start.checkpoint is not None:
        return None
    if not options.check:
        print(f"--no-check: whether {variant.name} keeps the promises of a variant was not asked", file=sys.stderr)
        return {"asked": "nothing, by --no-check"}
    from ..contract import BROKEN, KEPT, Subject, ask, keeps_all  # which a run of the package's variants does not need

    answers = list(ask(Subject(variant, quick=True)))
    if not keeps_all(answers):
        raise UsageError(
            [
                f"--variant {options.variant}: broken: {answer.title}: {answer.finding}; correct it, or train it all "
                "the same by --no-check"
                for answer in answers
                if answer.state == BROKEN
            ]
        )
    seconds = sum(answer.seconds for answer in answers)
    kept = sum(answer.state == KEPT for answer in answers)
    print(
        f"{options.variant}: keeps {kept} promises ({seconds:.0f} s); python -m gpt2_variants check "
        f"{options.variant} asks for all",
        file=sys.stderr,
    )
    return {answer.promise: answer.state for answer in answers}


def _claim_repository(options: Options) -> None:
    """Make the Hub repository that the run will be pushed to: the proof that it can be. Raises `UsageError`."""
    try:
        hub_client.claim(options.hub_name, options.hub_private)
    except hub_client.PushError as err:
        raise UsageError([f"--hub_model_id {options.hub_name}: cannot be made on the Hub: {err}"]) from err


def _lock(lock: FolderLock) -> None:
    """Lock the run's folder against other runs; it is made if need be. Raises `UsageError`."""
    if fault := lock.acquire():
        raise UsageError([fault])
