"""The loss head alone, forward and backward: ours, and what else computes the loss of a vocabulary's logits.

Every alternative has a process of its own, which makes its memory its own; the processes take their steps in turn.

Shape legend: N rows (predictions), E channels, V vocabulary.
"""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.managers import BaseManager, RemoteError
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from gpt2_variants.models.loss_head import LMHead, chunk_rows
from training_case import processes

OURS, COMPILED, PLAIN, TORCH, LIGER = "ours", "ours, compiled", "plain", "torch's linear_cross_entropy", "Liger"
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """N, E and V of the inputs."""

    rows: int
    channels: int
    vocabulary: int


def device_type() -> str:
    """Return where everything is measured: "cuda" where there is such a device, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def missing(alternative: str) -> str | None:
    """Return why the alternative is not measured here; None where it is."""
    if alternative == TORCH and not (hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")):
        return "not in this torch"
    if alternative == LIGER and device_type() == "cpu":
        return "for GPUs: not measured on a CPU"
    if alternative == LIGER and importlib.util.find_spec("liger_kernel") is None:
        return "not installed"
    return None


def make_loss(alternative: str, weight: nn.Parameter) -> Loss:
    """Return the alternative as a function: `hidden` (N, E) and targets (N,) to the summed loss under `weight` (V, E).

    Raises:
        ValueError: there is no such alternative.
    """
    if alternative in (OURS, COMPILED):
        with torch.device("meta"):
            head = LMHead(weight.shape[1], weight.shape[0], bias=False)
        head.weight = weight
        if alternative == COMPILED:
            head.compile_loss()
        return lambda hidden, targets: head(hidden.unsqueeze(0), targets.unsqueeze(0), summed=True)[0]
    if alternative == TORCH:
        chunked = nn.LinearCrossEntropyOptions()  # without them it makes all logits
        return lambda hidden, targets: F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=chunked)
    if alternative == LIGER:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        return lambda hidden, targets: loss(weight, hidden, targets)
    if alternative != PLAIN:
        raise ValueError(f"there is no loss head {alternative!r}")
    return lambda hidden, targets: F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def inputs(shape: Shape, dtype: torch.dtype) -> tuple[nn.Parameter, nn.Parameter, torch.Tensor]:
    """Return `hidden` (N, E) as the last norm gives it, `weight` (V, E) as GPT-2's is initialised, targets (N,).

    The values are those of bf16 in every dtype, so that one reference serves all.
    """
    device, generator = device_type(), torch.Generator().manual_seed(0)
    hidden = torch.randn(shape.rows, shape.channels, generator=generator, dtype=torch.bfloat16)
    weight = torch.randn(shape.vocabulary, shape.channels, generator=generator, dtype=torch.bfloat16).mul_(0.02)
    targets = torch.randint(0, shape.vocabulary, (shape.rows,), generator=generator)
    return nn.Parameter(hidden.to(device, dtype)), nn.Parameter(weight.to(device, dtype)), targets.to(device)


def checked_rows(shape: Shape) -> int:
    """Return how many of the rows, from the first, errors are measured on: a chunk of ours, and one like the last."""
    size = chunk_rows(device_type())
    return min(shape.rows, size + (shape.rows % size or size))


def write_reference(shape: Shape, path: Path) -> None:
    """Write the loss of the checked rows in float64, and the gradients of the plain float32 head."""
    hidden, weight, targets = inputs(shape, torch.float32)
    rows = checked_rows(shape)
    hidden = hidden[:rows].detach().requires_grad_()
    make_loss(PLAIN, weight)(hidden, targets[:rows]).backward()
    with torch.no_grad():
        exact, loss = weight.double(), 0.0
        for some, their_targets in zip(hidden.split(256), targets[:rows].split(256), strict=True):
            loss += float(F.cross_entropy(some.double() @ exact.t(), their_targets, reduction="sum"))
    torch.save({"loss": loss, "hidden": hidden.grad, "weight": weight.grad}, path)


class Trial:
    """An alternative with its inputs, in this process."""

    def __init__(self, alternative: str, shape: Shape, dtype: torch.dtype):
        self.shape = shape
        self.hidden, self.weight, self.targets = inputs(shape, dtype)
        self.loss = make_loss(alternative, self.weight)

    def errors(self, reference: Path) -> dict[str, float]:
        """Against what `write_reference` wrote; of the loss in nats a row, of the gradients by the norm.

        It is the warm-up too: code is compiled for the shapes of chunks, which these rows have as well.
        """
        rows, exact = checked_rows(self.shape), torch.load(reference, map_location=self.hidden.device)
        hidden = self.hidden[:rows].detach().requires_grad_()
        loss = self.loss(hidden, self.targets[:rows])
        loss.backward()
        grads = {"hidden": hidden.grad, "weight": self.weight.grad}
        self.weight.grad = None
        return {
            "loss_error": abs(float(loss.detach().double()) - exact["loss"]) / rows,
            **{
                f"grad_{name}_error": float((grad.float() - exact[name]).norm() / exact[name].norm())
                for name, grad in grads.items()
            },
        }

    def step(self) -> dict[str, float]:
        """Forward and backward once: `seconds`, `peak_bytes` above the inputs, and `loss`, nats a row."""
        memory = _Peak()
        start = _now()
        loss = self.loss(self.hidden, self.targets)
        loss.backward()
        seconds = _now() - start
        peak = memory.bytes()
        self.hidden.grad = self.weight.grad = None
        return {"seconds": seconds, "peak_bytes": peak, "loss": float(loss.detach()) / self.shape.rows}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class _Peak:
    """The memory that this process takes, at most, above what it holds now.

    On CUDA by torch's allocator. Else the resident set by the kernel's own high-water mark, which Linux lets a process
    set back; what the C library kept of earlier allocations and uses again does not show in it.
    """

    def __init__(self):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _status_bytes("VmRSS")

    def bytes(self) -> int:
        return (
            torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status_bytes("VmHWM")
        ) - self.before


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {key}")


class _Processes(BaseManager):
    """Hands out a `Trial` that lives in a process of its own."""


_Processes.register("Trial", Trial)


def measure(
    shape: Shape, dtypes: Sequence[torch.dtype], compiled: bool, rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Return a row for each dtype and alternative. `compiled`: ours by torch.compile too; `say` is told of each row."""
    alternatives = [PLAIN, OURS, *([COMPILED] if compiled else []), TORCH, LIGER]
    rows = []
    with tempfile.TemporaryDirectory(prefix="loss-heads-") as folder:
        reference = Path(folder, "reference.pt")
        write_reference(shape, reference)
        for dtype in dtypes:
            rows += _measure_dtype(shape, dtype, alternatives, rounds, reference, say)
    return rows


def _measure_dtype(shape, dtype, alternatives, rounds, reference, say) -> list[dict[str, Any]]:
    rows = {name: {"alternative": name, "dtype": str(dtype).removeprefix("torch.")} for name in alternatives}
    steps: dict[str, list[dict[str, float]]] = {}
    with ExitStack() as stack:
        trials = {}
        for name in alternatives:
            if reason := missing(name):
                rows[name]["not_measured"] = reason
                continue
            with _noted(rows[name]):
                manager = stack.enter_context(_Processes(ctx=processes()))
                trials[name] = manager.Trial(name, shape, dtype)
                rows[name] |= trials[name].errors(reference)
        for number in range(rounds):
            for name in list(trials) if number % 2 else reversed(list(trials)):
                if "not_measured" not in rows[name]:
                    with _noted(rows[name]):
                        steps.setdefault(name, []).append(trials[name].step())
    for name, row in rows.items():
        if "not_measured" not in row:
            row |= _figures(steps[name], steps[PLAIN] if "not_measured" not in rows[PLAIN] else None)
        say(_said(row))
    return list(rows.values())


class _noted:
    """Within it, what goes wrong in a trial's process is noted in its row, and the others go on."""

    def __init__(self, row: dict[str, Any]):
        self.row = row

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> bool:
        if not isinstance(error, Exception):
            return False
        lines = [line for line in str(error).splitlines() if line.strip("- ")] or [""]
        if isinstance(error, (EOFError, ConnectionError)):
            reason = "its process was killed: out of memory?"
        elif isinstance(error, RemoteError):  # the trial could not be made: holds a traceback
            reason = lines[-1]
        else:
            reason = f"{kind.__name__}: {lines[0]}"
        self.row["not_measured"] = reason
        self.row["failed"] = True
        return True


def _figures(own: list[dict[str, float]], plain: list[dict[str, float]] | None) -> dict[str, Any]:
    seconds = [step["seconds"] for step in own]
    found = {
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "peak_bytes": max(step["peak_bytes"] for step in own),
        "loss": own[-1]["loss"],
        "rounds": seconds,
    }
    if plain is not None:
        ratios = [a["seconds"] / b["seconds"] for a, b in zip(own, plain, strict=True)]
        found |= {
            "relative": statistics.median(ratios),
            "relative_min": min(ratios),
            "relative_max": max(ratios),
            "peak_relative": found["peak_bytes"] / max(step["peak_bytes"] for step in plain),
        }
    return found


def _said(row: dict[str, Any]) -> str:
    text = row.get("not_measured")
    if text is None:
        text = f"{1000 * row['seconds']:,.1f} ms, {row['peak_bytes'] / 2**20:,.0f} MiB"
        if "relative" in row:
            text += f", {row['relative']:.2f} and {row['peak_relative']:.2f} of plain"
    return f"loss head, {row['dtype']}, {row['alternative']}: {text}"
