"""One way of training, measured in a process of its own: the engine's loop as `train_ds.py` runs it, or a reference.

A parent makes a `Worker` for a `Case`, asks it for steps, and closes it. What is measured is an optimizer step on
random tokens that were made once and lie on the device: forward, backward, clipping, AdamW, schedule.
"""

import functools
import itertools
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gpt2_variants.config.optimizer_json import make_schedule
from gpt2_variants.config.options import Options
from gpt2_variants.config.plan import DataFacts, Plan, make_plan
from gpt2_variants.measuring import peak_memory_bytes
from gpt2_variants.models.modeling_base import recompute_blocks
from gpt2_variants.ranks import use_accelerator, world_size
from gpt2_variants.training.engine import init_distributed, keep_freed_memory, make_engine

MODELS = ("own", "dense_duo_predict", "stock", "published")
LOOPS = ("deepspeed", "plain")


@dataclass(frozen=True)
class Case:
    """What one process measures.

    Attributes:
        name: in the tables.
        run: resolved; says variant, size, batch, attention, compilation and DeepSpeed config.
        vocabulary: entries of the tokenizer.
        dtype: "bfloat16" or "float32".
        loop: "deepspeed": the engine, as in training. "plain": the same arithmetic in plain PyTorch.
        model: "own": the variant's. "dense_duo_predict": interleaved, dense mask. "stock": `GPT2LMHeadModel` with
            labels, and compiled as a whole where the run compiles. "published": the same with eager attention,
            gradient checkpointing, and float32 weights under autocast, as the Trainer's `bf16=True` has it.
        reference: the case whose speed it is set against.
        what: a line for the tables.
    """

    name: str
    run: Options
    vocabulary: int
    dtype: str
    loop: str = "deepspeed"
    model: str = "own"
    reference: str | None = None
    what: str = ""

    @property
    def is_variant(self) -> bool:
        """Whether it is a variant as it is trained, and no reference."""
        return self.name == self.run.spec.name

    @functools.cached_property
    def plan(self) -> Plan:
        """What the run is, in `dtype`."""
        options = replace(self.run, bf16=self.dtype == "bfloat16")
        # the steps are the run's max_steps, however many blocks there are
        data = DataFacts(1, None, "random tokens", None)
        return make_plan(options, data, options.make_config(self.vocabulary), world_size())


class CaseFailed(RuntimeError):
    """A case could not be measured; says why."""


class Trainer:
    """A case set up in this process.

    Attributes:
        losses: of each step so far, on the device.
        facts: what the case is, in numbers, and how long setting it up took.
    """

    def __init__(self, case: Case):
        start = time.perf_counter()
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
        self.case, plan = case, case.plan
        block_size, sequences = plan.block_size, plan.train_batch_size
        positions = plan.spec.on_meta(plan.model_config()).positions(block_size)
        self.items = sequences * (block_size - 1) / plan.gradient_accumulation_steps  # as `training` counts labels
        self.step = (engine_step if case.loop == "deepspeed" else plain_step)(self)
        self.losses: list[torch.Tensor] = []
        generator = torch.Generator().manual_seed(plan.seed)
        micro = (plan.per_device_train_batch_size, block_size)
        self.batches = [
            torch.randint(0, case.vocabulary, micro, generator=generator).to(self.device or "cpu")
            for _ in range(plan.gradient_accumulation_steps)
        ]
        self.facts: dict[str, Any] = {
            "parameters": plan.num_parameters,
            "flops_per_token": plan.flops_per_token,
            "sequences": sequences,
            "micro_batch": micro[0],
            "block_size": block_size,
            "tokens_per_step": sequences * block_size,
            "positions_per_step": sequences * positions,
            "build_seconds": time.perf_counter() - start,
        }

    def seconds(self, steps: int) -> list[float]:
        """Take `steps` optimizer steps; the seconds of each.

        On a GPU by events, so that the host waits for the device at the end only, as in training.

        Raises:
            CaseFailed: a loss was not finite.
        """
        if self.device is None:
            marks = [time.perf_counter()]
            for _ in range(steps):
                self.losses.append(self.step(self.batches))
                marks.append(time.perf_counter())
            taken = [after - before for before, after in itertools.pairwise(marks)]
        else:
            torch.cuda.synchronize()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
            events[0].record()
            for event in events[1:]:
                self.losses.append(self.step(self.batches))
                event.record()
            torch.cuda.synchronize()
            taken = [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(events)]
        if not all(math.isfinite(loss) for loss in self.losses):
            raise CaseFailed(f"a loss was not finite: {[round(float(loss), 3) for loss in self.losses]}")
        return taken

    def memory(self) -> dict[str, int | None]:
        """Return bytes: the peak so far, what is held between steps, and what torch reserved at most (GPU only)."""
        if self.device is None:
            import psutil

            return {
                "peak_memory_bytes": peak_memory_bytes(),
                "steady_memory_bytes": psutil.Process().memory_info().rss,
                "peak_reserved_bytes": None,
            }
        return {
            "peak_memory_bytes": peak_memory_bytes(),
            "steady_memory_bytes": torch.cuda.memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }


Step = Callable[[list[torch.Tensor]], torch.Tensor]


def engine_step(trainer: Trainer) -> Step:
    """Return a step as `training` takes it: micro-batches -> mean loss."""
    init_distributed()
    engine, masters = make_engine(trainer.case.plan)
    engine.train()

    def step(batches: list[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros((), device=engine.device)
        for ids in batches:
            loss = engine(input_ids=ids, labels=ids, skip_logits=True, num_items_in_batch=trainer.items).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        masters.refresh()
        return total / len(batches)

    return step


def plain_step(trainer: Trainer) -> Step:
    """Return the same arithmetic without DeepSpeed: micro-batches -> mean loss.

    Weights and gradients are bf16. AdamW (torch's, with the JSON's settings) updates float32 masters, which start from
    the rounded weights as the engine's do; gradients are cast to float32 and clipped by their norm before, the masters
    rounded into the weights after. In float32, and under autocast, the weights are their own masters.
    """
    case, plan, device = trainer.case, trainer.case.plan, trainer.device or "cpu"
    model, autocast = make_model(case, device)
    weights = list(model.parameters())
    rounded = weights[0].dtype != torch.float32
    masters = [w.detach().float().requires_grad_() for w in weights] if rounded else weights
    settings = {k: v for k, v in plan.optimizer["params"].items() if k != "torch_adam"}
    groups = [
        {"params": [m for m in masters if m.ndim >= 2], "weight_decay": plan.weight_decay},
        {"params": [m for m in masters if m.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, **settings)
    schedule = make_schedule(plan.ds_config)(optimizer)
    own = {} if case.model in ("stock", "published") else {"skip_logits": True, "num_items_in_batch": trainer.items}

    def step(batches: list[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros((), device=device)
        for ids in batches:
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
                loss = model(input_ids=ids, labels=ids, **own).loss
            (loss / len(batches)).backward()
            total += loss.detach()
        if rounded:
            for weight, master in zip(weights, masters):
                master.grad, weight.grad = weight.grad.float(), None
        if plan.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(masters, plan.gradient_clipping)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if rounded:
            with torch.no_grad():
                torch._foreach_copy_(weights, masters)
        return total / len(batches)

    return step


def make_model(case: Case, device) -> tuple[torch.nn.Module, bool]:
    """Return the model of a plain loop, seeded as the engine's, in training mode, and if it runs under autocast."""
    from transformers import GPT2LMHeadModel

    from dense_duo_predict import DenseDuoPredictLMHeadModel

    plan = case.plan
    classes = {
        "own": plan.spec.model_class,
        "dense_duo_predict": DenseDuoPredictLMHeadModel,
        "stock": GPT2LMHeadModel,
        "published": GPT2LMHeadModel,
    }
    # a dense mask of bools is what sdpa takes; eager attention would add it
    attention = {"published": "eager", "dense_duo_predict": "sdpa"}.get(case.model, plan.attn_implementation)
    published, halved = case.model == "published", case.dtype == "bfloat16"
    torch.manual_seed(plan.seed)
    model = classes[case.model]._from_config(plan.model_config(), attn_implementation=attention)
    model.loss_type = "ForCausalLM"  # unset, transformers warns of it within the forward pass, where it splits a graph
    model.to(device, torch.bfloat16 if halved and not published else torch.float32).train()
    if plan.gradient_checkpointing or published:
        recompute_blocks(model)
    if plan.compile and not published:
        if case.model == "stock":
            model.compile()
        else:
            model.compile_parts()
    torch.manual_seed(plan.seed)
    return model, halved and published


def processes():
    """Return how processes are made: afresh; on a CPU, to save seconds, from one that has imported the libraries."""
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    use_accelerator()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["gpt2_variants.training.engine", "transformers.models.gpt2.modeling_gpt2", "deepspeed"]
    )
    return context


class Worker:
    """A fresh process that has set a case up, and takes steps when asked.

    Args:
        caches: folder of compiled code; new, where the first step is to show what compiling costs.

    Raises:
        CaseFailed: by every method too; the process is gone then.
    """

    def __init__(self, case: Case, caches: Path):
        context = processes()
        self._pipe, other_end = context.Pipe()
        caches.mkdir(exist_ok=True)
        self._log = caches / "log"
        arguments = (other_end, case, caches)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        other_end.close()
        self.facts: dict[str, Any] = self._receive()

    def seconds(self, steps: int) -> list[float]:
        """Do what `Trainer.seconds` does."""
        return self._ask("seconds", steps)

    def memory(self) -> dict[str, int | None]:
        """Do what `Trainer.memory` does."""
        return self._ask("memory")

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join(timeout=30)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()

    def _ask(self, *request: Any) -> Any:
        try:
            self._pipe.send(request)
        except OSError:
            raise CaseFailed("its process ended before") from None
        return self._receive()

    def _receive(self) -> Any:
        try:
            answer, fault = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            fault = f"ended with exit code {code}"
            if code < 0:
                fault = f"killed by {signal.Signals(-code).name}" + (": out of memory?" if code == -9 else "")
            fault = " ".join([fault, *self._log.read_text(errors="replace").splitlines()[-1:]])
        if fault:
            self.close()
            raise CaseFailed(fault)
        return answer


def _serve(pipe, case: Case, caches: Path) -> None:
    """Answer (value, None), or (None, why not) and end: the worker's side."""
    with (caches / "log").open("w") as file:  # what the libraries say
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # a single rank, whatever the parent is part of
    os.environ.update(TORCHINDUCTOR_CACHE_DIR=f"{caches}/inductor", TRITON_CACHE_DIR=f"{caches}/triton")
    keep_freed_memory()
    try:
        trainer = Trainer(case)
        answer: Any = trainer.facts
        while True:
            pipe.send((answer, None))
            name, *arguments = pipe.recv()
            answer = getattr(trainer, name)(*arguments)
    except EOFError:  # the parent is done
        return
    except Exception as err:
        reason = str(err).strip().splitlines() or [""]
        pipe.send((None, reason[0] if isinstance(err, CaseFailed) else f"{type(err).__name__}: {reason[0]}"))
