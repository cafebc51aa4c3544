"""Measuring a run, and where the figures go: one stopwatch, FLOPs and MFU, `metrics.jsonl` always, W&B if asked.

MFU convention (PaLM, Chowdhery et al., 2022, appendix B; the same as nanoGPT's): 6 N + 12 L E S FLOPs per position, N
all parameters with the tied embedding counted once, attention counted in full though it is causal, against the device's
dense bf16 peak.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, Protocol

# Dense bf16 peak in FLOP/s, from NVIDIA's data sheets; the first name that the device's name contains counts.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("B200", 2250e12),
    ("H200", 989e12),
    ("GH200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
)


def flops_per_token(num_parameters: int, n_layer: int, n_embd: int, block_size: int, positions: int) -> float:
    """Training FLOPs (forward and backward) per token of data, in blocks of `block_size` tokens.

    `positions` is how many positions the model computes for a block: S, or 2S-1 for duo-predict.
    """
    return (6 * num_parameters + 12 * n_layer * n_embd * block_size) * positions / block_size


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of the device in FLOP/s; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS if name in device_name), None)


def peak_memory_bytes() -> int:
    """The most memory this process has held: of the GPU by torch's allocator, without one the resident set."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


class Stopwatch:
    """Seconds of training: those between `start` and `stop`, on top of the `elapsed` ones of earlier sessions."""

    def __init__(self, elapsed: float = 0.0):
        self._before, self._since = elapsed, None

    def start(self) -> None:
        """Begin to count."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Count no more, until the next `start`."""
        self._before, self._since = self.elapsed, None

    @property
    def elapsed(self) -> float:
        """Seconds so far."""
        running = 0.0 if self._since is None else time.perf_counter() - self._since
        return self._before + running


class Sink(Protocol):
    """Where metrics go."""

    def log(self, record: dict[str, Any]) -> None:
        """Take one record; "step" is among its keys."""

    def close(self) -> None:
        """No more records."""


class JsonlSink:
    """`metrics.jsonl`: one JSON object a line, flushed line by line; a resumed run goes on with no step twice."""

    def __init__(self, path: Path, resume_step: int):
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the half line of a killed process
                if record["step"] <= resume_step:
                    kept.append(line + "\n")
            aside = path.with_suffix(".tmp")
            aside.write_text("".join(kept), encoding="utf-8")
            os.replace(aside, path)
        self._file = path.open("a", encoding="utf-8")

    def log(self, record: dict[str, Any]) -> None:
        """Write one line."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class WandbSink:
    """Weights & Biases: online with an API key, offline without one. Never a prompt: it would hang the ranks."""

    def __init__(self, folder: Path, name: str, group: str, config: dict[str, Any], run_id: str):
        import wandb

        online = bool(os.environ.get("WANDB_API_KEY") or _netrc_has_wandb())
        mode = os.environ.get("WANDB_MODE") or ("online" if online else "offline")
        settings = wandb.Settings(init_timeout=30, silent=True)
        self._run = wandb.init(
            dir=str(folder),
            name=name,
            group=group,
            config=config,
            id=run_id,
            resume="allow",
            mode=mode,
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")
        if mode == "offline":
            print(f"W&B: offline (no API key); to upload later: wandb sync {folder}/wandb/offline-*", file=sys.stderr)

    def log(self, record: dict[str, Any]) -> None:
        """Log as `train/...` and `eval/...` against "step"."""
        renamed = {
            (f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}"): v for k, v in record.items() if k != "step"
        }
        self._run.log({"step": record["step"], **renamed})

    def close(self) -> None:
        """Finish the W&B run; on return all of it is on disk (offline) or uploaded."""
        import wandb

        self._run.finish()
        # finish() only tells W&B's service process to close the run's file; teardown() waits until it has
        wandb.teardown()


def _netrc_has_wandb() -> bool:
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order, without the half line of a killed process."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records
