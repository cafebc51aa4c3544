"""Measuring a run, and where the figures go: one stopwatch, FLOPs and MFU, `metrics.jsonl` always, W&B if asked.

MFU convention (PaLM, Chowdhery et al., 2022, appendix B; the same as nanoGPT's): 6 N + 12 L E S FLOPs per position, N
all parameters with the tied embedding counted once, attention counted in full though it is causal, against the device's
dense bf16 peak.
"""

import functools
import json
import netrc
import os
import resource
import shlex
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any, Protocol

from . import network

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
        self._before = elapsed
        self._since: float | None = None

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


WANDB_MODES = ("online", "offline", "disabled", "shared")


def wandb_mode() -> tuple[str, str]:
    """W&B's mode and the reason for it: $WANDB_MODE; else online with an API key and a server that answers.

    Left to itself, W&B would ask for a key on a terminal, hanging the ranks, or wait 36 s for a server that is gone.
    """
    if asked := os.environ.get("WANDB_MODE"):
        return asked, f"WANDB_MODE is {asked}"
    if not wandb_has_key():
        return "offline", "there is no API key"
    if not network.answers(wandb_server()):
        return "offline", f"{wandb_server()} cannot be reached"
    return "online", "there is an API key"


def wandb_fault() -> str | None:
    """Why W&B could not do what $WANDB_MODE asks for, in a line; None where it can, or where nothing is asked for."""
    asked = os.environ.get("WANDB_MODE")
    if asked and asked not in WANDB_MODES:
        return f"WANDB_MODE={asked}: one of {', '.join(WANDB_MODES)} is allowed"
    if asked != "online":
        return None
    if not wandb_has_key():
        return "WANDB_MODE=online: there is no API key; set WANDB_API_KEY or run `wandb login`, or WANDB_MODE=offline"
    if not network.answers(wandb_server()):
        return (
            f"WANDB_MODE=online: {wandb_server()} cannot be reached; WANDB_MODE=offline keeps the run to upload later"
        )
    return None


def wandb_server() -> str:
    """Its address: $WANDB_BASE_URL, else the public one."""
    return os.environ.get("WANDB_BASE_URL", "").rstrip("/") or "https://api.wandb.ai"


def wandb_has_key() -> bool:
    """Whether an API key is in the environment or, as `wandb login` leaves it, in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        known = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return known.authenticators(urllib.parse.urlsplit(wandb_server()).hostname or "") is not None


class WandbSink:
    """Weights & Biases. What cannot go online is kept offline, and it is said why and how to upload it. Never a prompt.

    Args:
        folder: of the run; W&B's files go to `wandb/` in it.
        name, group, config: what W&B shows.
        run_id: of W&B's run; one that exists is gone on with.

    Raises:
        wandb.Error: W&B refuses, where $WANDB_MODE asks for more than offline.
    """

    def __init__(self, folder: Path, name: str, group: str, config: dict[str, Any], run_id: str):
        import wandb

        mode: Any
        mode, reason = wandb_mode()
        start = functools.partial(
            wandb.init,
            project=os.environ.get("WANDB_PROJECT") or "gpt2_variants",
            dir=str(folder),
            name=name,
            group=group,
            config=config,
            id=run_id,
            resume="allow",
            settings=wandb.Settings(init_timeout=30, silent=True),
        )
        try:
            self._run = start(mode=mode)
        except wandb.Error as err:
            if os.environ.get("WANDB_MODE"):
                raise
            mode, reason = "offline", " ".join(str(err).split())[:200]
            wandb.teardown()
            self._run = start(mode=mode)
        self._run.define_metric("*", step_metric="step")
        self._sync_line = f"wandb sync {shlex.quote(str(folder))}/wandb/offline-*" if mode == "offline" else None
        if mode == "online":
            print(f"W&B: {self._run.url}", file=sys.stderr)
        elif self._sync_line:
            print(f"W&B: offline ({reason}); to upload it later: {self._sync_line}", file=sys.stderr)

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
        if self._sync_line:
            print(f"W&B: kept offline; to upload it: {self._sync_line}", file=sys.stderr)


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
