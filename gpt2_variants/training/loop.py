"""The training loop."""

import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from transformers import GPT2Config

from ..config.options import Options
from ..data import Data, GlobalBatchSampler, data_loader, eval_batches
from ..evaluation import evaluate
from ..folders import FolderLock
from ..measuring import Stopwatch, peak_flops, peak_memory_bytes
from ..records import RunRecord
from ..trackers.jsonl import JsonlTracker
from ..trackers.registry import TRACKERS, parse_names
from ..trackers.tracker import TrackedRun, Tracker
from ..warm_start import WarmStart
from . import checkpoint
from .engine import make_engine
from .losses import StepLosses
from .masters import float32_state_dict
from .progress import Progress
from .resume import identity, sharding
from .seeds import rng_state, seed_everything, set_rng_state
from .stopping import Stopper

NOT_FINITE = 3  # exit code: training stopped itself


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


class Loop:
    """One session of training: engine, data position, clock and trackers."""

    def __init__(
        self,
        run: Options,
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
        self.identity = identity(run, data, ds_config)
        self.batch_size = ds_config["train_batch_size"]
        self.micro_batch_size = ds_config["train_micro_batch_size_per_gpu"]
        self.accumulation = ds_config["gradient_accumulation_steps"]
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.root = Path(run.output_dir) / "checkpoints"
        self.cut = sharding(ds_config)
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
        self.trackers: list[Tracker] = []
        self.first_bad_step = torch.zeros((), dtype=torch.long, device=self.engine.device)
        self.last_figures: dict[str, float] = {}

    def run(self) -> Trained:
        """Train from the start or the checkpoint to the end, or until a signal or a loss that is not finite."""
        if self.resume_from is not None:
            self._resume(self.resume_from)
        if self.rank == 0:
            self.trackers = self._open_trackers()
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
            for tracker in self.trackers:
                tracker.close()
        if signal_number:
            name = signal.Signals(signal_number).name
            reason = f"{name} at step {self.step} of {self.total_steps}; a checkpoint was saved"
            self.record.update(status="interrupted", reason=reason)
            if self.rank == 0:
                print(f"interrupted: {reason}; go on with --resume_from_checkpoint auto", file=sys.stderr)
            trained.exit_code = 128 + signal_number
            return trained
        trained.state_dict = float32_state_dict(self.engine)
        if self.last_figures:  # a finished run that is resumed has nothing left to evaluate
            self.record.update(final_eval=self.last_figures, train_seconds=round(self.clock.elapsed, 3))
        return trained

    def _open_trackers(self) -> list[Tracker]:
        folder = Path(self.options.output_dir)
        tracked = TrackedRun(
            folder=folder,
            name=folder.name,
            group=self.options.spec.family,
            facts=self.record.facts,
            resume_step=self.step,
            remember=self.record.update,
        )
        names = parse_names(self.options.report_to)
        return [JsonlTracker(folder / "metrics.jsonl", self.step), *(TRACKERS[name].open(tracked) for name in names)]

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
        progress = Progress(self.step, self.total_steps, shown=self.rank == 0)
        self.engine.train()
        self.clock.start()
        window_start, window_tokens = self.clock.elapsed, self._tokens(self.step)
        first_step = self.step + 1
        with progress:
            while self.step < self.total_steps:
                began = time.perf_counter()
                rate = self.engine.optimizer.param_groups[0]["lr"]
                losses = self._optimizer_step(micro_batches)
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
                    self._report_first_step(losses, began, progress)
                if due["log"]:
                    means = losses.means()  # waits for the device
                    tokens, now = self._tokens(self.step), self.clock.elapsed
                    speed = (tokens - window_tokens) / (now - window_start)
                    self._log(self._training_record(means, rate, tokens, speed))
                    progress.show(
                        self.step,
                        means["loss"],
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

    def _report_first_step(self, losses: StepLosses, began: float, progress: "Progress") -> None:
        """How long it took, and all before it; into the last of `run.json`'s starts. Waits for the device."""
        losses.of_rank.item()
        took, since_start = time.perf_counter() - began, time.time() - psutil.Process().create_time()
        progress.note(
            f"first step after {since_start:.1f} s, of which it took {took:.1f} s"
            + (", compiling" if self.options.compiles else "")
        )
        if self.rank == 0:
            *earlier, start = self.record.facts["starts"]
            start |= {"seconds_to_first_step": round(since_start, 3), "first_step_seconds": round(took, 3)}
            self.record.update(starts=[*earlier, start])

    def _optimizer_step(self, micro_batches: Iterator[dict[str, torch.Tensor]]) -> StepLosses:
        """One optimizer step; this rank's part of its losses."""
        next_tokens = self._blocks_in_step(self.step) * (self.options.block_size - 1)
        items = next_tokens / (self.world * self.accumulation)
        losses = StepLosses(self.accumulation, self.engine.device)
        for _ in range(self.accumulation):
            batch = next(micro_batches)
            output = self.engine(
                input_ids=batch["input_ids"].to(self.engine.device, non_blocking=True),
                labels=batch["labels"].to(self.engine.device, non_blocking=True),
                skip_logits=True,
                num_items_in_batch=items,
            )
            self.engine.backward(output.loss)
            self.engine.step()
            losses.add(output)
        self.float32_parameters.refresh()
        bad = ~torch.isfinite(losses.of_rank) & (self.first_bad_step == 0)
        self.first_bad_step += bad * (self.step + 1)
        return losses

    def _blocks_in_step(self, step: int) -> int:
        """Blocks in the global batch of 0-based `step`: the last batch of an epoch may be short."""
        first = step % self.steps_per_epoch * self.batch_size
        return min(self.batch_size, len(self.data.train) - first)

    def _tokens(self, steps: int) -> int:
        """Training tokens in the first `steps` optimizer steps."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return (epochs * len(self.data.train) + rest * self.batch_size) * self.options.block_size

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

    def _training_record(self, means: dict[str, Any], rate: float, tokens: int, speed: float) -> dict[str, Any]:
        peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        grad_norm = self.engine.get_global_grad_norm()
        return {
            **means,
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
        for tracker in self.trackers:
            tracker.log(record)

    def _evaluate(self, progress: "Progress") -> None:
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
        dist.all_gather_object(states, rng_state())
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
            set_rng_state(state["rng"][self.rank])
        else:  # the ranks see other sequences than those before: fresh dropout, and the same at each such resume
            seed_everything(int(np.random.SeedSequence([self.options.seed, self.step, self.rank]).generate_state(1)[0]))
