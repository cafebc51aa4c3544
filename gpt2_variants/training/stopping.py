"""Stopping early, all ranks together."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .. import signals

SECONDS_TO_STOP = 25.0  # DeepSpeed's launcher kills 30 s after its first signal


class Stopper:
    """Turns the signals that stop a training, and its launcher's death, into one decision of all ranks after a step.

    The handler only sets a flag. DeepSpeed's launcher signals one rank after the other, and a SIGTERM to `deepspeed`
    itself reaches no rank at all: so the flags are compared at each step, and a rank watches its launcher.
    """

    def __init__(self):
        self._signal = 0
        self._group: Any = None
        self._parents = _launcher_chain()
        self._ended = threading.Event()
        self._received, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        self._numbers = signals.that_stop()
        self._handlers = contextlib.ExitStack()
        self._handlers.enter_context(signals.handled(self._numbers, self._on_signal))

    def when_stuck(self, say: Callable[[int], None]) -> None:
        """Call `say` with the number of a signal that has not ended the run after 25 s.

        On a GPU a rank waits for a dead one in the driver, where Python's handlers do not run; then it is killed.
        """

        def watch() -> None:
            while number := self._received.recv(1):  # nothing, once the run is over
                if number[0] in self._numbers and not self._ended.wait(SECONDS_TO_STOP):
                    say(number[0])

        threading.Thread(target=watch, daemon=True).start()

    def close(self) -> None:
        """The run is over: signals mean again what they meant before, and the ranks' group for them is given back."""
        self._ended.set()
        self._handlers.close()
        signal.set_wakeup_fd(self._wakeup_before)
        self._wakeup.close()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = self._signal or number  # of Ctrl-C the launcher makes a SIGTERM too

    def agreed(self) -> int:
        """Return the signal that all ranks are to stop for, or 0. A collective: all ranks call it at the same step."""
        if not self._signal and self._parents and _launcher_chain()[: len(self._parents)] != self._parents:
            self._signal = signal.SIGTERM
        if dist.get_world_size() == 1:
            return self._signal
        flag = torch.tensor(self._signal)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._of_all())
        return int(flag)

    def wait_for_all(self) -> None:
        """Return when all ranks are here: what rank 0 still writes is written. A collective.

        DeepSpeed's launcher ends the other ranks as soon as one has ended with another code than 0.
        """
        if dist.get_world_size() > 1:
            dist.barrier(group=self._of_all())

    def _of_all(self) -> Any:
        """Return a group of all ranks over the host, for which no GPU is synchronised with; made at the first call."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        return self._group


def _launcher_chain() -> tuple[int, ...]:
    """Return this rank's parent and, if that is DeepSpeed's `launch.py`, the `deepspeed` process that started it.

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
