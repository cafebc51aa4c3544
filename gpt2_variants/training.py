"""The training loop, and the only file that calls the DeepSpeed engine."""

import atexit
import contextlib
import ctypes
import dataclasses
import datetime
import functools
import importlib.metadata
import math
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _unflatten_dense_tensors
from transformers import GPT2Config

from . import checkpoint, nodes, publishing, warm_start
from .data import Data, GlobalBatchSampler, data_loader, eval_batches, unigram_perplexity
from .evaluation import evaluate
from .metrics import JsonlSink, Sink, Stopwatch, WandbSink, flops_per_token, peak_flops, peak_memory_bytes
from .models.modeling_base import Float32Parameters, recompute_blocks
from .run import Faults, FolderLock, Run, RunRecord, load_data, main_rank, plan, use_accelerator, world_size
from .warm_start import WarmStart

NOT_FINITE = 3  # exit code: training stopped itself
SECONDS_TO_STOP = 25.0  # DeepSpeed's launcher kills 30 s after its first signal


@dataclass
class Trained:
    """What a run leaves in memory.

    Attributes:
        exit_code: as in the interface: 0, 3, 130 or 143.
        state_dict: float32 master weights on rank 0 of a finished run, else None.
        lock: keeps other runs out of the folder until the export stands there.
        config: the model's config.
        tokenizer: the data's tokenizer.
    """

    exit_code: int
    config: Any
    tokenizer: Any
    state_dict: dict[str, torch.Tensor] | None = None
    lock: FolderLock | None = None


class NonFiniteLoss(RuntimeError):
    """The loss of an optimizer step was not finite."""


def train(run: Run) -> Trained:
    """Train a resolved `run` to its end, or until a signal or a loss that is not finite stops it.

    Raises:
        Faults: data, tokenizer or checkpoint do not fit what was asked; nothing was written.
    """
    data = load_data(run)
    config = _model_config(run, data)
    total_steps, ds_config = plan(run, len(data.train))
    stopper = Stopper()
    init_distributed()
    keep_freed_memory()
    if blind := nodes.nodes_without(Path(run.output_dir)):
        raise Faults(
            [f"--output_dir {run.output_dir}: {', '.join(blind)} do not see it; give a folder that all nodes share"]
        )
    resume_from = _agree_on_checkpoint(run, _identity(run, data, ds_config), _cut(ds_config))
    warm = _warm_start(run, config) if resume_from is None else None
    if run.push_to_hub:
        _claim_repository(run)
    lock = _lock(run)
    record = _open_record(run, data, config, ds_config, resume_from)
    if warm is not None:
        record.update(warm_start=str(warm))
    stopper.when_stuck(functools.partial(_say_stuck, record))
    try:
        loop = _Loop(run, data, config, ds_config, total_steps, record, stopper, warm, resume_from)
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


def _model_config(run: Run, data: Data) -> GPT2Config:
    config = run.make_config(data.vocab_size)
    mask_token_id = getattr(config, "mask_token_id", None)
    has_mask = mask_token_id is not None and data.tokenizer.mask_token_id == mask_token_id
    needed = data.vocab_size + (0 if has_mask else run.spec.extra_vocabulary)
    if config.vocab_size < needed:
        raise Faults(
            [
                f"--tokenizer {run.tokenizer}: needs a vocabulary of {needed} entries, the model has "
                f"vocab_size={config.vocab_size}; leave vocab_size out of --model_args, or give the model's tokenizer"
            ]
        )
    config.bos_token_id, config.eos_token_id = data.tokenizer.bos_token_id, data.tokenizer.eos_token_id
    return config


def _warm_start(run: Run, config: GPT2Config) -> WarmStart | None:
    """What the model takes over from `--init_from`, said on rank 0. Raises `Faults`."""
    if run.init_from is None:
        return None
    try:
        warm = warm_start.read(run.init_from, run.spec, config)
    except warm_start.WarmStartError as err:
        raise Faults([str(err)]) from err
    if main_rank():
        print(warm, file=sys.stderr)
    return warm


def init_distributed() -> None:
    """Join the process group that the launcher describes; without a launcher, make one of a single rank."""
    if "RANK" not in os.environ:  # no launcher: one rank
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    use_accelerator()
    nodes.choose_interface()
    # of collectives that DeepSpeed calls by the names they had before torch 2.13; every rank would be told
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    import deepspeed

    if not torch.cuda.is_available():
        # Training never uses this op; building it needs a compiler, and each rank leaks 66 MiB of shared memory.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # before NCCL's first collective takes the current one
    if not dist.is_initialized():
        deepspeed.init_distributed()
        atexit.register(dist.destroy_process_group)


def keep_freed_memory() -> None:
    """On a CPU with glibc: keep what is freed for the next allocation, instead of giving it back to the kernel.

    The kernel clears each page that it hands out again; of the half-gigabyte buffers of a step that took longer than
    filling them (benchmarks/NOTES.md). Elsewhere nothing happens.
    """
    if torch.cuda.is_available() or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**31 - 1)


def _identity(run: Run, data: Data, ds_config: dict) -> dict[str, Any]:
    """What must be the same to go on from a checkpoint: it decides the weights and the order of the data."""
    return {
        "variant": run.variant,
        "size": run.size,
        "init_from": run.init_from,
        "model_args": run.model_args,
        "block_size": run.block_size,
        "data": data.fingerprint,
        "train_batch_size": ds_config["train_batch_size"],
        "seed": run.seed,
    }


def _cut(ds_config: dict) -> dict[str, int]:
    """What decides how the optimizer's states are cut into files."""
    return {"world_size": world_size(), "zero_stage": ds_config.get("zero_optimization", {}).get("stage", 0)}


def _agree_on_checkpoint(run: Run, identity: dict[str, Any], cut: dict[str, int]) -> Path | None:
    """The checkpoint to go on from, chosen and verified by rank 0. Raises `Faults` on all ranks."""
    chosen: list[Any] = [None, None]
    if main_rank() and run.resumes:
        chosen = list(_choose_checkpoint(run, identity, cut))
    dist.broadcast_object_list(chosen)
    path, fault = chosen
    if fault:
        raise Faults([fault])
    return path


def _claim_repository(run: Run) -> None:
    """Make the Hub repository that the run will be pushed to (rank 0): the proof that it can be. Raises `Faults`."""
    fault: list[str | None] = [None]
    if main_rank():
        try:
            publishing.claim(run.hub_name, run.hub_private)
        except publishing.PushError as err:
            fault = [f"--hub_model_id {run.hub_name}: cannot be made on the Hub: {err}"]
    dist.broadcast_object_list(fault)
    if fault[0]:
        raise Faults([fault[0]])


def _lock(run: Run) -> FolderLock:
    """The run's folder, locked by rank 0 against other runs; made if need be. Raises `Faults` on all ranks."""
    lock = FolderLock(Path(run.output_dir))
    fault = [lock.acquire() if main_rank() else None]
    dist.broadcast_object_list(fault)
    if fault[0]:
        raise Faults([fault[0]])
    return lock


def _choose_checkpoint(run: Run, identity: dict[str, Any], cut: dict[str, int]) -> tuple[Path | None, str | None]:
    if run.resume_from_checkpoint == "auto":
        path, passed_over = checkpoint.newest_valid(Path(run.output_dir) / "checkpoints")
        print(
            "\n".join([*passed_over, f"resuming from {path}" if path else "no checkpoint yet: starting"]),
            file=sys.stderr,
        )
        if path is None:
            return None, None
    else:
        path = Path(run.resume_from_checkpoint).resolve()
        if fault := checkpoint.fault_of(path):
            return None, f"--resume_from_checkpoint {path}: {fault}; give another, or auto for the newest valid one"
    manifest = checkpoint.read_manifest(path)
    saved = manifest["identity"]
    for name, value in identity.items():
        if saved.get(name) != value:
            made_with = (
                "other training data than these" if name == "data" else f"{name}={saved.get(name)}, not {name} {value}"
            )
            return None, (
                f"--resume_from_checkpoint {path}: was made with {made_with}; ask for the same, or give a new "
                "--output_dir"
            )
    if manifest["cut"] != cut:
        before, now = manifest["cut"]["zero_stage"], cut["zero_stage"]
        if before != now and {before, now} != {1, 2}:
            return None, (
                f"--resume_from_checkpoint {path}: was made with ZeRO stage {before}, and cannot go on at stage {now} "
                "(only 1 and 2 can be exchanged); give the DeepSpeed config it was made with"
            )
        print(f"the checkpoint was made with {_said(manifest['cut'])}; going on with {_said(cut)}", file=sys.stderr)
    return path, None


def _said(cut: dict[str, int]) -> str:
    return f"{cut['world_size']} ranks at ZeRO stage {cut['zero_stage']}"


def _open_record(run: Run, data: Data, config: GPT2Config, ds_config: dict, resume_from: Path | None) -> RunRecord:
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
            git_commit=_git_commit(),
            starts=[*record.facts.get("starts", []), start],
        )
        record.write_json("ds_config.json", ds_config)
    return record


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


def _git_commit() -> str | None:
    here = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
        return commit.stdout.strip()
    return None


class Stopper:
    """Turns SIGINT, SIGTERM and the death of the launcher into one decision of all ranks to stop after a step.

    The handler only sets a flag. DeepSpeed's launcher signals one rank after the other, and a SIGTERM to `deepspeed`
    itself reaches no rank at all: so the flags are compared at each step, and a rank watches its launcher.
    """

    def __init__(self):
        self._signal = 0
        self._group = None
        self._parents = _launcher_chain()
        self._ended = threading.Event()
        self._received, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def when_stuck(self, say: Callable[[int], None]) -> None:
        """Call `say` with the number of a signal that has not ended the run after 25 s.

        On a GPU a rank waits for a dead one in the driver, where Python's handlers do not run; then it is killed.
        """

        def watch() -> None:
            while number := self._received.recv(1):  # nothing, once the run is over
                if number[0] in (signal.SIGINT, signal.SIGTERM) and not self._ended.wait(SECONDS_TO_STOP):
                    say(number[0])

        threading.Thread(target=watch, daemon=True).start()

    def close(self) -> None:
        """The run is over."""
        self._ended.set()
        signal.set_wakeup_fd(-1)
        self._wakeup.close()

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = max(self._signal, number)

    def agreed(self) -> int:
        """The signal all ranks are to stop for, 0 for none. A collective: every rank calls it at the same step."""
        if not self._signal and self._parents and _launcher_chain()[: len(self._parents)] != self._parents:
            self._signal = signal.SIGTERM
        if dist.get_world_size() == 1:
            return self._signal
        if self._group is None:
            self._group = dist.new_group(backend="gloo")  # over the host: no synchronisation with the GPU
        flag = torch.tensor(self._signal)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return int(flag)


def _launcher_chain() -> tuple[int, ...]:
    """This rank's parent and, if that is DeepSpeed's `launch.py`, the `deepspeed` process that started it.

    Empty where no launcher is at work: a shell may end before the run it started.
    """
    if "LOCAL_WORLD_SIZE" not in os.environ and "LOCAL_SIZE" not in os.environ:
        return ()
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_text()
        grandparent = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return (parent,)
    if "deepspeed.launcher.launch" not in command and "launcher/launch.py" not in command:
        return (parent,)
    return (parent, grandparent)


class _Loop:
    """One session of training: engine, data position, clock and sinks."""

    def __init__(
        self,
        run: Run,
        data: Data,
        config: GPT2Config,
        ds_config: dict,
        total_steps: int,
        record: RunRecord,
        stopper: Stopper,
        warm: WarmStart | None,
        resume_from: Path | None,
    ):
        self.options, self.data, self.config, self.record, self.stopper = run, data, config, record, stopper
        self.total_steps, self.resume_from = total_steps, resume_from
        self.identity = _identity(run, data, ds_config)
        self.batch_size = ds_config["train_batch_size"]
        self.micro_batch_size = ds_config["train_micro_batch_size_per_gpu"]
        self.accumulation = ds_config["gradient_accumulation_steps"]
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.root = Path(run.output_dir) / "checkpoints"
        self.cut = _cut(ds_config)
        saved_cut = checkpoint.read_manifest(resume_from)["cut"] if resume_from else self.cut
        self.recut = saved_cut != self.cut
        self.universal = self.recut and self.cut["zero_stage"] > 0
        self.engine, self.float32_parameters = make_engine(run, config, ds_config, warm, self.universal)
        self.model = self.engine.module
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.model.parameters())
        self.checkpoint_bytes = 12 * parameters  # float32 masters and AdamW's two moments, at least
        self.steps_per_epoch = math.ceil(len(data.train) / self.batch_size)
        self.step = 0
        self.clock = Stopwatch()
        self.sinks: list[Sink] = []
        self.first_bad_step = torch.zeros((), dtype=torch.long, device=self.engine.device)
        self.last_figures: dict[str, float] = {}

    def run(self) -> Trained:
        if self.resume_from is not None:
            self._resume(self.resume_from)
        if self.rank == 0:
            self.sinks = self._open_sinks()
        trained = Trained(exit_code=0, config=self.config, tokenizer=self.data.tokenizer)
        try:
            signal_number = self._train()
        except NonFiniteLoss as err:
            self.record.update(status="failed", reason=str(err))
            if self.rank == 0:
                print(f"stopped: {err}", file=sys.stderr)
            trained.exit_code = NOT_FINITE
            return trained
        finally:
            for sink in self.sinks:
                sink.close()
        if signal_number:
            name = signal.Signals(signal_number).name
            reason = f"{name} at step {self.step} of {self.total_steps}; a checkpoint was saved"
            self.record.update(status="interrupted", reason=reason)
            if self.rank == 0:
                print(f"interrupted: {reason}; go on with --resume_from_checkpoint auto", file=sys.stderr)
            trained.exit_code = 128 + signal_number
            return trained
        trained.state_dict = _float32_state_dict(self.engine)
        if self.last_figures:  # a finished run that is resumed has nothing left to evaluate
            self.record.update(final_eval=self.last_figures, train_seconds=round(self.clock.elapsed, 3))
        return trained

    def _open_sinks(self) -> list[Sink]:
        folder = Path(self.options.output_dir)
        sinks: list[Sink] = [JsonlSink(folder / "metrics.jsonl", self.step)]
        if self.options.report_to == "wandb":
            new_id = f"{self.options.variant}-{random.SystemRandom().getrandbits(40):010x}"
            run_id = self.record.facts.get("wandb_run_id", new_id)
            self.record.update(wandb_run_id=run_id)
            sinks.append(WandbSink(folder, folder.name, self.options.spec.family, self.record.facts, run_id))
        return sinks

    def _train(self) -> int:
        """Train to the last step; the number of the signal that ended it early, or 0."""
        run = self.options
        sampler = GlobalBatchSampler(
            num_blocks=len(self.data.train),
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            rank=self.rank,
            world_size=self.world,
            seed=run.seed,
            start_step=self.step,
            num_steps=self.total_steps,
        )
        micro_batches = iter(data_loader(self.data.train, sampler, pin_memory=torch.cuda.is_available()))
        progress = _Progress(self.step, self.total_steps, shown=self.rank == 0)
        self.engine.train()
        self.clock.start()
        window_start, window_tokens = self.clock.elapsed, self._tokens(self.step)
        first_step = self.step + 1
        with progress:
            while self.step < self.total_steps:
                began = time.perf_counter()
                rate = self.engine.optimizer.param_groups[0]["lr"]
                loss = self._optimizer_step(micro_batches)
                self.step += 1
                stop = self.stopper.agreed()
                last = self.step == self.total_steps
                due = {
                    "log": self.step % run.logging_steps == 0 or last,
                    "eval": self.step % run.eval_steps == 0 or last,
                    "save": self.step % run.save_steps == 0 or last or bool(stop),
                }
                if any(due.values()):
                    self._check_finite()
                if self.step == first_step:
                    self._report_first_step(loss, began, progress)
                if due["log"]:
                    mean_loss = self._mean_loss(loss)  # waits for the device
                    tokens, now = self._tokens(self.step), self.clock.elapsed
                    speed = (tokens - window_tokens) / (now - window_start)
                    self._log(self._training_record(mean_loss, rate, tokens, speed))
                    progress.show(
                        self.step,
                        mean_loss,
                        speed,
                        eta=(self.total_steps - self.step) * self.batch_size * run.block_size / speed,
                    )
                self.clock.stop()
                if due["eval"]:
                    self._evaluate(progress)
                if due["save"]:
                    self._save()
                self.clock.start()
                if due["log"] or due["eval"] or due["save"]:
                    window_start, window_tokens = self.clock.elapsed, self._tokens(self.step)
                if stop:
                    self.clock.stop()
                    return stop
        self.clock.stop()
        return 0

    def _report_first_step(self, loss: torch.Tensor, began: float, progress: "_Progress") -> None:
        """How long it took, and all before it; into the last of `run.json`'s starts. Waits for the device."""
        loss.item()
        took, since_start = time.perf_counter() - began, time.time() - psutil.Process().create_time()
        progress.note(
            f"first step after {since_start:.1f} s, of which it took {took:.1f} s"
            + (", compiling" if self.options.compiles else "")
        )
        if self.rank == 0:
            *earlier, start = self.record.facts["starts"]
            start |= {"seconds_to_first_step": round(since_start, 3), "first_step_seconds": round(took, 3)}
            self.record.update(starts=[*earlier, start])

    def _optimizer_step(self, micro_batches: Iterator[dict[str, torch.Tensor]]) -> torch.Tensor:
        """One optimizer step; this rank's part of the loss: the mean over ranks is that of the global batch."""
        next_tokens = self._blocks_in_step(self.step) * (self.options.block_size - 1)
        items = next_tokens / (self.world * self.accumulation)
        total = torch.zeros((), device=self.engine.device)
        for _ in range(self.accumulation):
            batch = next(micro_batches)
            loss = self.engine(
                input_ids=batch["input_ids"].to(self.engine.device, non_blocking=True),
                labels=batch["labels"].to(self.engine.device, non_blocking=True),
                skip_logits=True,
                num_items_in_batch=items,
            ).loss
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach()
        self.float32_parameters.refresh()
        total /= self.accumulation
        bad = ~torch.isfinite(total) & (self.first_bad_step == 0)
        self.first_bad_step += bad * (self.step + 1)
        return total

    def _blocks_in_step(self, step: int) -> int:
        """Blocks in the global batch of 0-based `step`: the last batch of an epoch may be short."""
        first = step % self.steps_per_epoch * self.batch_size
        return min(self.batch_size, len(self.data.train) - first)

    def _tokens(self, steps: int) -> int:
        """Training tokens in the first `steps` optimizer steps."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return (epochs * len(self.data.train) + rest * self.batch_size) * self.options.block_size

    def _mean_loss(self, loss: torch.Tensor) -> float:
        loss = loss.clone()
        dist.all_reduce(loss)
        return loss.item() / self.world

    def _check_finite(self) -> None:
        """Raises NonFiniteLoss, on all ranks, if a step since the last check had a loss that is not finite."""
        steps = self.first_bad_step.clone()
        dist.all_reduce(steps, op=dist.ReduceOp.MAX)
        if step := int(steps):
            epoch, batch = divmod(step - 1, self.steps_per_epoch)
            raise NonFiniteLoss(
                f"the loss of step {step} (epoch {epoch}, global batch {batch}) is not finite; the last checkpoint "
                f'before it is kept: resume with a lower --learning_rate, or with "bf16": {{"enabled": false}}'
            )

    def _training_record(self, loss: float, rate: float, tokens: int, speed: float) -> dict[str, Any]:
        peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        grad_norm = self.engine.get_global_grad_norm()
        return {
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "epoch": round(self.step / self.steps_per_epoch, 4),
            "tokens": tokens,
            "tokens_per_second": round(speed, 1),
            "mfu": None if peak is None else speed * self.record.facts["flops_per_token"] / (peak * self.world),
            "peak_memory_bytes": peak_memory_bytes(),
        }

    def _log(self, record: dict[str, Any]) -> None:
        record = {"step": self.step, "elapsed_seconds": round(self.clock.elapsed, 3), **record}
        for sink in self.sinks:
            sink.log(record)

    def _evaluate(self, progress: "_Progress") -> None:
        self.engine.eval()
        batches = eval_batches(len(self.data.validation), self.micro_batch_size, self.rank, self.world)
        with torch.no_grad():
            self.last_figures = evaluate(
                lambda ids, labels: self.engine(input_ids=ids, labels=labels, return_token_scores=True).token_scores,
                (self.data.validation.__getitems__(indices) for indices in batches),
                self.engine.device,
            )
        self.engine.train()
        self._log(dict(self.last_figures))
        progress.note(f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in self.last_figures.items()))

    def _save(self) -> None:
        states: list[Any] = [None] * self.world
        dist.all_gather_object(states, _rng_state())
        checkpoint.save(
            self.engine,
            self.root,
            self.step,
            client_state={
                "step": self.step,
                "elapsed_seconds": self.clock.elapsed,
                "rng": states,
            },
            manifest={"identity": self.identity, "cut": self.cut},
            keep=self.options.save_total_limit,
            describe_model=self._describe_model,
            at_least_bytes=self.checkpoint_bytes,
        )

    def _describe_model(self, folder: Path) -> None:
        self.data.tokenizer.save_pretrained(folder)
        self.config.to_json_file(folder / "config.json")

    def _resume(self, path: Path) -> None:
        state = (checkpoint.load_universal if self.universal else checkpoint.load)(self.engine, path)
        self.float32_parameters.refresh()
        self.step = state["step"]
        self.clock = Stopwatch(state["elapsed_seconds"])
        if len(state["rng"]) == self.world:
            _set_rng_state(state["rng"][self.rank])
        else:  # the ranks see other sequences than those before: fresh dropout, and the same at each such resume
            _seed(int(np.random.SeedSequence([self.options.seed, self.step, self.rank]).generate_state(1)[0]))


class _Progress:
    """A bar on a terminal; in a log file a line per logging step, without carriage returns."""

    def __init__(self, step: int, total: int, shown: bool):
        self._bar = None
        self._shown, self._total = shown, total
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True)

    def show(self, step: int, loss: float, tokens_per_second: float, eta: float) -> None:
        """Report a logging step; `eta` in seconds."""
        left = datetime.timedelta(seconds=round(eta))
        text = f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s, {left} left"
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(text)
        elif self._shown:
            print(f"step {step}/{self._total}: {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Print a line beside the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._shown:
            print(text, file=sys.stderr, flush=True)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._bar is not None:
            self._bar.close()


def make_engine(
    run: Run, config: GPT2Config, ds_config: dict, warm: WarmStart | None = None, universal: bool = False
) -> tuple[Any, "_Float32Masters"]:
    """DeepSpeed's engine around a new model, and that model's `_Float32Masters`.

    Args:
        universal: the engine is to load a checkpoint in DeepSpeed's universal format.
    """
    import deepspeed

    _seed(run.seed)  # the same weights on every rank
    model = run.spec.model_class._from_config(config, attn_implementation=run.attn_implementation)
    if warm is not None:
        warm.apply(model)
    if run.gradient_checkpointing:
        recompute_blocks(model)
    if run.apex in ("layer_norm", "all"):
        use_apex_layer_norm(model)
    given, schedule = _take_over_schedule(ds_config)
    optimizer = None
    if run.apex in ("adam", "all"):
        optimizer, given = apex_adam(given), {k: v for k, v in given.items() if k != "optimizer"}
    if universal:
        given = {**given, "checkpoint": {**given.get("checkpoint", {}), "load_universal": True}}
    # DeepSpeed rounds the weights to bf16 before it takes the masters: harmless to random ones
    precise = _float32_parameters(model) if warm is None else dict(model.named_parameters())
    unrounded = {name: p.detach().clone() for name, p in precise.items()}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=_parameter_groups(model, ds_config),
        optimizer=optimizer,
        config=given,
        lr_scheduler=schedule,
    )
    if run.compiles:
        # in training and evaluation, of full and short batches: more kinds than dynamo's 8, beyond which it would go on
        # without compiling
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        engine.module.compile_parts()
    _seed(run.seed + engine.global_rank)  # dropout differs between ranks
    return engine, _Float32Masters(engine, unrounded)


def use_apex_layer_norm(model: nn.Module) -> None:
    """Put NVIDIA apex's `FusedLayerNorm` in the place of each `LayerNorm`, with the same parameters."""
    from apex.normalization import FusedLayerNorm

    for module in list(model.modules()):
        for name, norm in module.named_children():
            if type(norm) is nn.LayerNorm:
                fused = FusedLayerNorm(norm.normalized_shape, eps=norm.eps)
                fused.weight, fused.bias = norm.weight, norm.bias
                setattr(module, name, fused)


def apex_adam(ds_config: dict) -> Callable:
    """NVIDIA apex's `FusedAdam` with the settings of the JSON's AdamW, as DeepSpeed takes an optimizer: of groups."""
    from apex.optimizers import FusedAdam

    params = ds_config["optimizer"]["params"]
    settings = {k: v for k, v in params.items() if k in ("lr", "betas", "eps", "weight_decay")}
    return lambda groups: FusedAdam(groups, adam_w_mode=True, **settings)


def _float32_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, of the modules that are `Float32Parameters`."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if isinstance(module, Float32Parameters)
        for name, parameter in module.named_parameters(recurse=False)
    }


class _Float32Masters:
    """Keeps parameters that count in float32 exact in an engine that computes in bf16.

    DeepSpeed casts every parameter, whatever the model says (it spares buffers only), and takes the float32 masters
    from the rounded values. So the masters are set to the unrounded ones, and handed back to the modules after each
    optimizer step. A collective, of a few kilobytes per layer; without such parameters or in float32: nothing.

    Args:
        unrounded: name -> initial float32 value, of these parameters and of any other whose master is to be exact.
    """

    def __init__(self, engine: Any, unrounded: dict[str, torch.Tensor]):
        self._engine = engine
        for name, parameter in engine.module.named_parameters():
            if name in unrounded and parameter.dtype.itemsize < torch.float32.itemsize:
                _set_master(engine, parameter, unrounded[name].to(engine.device))
        self._handed_back = [
            (engine.module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], parameter)
            for name, parameter in _float32_parameters(engine.module).items()
            if parameter.dtype.itemsize < torch.float32.itemsize
        ]
        self.refresh()

    def refresh(self) -> None:
        """Hand the masters to the modules. To be called by all ranks after whatever changes the parameters."""
        for module, name, parameter in self._handed_back:
            module.set_master(name, _master(self._engine, parameter))


def _parameter_groups(model: nn.Module, ds_config: dict) -> list[dict[str, Any]]:
    """Decay on matrices only: biases and norms are vectors."""
    decay = ds_config["optimizer"]["params"].get("weight_decay", 0.0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _take_over_schedule(ds_config: dict) -> tuple[dict, Callable | None]:
    """The config for DeepSpeed, and the schedule as a callable where the JSON states a linear warm-up and decay from 0.

    DeepSpeed's own WarmupDecayLR runs one step late (the first two steps have rate 0) and refuses warm-ups of 0 or 1
    steps; transformers' is the recipe's.
    """
    scheduler = ds_config.get("scheduler", {})
    params = scheduler.get("params", {})
    linear = params.get("warmup_type") == "linear" and not params.get("warmup_min_lr")
    if scheduler.get("type") != "WarmupDecayLR" or not linear:
        return ds_config, None
    from transformers import get_linear_schedule_with_warmup

    optimizer = ds_config["optimizer"]
    given = {k: v for k, v in ds_config.items() if k != "scheduler"}
    given["optimizer"] = {**optimizer, "params": {**optimizer["params"], "lr": params["warmup_max_lr"]}}
    warmup, total = params["warmup_num_steps"], params["total_num_steps"]
    return given, lambda opt: get_linear_schedule_with_warmup(opt, warmup, total)


def _float32_state_dict(engine: Any) -> dict[str, torch.Tensor] | None:
    """Name -> float32 master weight on the CPU, on rank 0; None elsewhere. A collective."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        weight = _master(engine, parameter)
        if engine.global_rank == 0:
            weights[name] = weight.detach().float().cpu().clone()
    return weights or None


def _master(engine: Any, parameter: nn.Parameter) -> torch.Tensor:
    """The float32 master of `parameter`, whole. A collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    if _has_zero_master(parameter):
        return safe_get_full_fp32_param(parameter)
    return _stage_0_master(engine, parameter)


def _set_master(engine: Any, parameter: nn.Parameter, value: torch.Tensor) -> None:
    """Set the float32 master of `parameter`, whole, to `value`. On all ranks."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if hasattr(parameter, "ds_id"):
        # Not the whole: DeepSpeed 0.19 then reads beyond the end of a value that the ranks cannot share out evenly.
        cut: Any = parameter  # with what DeepSpeed hung on it
        size = cut.ds_tensor.numel()
        padded = nn.functional.pad(value.flatten(), (0, size * cut.ds_process_group.size() - value.numel()))
        safe_set_local_fp32_param(parameter, padded.narrow(0, size * cut.ds_process_group.rank(), size))
    elif _has_zero_master(parameter):
        safe_set_full_fp32_param(parameter, value)
    else:
        _stage_0_master(engine, parameter).data.copy_(value)


def _has_zero_master(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")  # ZeRO stages 1 and 2; stage 3


def _stage_0_master(engine: Any, parameter: nn.Parameter) -> torch.Tensor:
    """Without ZeRO: what the engine's optimizer holds; in float32 the parameter is its own master."""
    optimizer = engine.optimizer
    if not hasattr(optimizer, "fp16_groups"):
        return parameter
    if hasattr(optimizer, "fp32_groups_flat"):  # with a fused Adam the masters of a group are one flat tensor
        flat = zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True)
        masters = [_unflatten_dense_tensors(group.detach(), like) for group, like in flat]
    else:
        masters = optimizer.fp32_groups
    for halves, fulls in zip(optimizer.fp16_groups, masters, strict=True):
        for half, full in zip(halves, fulls, strict=True):
            if half is parameter:
                return full
    raise RuntimeError("DeepSpeed's optimizer holds no master of a parameter")


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _rng_state() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state()
    kind, keys, *rest = numpy_state
    # in plain types, which torch reads back without unpickling any code
    state = {"python": random.getstate(), "numpy": (kind, keys.tolist(), *rest), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
