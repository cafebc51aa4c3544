"""A run's folder as read. What a run lacks (an old or damaged record) is None here, never a guess."""

import functools
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.plan import recipe
from ..config.saved_plan import saved_plan
from ..evaluation import streams_in
from ..faults import UsageError
from ..folders import METRICS, holds_run
from ..models.streams import Stream
from ..records import cure, read_facts, recorded_streams, status_of
from ..trackers.jsonl import Steps, in_words, lost_steps, read_lines, steps_of

AXES = ("tokens", "steps", "time", "flops")  # what curves are drawn against
# How long a run's schedule is: fields of a plan, and the params of its schedule that follow from them.
LENGTH = ("total_steps", "warmup_steps")
FOLLOWING_LENGTH = ("total_num_steps", "warmup_num_steps", "total_steps", "T_max")
# Fields of a plan that other figures of a report show, or that follow from data and variant.
SHOWN_ELSEWHERE = ("variant", "num_parameters", "flops_per_token", "data_fingerprint", "model", "optimizer", "schedule")


@dataclass(frozen=True)
class SavedRun:
    """A run's folder as read.

    Attributes:
        folder: as it was named.
        facts: of `run.json`.
        training: the records with a "loss", in order.
        evaluations: the records with an "eval_loss", in order.
        damage: what `metrics.jsonl` has lost, in words; "" where it is whole.
    """

    folder: Path
    facts: dict[str, Any]
    training: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    damage: str = ""

    @property
    def variant(self) -> str:
        """The variant's name, known to the registry or not."""
        return str(self.facts.get("variant", "unknown variant"))

    @functools.cached_property
    def status(self) -> str:
        """The status in `run.json`: running, finished, interrupted or failed; or died, which only a reader can tell."""
        return status_of(self.facts)

    @property
    def finished(self) -> bool:
        """Whether it trained to its end and was exported."""
        return self.status == "finished"

    @functools.cached_property
    def plan(self) -> dict[str, Any]:
        """The fields of the run's plan; None what an older record does not tell."""
        return saved_plan(self.folder, self.facts)

    @functools.cached_property
    def recipe(self) -> str:
        """What decides results or cost, but for the seed, as JSON: equal for runs that are seeds of one recipe."""
        return json.dumps(recipe(self.plan), sort_keys=True)

    @functools.cached_property
    def recipe_of_any_length(self) -> str:
        """The same as `recipe`, but equal for runs that differ in the length of the schedule too."""
        told = {name: value for name, value in recipe(self.plan).items() if name not in LENGTH}
        schedule = told.get("schedule") or {}
        params = {k: v for k, v in (schedule.get("params") or {}).items() if k not in FOLLOWING_LENGTH}
        return json.dumps(told | {"schedule": {**schedule, "params": params}}, sort_keys=True)

    @functools.cached_property
    def settings(self) -> dict[str, str]:
        """What a reader is told of the recipe by name, as text; data set and tokenizer by the names given."""
        told = {k: v for k, v in recipe(self.plan).items() if k not in SHOWN_ELSEWHERE}
        told |= {name: self.plan.get(name) for name in ("dataset", "tokenizer")}
        model = {k: v for k, v in (self.plan.get("model") or {}).items() if k not in ("bos_token_id", "eos_token_id")}
        if model.get("n_positions") == self.block_size:
            model.pop("n_positions", None)
        model.pop("vocab_size", None)  # follows from tokenizer and variant
        for name in ("optimizer", "schedule"):
            section = self.plan.get(name) or {}
            told |= {name: section.get("type"), **{f"{name}.{k}": v for k, v in section.get("params", {}).items()}}
        for repeated in ("warmup_max_lr", "warmup_num_steps", "total_num_steps"):
            told.pop(f"schedule.{repeated}", None)
        told |= model
        return {k: v if isinstance(v, str) else json.dumps(v) for k, v in told.items() if v not in (None, [], {}, ())}

    @property
    def seed(self) -> int | None:
        """The seed of initialisation, data order and dropout."""
        return self.plan.get("seed")

    @property
    def block_size(self) -> int | None:
        """Tokens per training sequence."""
        return self.plan.get("block_size")

    @property
    def step(self) -> int:
        """The last one that a record tells of."""
        return max((r["step"] for r in (*self.training, *self.evaluations)), default=0)

    @property
    def schedule_end(self) -> int:
        """The step at which the schedule ends, as far as is known; not before the last one of a record."""
        return max(self.step, self.plan.get("total_steps") or 0)

    @property
    def final(self) -> dict[str, Any]:
        """The figures of the exported weights: of the last evaluation, or of the best; empty where there was none."""
        if self.plan.get("load_best_model_at_end") and self.facts.get("final_eval"):
            return self.facts["final_eval"]
        return self.evaluations[-1] if self.evaluations else self.facts.get("final_eval") or {}

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The streams beside the next-token one that `final` tells of; of an older record, by the figures' names."""
        return tuple(streams_in(self.final, recorded_streams(self.facts)))

    @property
    def num_parameters(self) -> int | None:
        """Tied ones counted once."""
        return self.facts.get("num_parameters")

    @property
    def flops_per_token(self) -> float | None:
        """Training FLOPs per token of data."""
        return self.facts.get("flops_per_token")

    @property
    def unigram_perplexity(self) -> float | None:
        """The perplexity of the validation text under the counts of the training text."""
        return self.facts.get("unigram_perplexity")

    @property
    def tokens(self) -> float | None:
        """Training tokens, with repeats, up to the last step."""
        return self.tokens_at(self.step)

    @property
    def tokens_per_step(self) -> float | None:
        """The mean number of training tokens per optimizer step."""
        return self.tokens / self.step if self.step and self.tokens is not None else None

    @property
    def seconds(self) -> float | None:
        """The seconds of training, without evaluations and checkpoints."""
        last = [r["elapsed_seconds"] for r in (*self.training, *self.evaluations) if "elapsed_seconds" in r]
        return max(last, default=self.facts.get("train_seconds"))

    @property
    def tokens_per_second(self) -> float | None:
        """The median of those logged."""
        speeds = [r["tokens_per_second"] for r in self.training if r.get("tokens_per_second") is not None]
        return statistics.median(speeds) if speeds else None

    @property
    def peak_memory_bytes(self) -> float | None:
        """The memory of one process at most: GPU memory on CUDA, else the resident set."""
        return max((r["peak_memory_bytes"] for r in self.training if r.get("peak_memory_bytes")), default=None)

    @property
    def machine(self) -> str | None:
        """Device and number of processes; None if the run moved between several, or does not say."""
        starts = {(start.get("device"), start.get("world_size")) for start in self.facts.get("starts") or [{}]}
        device, world_size = starts.pop()
        if starts or device is None:
            return None
        return f"{world_size} x {device}"

    @property
    def on_cpu(self) -> bool:
        """Whether it ran on a CPU; `records.device_name` gives the cores of those alone."""
        return self.machine is not None and self.machine.endswith("cores)")

    def tokens_at(self, step: float) -> float | None:
        """Return training tokens up to `step`, linear between the records, since an epoch's last batch may be short."""
        known = [(0, 0), *((r["step"], r["tokens"]) for r in self.training if r.get("tokens") is not None)]
        if len(known) == 1:
            return None
        last_step, last_tokens = known[-1]
        if step > last_step:
            return last_tokens * step / last_step
        return interpolate(known, step)

    def place(self, record: dict[str, Any], axis: str) -> float | None:
        """Return where a record stands on an axis of `AXES`: steps, tokens, seconds or training FLOPs."""
        if axis == "steps":
            return record["step"]
        if axis == "time":
            return record.get("elapsed_seconds")
        tokens = self.tokens_at(record["step"])
        if axis == "tokens" or tokens is None:
            return tokens
        return None if self.flops_per_token is None else tokens * self.flops_per_token

    def evaluation_curve(self, axis: str, key: str = "eval_loss") -> list[tuple[float, float]]:
        """(place, value of `key`: "eval_loss" in nats, or "step") of each evaluation that can be placed on `axis`."""
        placed = [(self.place(record, axis), record[key]) for record in self.evaluations]
        return [(place, value) for place, value in placed if place is not None]

    def end(self, axis: str) -> float | None:
        """Return where the last evaluation stands on `axis`; None where none can be placed."""
        curve = self.evaluation_curve(axis)
        return curve[-1][0] if curve else None


def interpolate(points: Sequence[tuple[float, float]], x: float) -> float | None:
    """Return the value at `x` on the line through `points` (x, y), which rise in x; None outside of them."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            # exact at the points themselves
            return y0 if x == x0 else y1 if x == x1 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[0][1] if len(points) == 1 and points[0][0] == x else None


def read_run(folder: Path) -> SavedRun:
    """Read a run's folder; `metrics.jsonl` may be missing or damaged, which `damage` tells.

    Raises:
        UsageError: there is no `run.json`, or it cannot be read.
    """
    try:
        facts = read_facts(folder)
    except FileNotFoundError as err:
        what = f"run.json is missing; {cure(folder)}" if holds_run(folder) else "holds no run (no run.json)"
        raise UsageError([f"{folder}: {what}"]) from err
    except ValueError as err:
        raise UsageError([str(err)]) from err
    metrics = folder / METRICS
    records, damaged = read_lines(metrics) if metrics.is_file() else ([], 0)
    lost = lost_steps(facts.get("logged"), records)
    evaluations = [r for r in records if r.get("eval_loss") is not None]
    return SavedRun(
        folder,
        facts,
        training=[r for r in records if r.get("loss") is not None],
        evaluations=[*evaluations, *_last_evaluation(facts, lost)],
        damage=f"{METRICS}: {said}" if (said := in_words(damaged, lost)) else "",
    )


def _last_evaluation(facts: dict[str, Any], lost: dict[str, Steps]) -> list[dict[str, Any]]:
    """Return the record of a finished run's last evaluation from `run.json`, where `metrics.jsonl` has lost it."""
    last = max(steps_of(facts.get("logged"), "evaluations"), default=None)
    figures = facts.get("final_eval")
    exports_best = (facts.get("plan") or {}).get("load_best_model_at_end")
    if figures is None or exports_best or last not in lost.get("evaluations", ()):
        return []
    return [{"step": last, "elapsed_seconds": facts.get("train_seconds"), **figures}]
