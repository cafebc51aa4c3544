"""Runs several trainings side by side, each as a process of its own."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from .. import signals
from ..ranks import has_cuda

FIRST_PORT = 29_600  # of DeepSpeed's launcher, one for each place


class Stopped(Exception):
    """A signal asked for the end; `number` is the signal's."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass(frozen=True)
class Ended:
    """How a training ended.

    Attributes:
        code: its exit code.
        seconds: how long it took.
        last_line: what it said last.
    """

    code: int
    seconds: float
    last_line: str


class Runner:
    """Runs trainings in `jobs` places, each with `gpus` GPUs of the machine's, or a share of its cores.

    Args:
        jobs: trainings side by side.
        gpus: GPUs of each; 0: the CPU.
    """

    def __init__(self, jobs: int, gpus: int):
        self.jobs, self.gpus = jobs, gpus
        self._places: queue.Queue[int] = queue.Queue()
        for place in range(jobs):
            self._places.put(place)
        self._processes: set[subprocess.Popen] = set()
        self._stopping = False

    def run(self, trainings: Sequence[tuple[Path, Sequence[str]]]) -> Iterator[tuple[int, Ended]]:
        """Run each training, (folder, its options), and give its index and how it ended, as they end.

        What a training says goes into a file beside its folder, `<folder>.log`.

        Raises:
            Stopped: a signal came; the trainings have saved their checkpoints and ended.
        """
        with _signals_raise() as numbers, ThreadPoolExecutor(self.jobs) as pool:
            waiting: dict[Future[Ended], int] = {
                pool.submit(self._run_one, *training): index for index, training in enumerate(trainings)
            }
            try:
                while waiting:
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        yield waiting.pop(future), future.result()
            except (Stopped, GeneratorExit):
                self._stop(pool, numbers)
                raise

    def _stop(self, pool: ThreadPoolExecutor, numbers: Sequence[signal.Signals]) -> None:
        self._stopping = True
        with signals.handled(numbers, signal.SIG_IGN):  # a second one does not keep the trainings from saving
            for process in list(self._processes):
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)
            pool.shutdown(wait=True, cancel_futures=True)

    def _run_one(self, folder: Path, options: Sequence[str]) -> Ended:
        place = self._places.get()
        log, start = folder.with_name(f"{folder.name}.log"), time.monotonic()
        try:
            if self._stopping:
                return Ended(128 + signal.SIGTERM, 0.0, "not begun")
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w", encoding="utf-8") as said:
                process = subprocess.Popen(
                    [*self._program(place), *options],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    env=os.environ | self._environment(place),
                )
                self._processes.add(process)
                code = process.wait()
                self._processes.discard(process)
        finally:
            self._places.put(place)
        return Ended(code, time.monotonic() - start, last_line(log))

    def _program(self, place: int) -> list[str]:
        module = ["--module", "gpt2_variants", "train"]
        if self.gpus <= 1:
            return [sys.executable, "-m", *module[1:]]
        # The launcher goes by CUDA_VISIBLE_DEVICES only without --num_gpus, and without a hostfile of the machine's.
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "none"]
        return [*launcher, "--master_port", str(FIRST_PORT + place), *module]

    def _environment(self, place: int) -> dict[str, str]:
        if not self.gpus:
            threads = max(1, len(os.sched_getaffinity(0)) // self.jobs)
            return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
        visible = visible_gpus()
        return {"CUDA_VISIBLE_DEVICES": ",".join(visible[place * self.gpus : (place + 1) * self.gpus])}


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; empty without any."""
    if not has_cuda():
        return []
    if (said := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in said.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def last_line(log: Path) -> str:
    """Return the last line of text in `log` that begins with "error:", else the last one; "" where there is none."""
    try:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or [""])[-1].strip()


@contextlib.contextmanager
def _signals_raise() -> Iterator[Sequence[signal.Signals]]:
    """Make the signals that stop a comparison raise `Stopped` while inside; give them."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    numbers = signals.that_stop()
    with signals.handled(numbers, stop):
        yield numbers
