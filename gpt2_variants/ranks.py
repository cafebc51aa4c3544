"""Which rank this process is, of how many, on what; and what rank 0 decides for all."""

import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from .faults import UsageError

T = TypeVar("T")
# Device files of NVIDIA's driver, of AMD's, and of WSL's: without any of them no GPU can be reached from Linux.
DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")


def main_rank() -> bool:
    """Return whether this process is the one that speaks (rank 0, or no launcher)."""
    return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """Return the number of ranks the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def has_cuda() -> bool:
    """Return whether torch sees a CUDA device; where the system has no driver, torch is not imported for the answer."""
    if "torch" not in sys.modules and sys.platform == "linux" and not any(Path(p).exists() for p in DEVICE_FILES):
        return False
    import torch

    return torch.cuda.is_available()


def use_accelerator() -> None:
    """Tell DeepSpeed, before it is imported, where there is only a CPU, so that it need not warn of finding nothing."""
    if not has_cuda():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


class RankZeroFailed(RuntimeError):
    """Rank 0 has failed, which it says itself: the other ranks have nothing to add."""


def decided_by_rank_0(decide: Callable[[], T], group: Any = None) -> T:
    """Return on every rank what `decide` returns on rank 0. A collective, of the process group `group`.

    Raises:
        UsageError: `decide` raised it on rank 0; so that no rank waits for another.
        RankZeroFailed: on the other ranks, where `decide` raised anything else on rank 0, which goes on there.
    """
    import torch.distributed as dist

    told: list[Any] = [None, None, None]  # the decision, the lines of a UsageError, any other error in words
    error: BaseException | None = None
    if dist.get_rank() == 0:
        try:
            told[0] = decide()
        except UsageError as err:
            told[1] = err.lines
        except Exception as err:
            told[2], error = f"{type(err).__name__}: {err}", err
    dist.broadcast_object_list(told, group=group)
    if told[1]:
        raise UsageError(told[1])
    if told[2]:
        raise error or RankZeroFailed(f"rank 0 failed: {told[2]}")
    return told[0]


def while_others_wait(work: Callable[[], None]) -> None:
    """Do `work` on rank 0, while the other ranks wait for its end, for a day at most. A collective.

    DeepSpeed's launcher ends all ranks as soon as one has failed.

    Raises:
        RankZeroFailed: on the other ranks, where `work` failed on rank 0, or its process ended; the latter is said.
    """
    import torch.distributed as dist

    if dist.get_world_size() == 1:
        return work()
    try:
        # over the host, since NCCL does not wait for as long
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
        decided_by_rank_0(work, group)
    except RankZeroFailed:
        raise
    except RuntimeError as err:
        if main_rank():
            raise
        print(f"error: rank {dist.get_rank()}: rank 0 has ended before its work was done", file=sys.stderr)
        raise RankZeroFailed(str(err)) from err
