"""The training loop."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..config.plan import Plan, as_dict
from ..data import Data, GlobalBatchSampler, data_loader, eval_batches
from ..evaluation import evaluate
from ..folders import CHECKPOINTS, METRICS
from ..measuring import Stopwatch, duration, peak_flops, peak_memory_bytes
from ..processes import seconds_since_start
from ..records import RunRecord
from ..trackers.jsonl import JsonlTracker
from ..trackers.registry import TRACKERS
from ..trackers.tracker import TrackedRun, Tracker
from ..warm_start import WarmStart
from . import checkpoint, loading
from .engine import make_engine
from .losses import StepLosses
from .masters import float32_state_dict
from .optimizers import reapply
from .outcome import NOT_FINITE, NonFiniteLoss, Trained, say_interrupted, say_not_finite
from .progress import Progress
from .resume import Start
from .seeds import rng_state, seed_everything, set_rng_state
from .soundness import out_of_range
from .stopping import Stopper


class Loop:
    """One session of training: engine, data position, clock and trackers."""

    def __init__(
        self,
        plan: Plan,
        data: Data,
        folder: Path,
        record: RunRecord,
        stopper: Stopper,
        warm: WarmStart | None,
        start: Start,
    ):
        self.plan, self.data, self.folder, self.start = plan, data, folder, start
        self.record, self.stopper = record, stopper
        self.config = plan.model_config()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.root = folder / CHECKPOINTS
        resharded = start.checkpoint is not None and start.sharding != plan.sharding()
        self.universal = resharded and plan.zero_stage > 0
        self.engine, self.masters = make_engine(plan, warm, self.universal)
        self.step = 0
        self.clock = Stopwatch()
        self.logged = (0.0, 0)  # seconds and tokens at the last line of metrics
        self.trackers: list[Tracker] = []
        self.metrics: JsonlTracker | None = None  # on rank 0
        self.first_bad_step = torch.zeros((), dtype=torch.long, device=self.engine.device)
        self.last_figures: dict[str, float] = {}
        self.losses: list[dict[str, Any]] = []  # "step" and "loss", as logged
        self.last_sound: int | None = None  # the last step that was saved whose loss was in range
        self.best: dict[str, Any] = {}  # step and figures of the best evaluation so far

    def run(self) -> Trained:
        """Train from the start or the checkpoint to the end, or until a signal or a loss that is not finite."""
        if self.rank == 0:
            checkpoint.clean(self.root)
        dist.barrier()
        if self.start.checkpoint is not None:
            self._resume(self.start.checkpoint)
        if self.rank == 0:
            self._set_others_aside()
            self.trackers = self._open_trackers()
        trained = Trained(exit_code=0, config=self.config, tokenizer=self.data.tokenizer)
        try:
            signal_number = self._train()
        except NonFiniteLoss as err:
            if self.rank == 0:
                say_not_finite(self.record, err, self.folder, self.plan)
            trained.exit_code = NOT_FINITE
            return trained
        finally:
            for tracker in self.trackers:
                tracker.close()
        if signal_number:
            if self.rank == 0:
                say_interrupted(self.record, signal_number, self.step, self.plan)
            trained.exit_code = 128 + signal_number
            return trained
        trained.finished, trained.state_dict = True, self._weights_to_export()
        return trained

    def _train(self) -> int:
        """Train to the last step; the number of the signal that ended it early, or 0."""
        batches = self._batches()
        first_step = self.step + 1
        self.engine.train()
        self.logged = (self.clock.elapsed, self._tokens(self.step))
        progress = Progress(self.step, self.plan.total_steps, shown=self.rank == 0)
        with self.clock.running(), progress:
            while self.step < self.plan.total_steps:
                losses = self._optimizer_step(batches)
                stop = self.stopper.agreed()
                log, evaluate, save = map(self._is_due, ("logging_steps", "eval_steps", "save_steps"))
                if log or evaluate or save or stop:
                    self._check_finite()
                if self.step == first_step:
                    self._report_first_step(losses, progress)
                if log:
                    self._log_training(losses, progress)
                with self.clock.paused():
                    is_best = self._evaluate(progress) if evaluate else False
                    if save or stop or is_best:
                        self._save()
                if stop:
                    return stop
        return 0

    def _is_due(self, cadence: str) -> bool:
        """Return whether the step that was just taken is one of those, or the last one."""
        return self.step % getattr(self.plan, cadence) == 0 or self.step == self.plan.total_steps

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Return this rank's micro-batches, from the present step on."""
        sampler = GlobalBatchSampler(
            num_blocks=len(self.data.train),
            batch_size=self.plan.train_batch_size,
            micro_batch_size=self.plan.per_device_train_batch_size,
            rank=self.rank,
            world_size=self.world,
            seed=self.plan.seed,
            start_step=self.step,
            num_steps=self.plan.total_steps,
        )
        return iter(data_loader(self.data.train, sampler, pin_memory=torch.cuda.is_available()))

    def _optimizer_step(self, micro_batches: Iterator[dict[str, torch.Tensor]]) -> StepLosses:
        """Take one optimizer step, and return this rank's part of its losses."""
        accumulation = self.plan.gradient_accumulation_steps
        next_tokens = self._blocks_in_step(self.step) * (self.plan.block_size - 1)
        self.rate = self.engine.optimizer.param_groups[0]["lr"]
        losses = StepLosses(accumulation, self.engine.device)
        for _ in range(accumulation):
            batch = next(micro_batches)
            output = self.engine(
                input_ids=batch["input_ids"].to(self.engine.device, non_blocking=True),
                labels=batch["labels"].to(self.engine.device, non_blocking=True),
                skip_logits=True,
                num_items_in_batch=next_tokens / (self.world * accumulation),
            )
            self.engine.backward(output.loss)
            self.engine.step()
            losses.add(output)
        self.masters.refresh()
        self.step += 1
        bad = ~torch.isfinite(losses.of_rank) & (self.first_bad_step == 0)
        self.first_bad_step += bad * self.step
        return losses

    def _blocks_in_step(self, step: int) -> int:
        """Return blocks in the global batch of 0-based `step`: the last batch of an epoch may be short."""
        first = step % self.plan.steps_per_epoch * self.plan.train_batch_size
        return min(self.plan.train_batch_size, len(self.data.train) - first)

    def _tokens(self, steps: int) -> int:
        """Return training tokens in the first `steps` optimizer steps."""
        epochs, rest = divmod(steps, self.plan.steps_per_epoch)
        return (epochs * len(self.data.train) + rest * self.plan.train_batch_size) * self.plan.block_size

    def _check_finite(self) -> None:
        """Raise NonFiniteLoss, on all ranks, if a step since the last check had a loss that is not finite."""
        steps = self.first_bad_step.clone()
        dist.all_reduce(steps, op=dist.ReduceOp.MAX)
        if step := int(steps):
            epoch, batch = divmod(step - 1, self.plan.steps_per_epoch)
            raise NonFiniteLoss(f"the loss of step {step} (epoch {epoch}, global batch {batch}) is not finite", step)

    def _report_first_step(self, losses: StepLosses, progress: Progress) -> None:
        """Record how long it took, and all before it, in the last of `run.json`'s starts. It waits for the device.

        The speed counts from here on: the first step compiles and warms up.
        """
        losses.of_rank.item()
        took, since_start = self.clock.elapsed - self.logged[0], seconds_since_start()
        compiling = ", compiling included" if self.plan.compile else ""
        progress.note(
            f"the first step is done, {duration(since_start)} after the start: {duration(since_start - took)} to get "
            f"ready and {duration(took)} for the step{compiling}"
        )
        if self.rank == 0:
            *earlier, start = self.record.facts["starts"]
            start |= {"seconds_to_first_step": round(since_start, 3), "first_step_seconds": round(took, 3)}
            self.record.update(starts=[*earlier, start])
        self.logged = (self.clock.elapsed, self._tokens(self.step))

    def _log_training(self, losses: StepLosses, progress: Progress) -> None:
        """Log a line of metrics. It waits for the device."""
        means = losses.means()
        seconds, tokens = self.logged
        self.logged = (self.clock.elapsed, self._tokens(self.step))
        trained = self.logged[1] - tokens
        speed = trained / (self.logged[0] - seconds) if trained else None  # None of a first step alone
        peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        grad_norm = self.engine.get_global_grad_norm()
        self._log(
            {
                **means,
                "learning_rate": self.rate,
                "grad_norm": None if grad_norm is None else float(grad_norm),
                "epoch": round(self.step / self.plan.steps_per_epoch, 4),
                "tokens": self.logged[1],
                "tokens_per_second": None if speed is None else round(speed, 1),
                "mfu": speed * self.plan.flops_per_token / (peak * self.world) if speed and peak else None,
                "peak_memory_bytes": peak_memory_bytes(),
            }
        )
        self.losses.append({"step": self.step, "loss": means["loss"]})
        left = self.plan.total_steps - self.step
        tokens_left = left * self.plan.train_batch_size * self.plan.block_size
        progress.show(self.step, means["loss"], speed, tokens_left)

    def _log(self, record: dict[str, Any]) -> None:
        record = {"step": self.step, "elapsed_seconds": round(self.clock.elapsed, 3), **record}
        for tracker in self.trackers:
            tracker.log(record)

    def _evaluate(self, progress: Progress) -> bool:
        """Evaluate, and log it; whether these weights are the best so far, and to be kept."""
        self.engine.eval()
        batches = eval_batches(len(self.data.validation), self.plan.per_device_eval_batch_size, self.rank, self.world)
        with torch.no_grad():
            self.last_figures = evaluate(
                lambda ids, labels: self.engine(input_ids=ids, labels=labels, return_token_scores=True).token_scores,
                (self.data.validation.__getitems__(indices) for indices in batches),
                self.engine.device,
            )
        self.engine.train()
        self._log(dict(self.last_figures))
        progress.note(f"step {self.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in self.last_figures.items()))
        loss = self.last_figures["eval_loss"]
        if not np.isfinite(loss):
            raise NonFiniteLoss(f"the validation loss after step {self.step} is not finite", self.step + 1)
        if not self.plan.load_best_model_at_end or loss >= self.best.get("eval_loss", np.inf):
            return False
        self.best = {"step": self.step, **self.last_figures}
        self.record.update(best=self.best)
        return True

    def _save(self) -> None:
        states: list[Any] = [None] * self.world
        dist.all_gather_object(states, rng_state())
        if self.metrics is not None:
            self.record.update(logged=self.metrics.logged())
        checkpoint.save(
            self.engine,
            self.root,
            self.step,
            client_state={
                "step": self.step,
                "elapsed_seconds": self.clock.elapsed,
                "rng": states,
                "best": self.best,
                "figures": self.last_figures,
            },
            manifest={
                "identity": self.plan.identity(),
                "cut": self.plan.sharding(),
                "plan": as_dict(self.plan),
                "record": {name: fact for name, fact in self.record.facts.items() if name != "plan"},
            },
            keep=self.plan.save_total_limit,
            keep_too=self._kept_too(),
            describe_model=self._describe_model,
            at_least_bytes=12 * self.plan.num_parameters,  # float32 masters and AdamW's two moments, at least
        )

    def _kept_too(self) -> set[int]:
        """Return steps whose checkpoints are not deleted: the best evaluation's, and the last before a divergence."""
        if out_of_range(self.losses, self.step) is None:
            self.last_sound = self.step
        return {step for step in (self.best.get("step"), self.last_sound) if step not in (None, self.step)}

    def _describe_model(self, folder: Path) -> None:
        self.data.tokenizer.save_pretrained(folder)
        self.config.to_json_file(folder / "config.json")

    def _resume(self, path: Path) -> None:
        """Take over weights, states, clock and random numbers from a checkpoint."""
        with reapply(self.engine, self.plan.ds_config, self.start.step):
            state = (loading.load_universal if self.universal else loading.load)(self.engine, path)
        self.masters.refresh()
        self.step = self.last_sound = state["step"]
        self.clock = Stopwatch(state["elapsed_seconds"])
        self.last_figures = state.get("figures", {})
        if self.plan.load_best_model_at_end:
            self.best = state.get("best", {})
            self.record.update(best=self.best)
        if len(state["rng"]) == self.world:
            set_rng_state(state["rng"][self.rank])
        else:  # the ranks see other sequences than those before: fresh dropout, and the same at each such resume
            seed_everything(int(np.random.SeedSequence([self.plan.seed, self.step, self.rank]).generate_state(1)[0]))

    def _set_others_aside(self) -> None:
        """Move what checkpoints are in the folder beside those that lead here, with the metrics so far. On rank 0."""
        path = self.start.checkpoint
        own = path is not None and path.parent == self.root.resolve()
        aside = checkpoint.set_aside(self.root, self.step + 1 if own else 0, self.folder / METRICS)
        if aside is None:
            return
        print(f"{aside}: the checkpoints after step {self.step if own else 0}, which do not lead here", file=sys.stderr)

    def _open_trackers(self) -> list[Tracker]:
        tracked = TrackedRun(
            folder=self.folder,
            name=self.folder.name,
            group=self.plan.spec.family,
            facts=self.record.facts,
            resume_step=self.step,
            remember=self.record.update,
        )
        named = [TRACKERS[name].open(tracked) for name in self.plan.report_to]
        self.metrics = JsonlTracker(self.folder / METRICS, self.step, self.start.logged)
        *earlier, start = self.record.facts["starts"]
        lost = {kind: steps.ranges for kind, steps in self.metrics.lost.items()}
        start |= {"metrics_damaged": self.metrics.damaged, "metrics_lost": lost} if self.metrics.damaged or lost else {}
        self.record.update(starts=[*earlier, start], logged=self.metrics.logged())
        return [self.metrics, *named]

    def _weights_to_export(self) -> dict[str, torch.Tensor] | None:
        """Return, on rank 0, the float32 weights of the last or, if asked for, the best step, and its figures."""
        figures = {k: v for k, v in self.best.items() if k != "step"} or self.last_figures
        if figures:  # a run that was killed between its last checkpoint and the export has nothing left to evaluate
            self.record.update(final_eval=figures, train_seconds=round(self.clock.elapsed, 3))
        if not self.best or self.best["step"] == self.step:
            return float32_state_dict(self.engine)
        if self.rank:
            return None
        kept = self.root / checkpoint.name_of(self.best["step"])
        print(f"the best evaluation was at step {self.best['step']}: {kept} is exported", file=sys.stderr)
        return loading.float32_weights(kept, checkpoint.read_manifest(kept)["cut"]["zero_stage"])
