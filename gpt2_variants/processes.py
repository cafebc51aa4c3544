"""Whether a process that a record tells of is still there, and how old this one is. No clock that can be set counts."""

import os
import platform
import time
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """Return what tells this process from all others, for a record.

    `pid`; `host`; `boot`, the kernel's id of its start, and `namespace`, of process ids, within which the pid counts;
    `started`, in ticks of the kernel's clock since that start. All but the first two are None outside of Linux.
    """
    pid = os.getpid()
    _, started = _stat(pid)
    return {"pid": pid, "host": platform.node(), "boot": _boot(), "namespace": _namespace(), "started": started}


def lives(told: dict[str, Any]) -> bool | None:
    """Return whether the process lives that `this_process` told of; None where that cannot be known from here.

    It cannot of a process on another host or in another container, nor outside of Linux.
    """
    boot = _boot()
    if boot is None or told.get("boot") is None or told.get("host") != platform.node():
        return None
    if told["boot"] != boot:
        return False  # the machine was started anew since
    if told.get("namespace") != _namespace() or not isinstance(told.get("pid"), int):
        return None
    state, started = _stat(told["pid"])
    return state not in (None, "Z", "X") and started == told.get("started")


def seconds_since_start() -> float:
    """Return how old this process is."""
    _, started = _stat(os.getpid())
    if started is None:
        import psutil

        return time.time() - psutil.Process().create_time()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> tuple[str | None, int | None]:
    """Return a process's state, a letter, and its start in ticks; None of each where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return None, None


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def _namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
