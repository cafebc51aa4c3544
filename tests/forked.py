"""Processes that begin with torch, transformers and DeepSpeed imported: forked from one that has done it once.

The imports take seconds of each process, and the tests start some fifty.
"""

import contextlib
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

# Read by libraries when they are imported, which happens once for all processes.
OF_IMPORTS = {"DS_ACCELERATOR": "cpu", "TORCH_COMPILE_DISABLE": "1", "TORCHDYNAMO_DISABLE": "1"}
# What each process may have of its own, since it is read when it is used.
OF_A_RANK = {
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "GPT2_VARIANTS_CACHE"),
    *("PATH", "PYTEST_CURRENT_TEST", "PYTEST_XDIST_TESTRUNUID", *OF_IMPORTS),
}
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "transformers.models.gpt2.modeling_gpt2", "deepspeed", "datasets"])
_began_with: dict[str, str] = {}


def can_be_forked(env: dict[str, str]) -> bool:
    """Whether a process with this environment may be forked from one that imported the libraries under the first's."""
    if not _began_with:
        _began_with.update(_of_imports(env))
    return _of_imports(env) == _began_with


def _of_imports(env: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in env.items() if k not in OF_A_RANK and not k.startswith("WANDB_")}


class Forked:
    """A process that runs a Python program; what tests use of `subprocess.Popen`.

    Args:
        closing: a run that ends shows its plot, report and sample, which takes longer than these runs themselves.
    """

    def __init__(self, program: list[str], env: dict[str, str], cwd: Path, closing: bool):
        self.args, self.returncode = program, None
        self._files = [tempfile.NamedTemporaryFile() for _ in range(2)]  # noqa: SIM115  # gone with this object
        names = [file.name for file in self._files]
        self._process = _context.Process(target=_run, args=(program, env, str(cwd), closing, *names))
        with _as_begins():
            self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code of a process that has ended, negative that of a signal; None of one that runs."""
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit code. Raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """(stdout, stderr) of the process, once it has ended. Raises `subprocess.TimeoutExpired`."""
        self.wait(timeout)
        out, err = (Path(file.name).read_text(errors="replace") for file in self._files)
        return out, err

    def send_signal(self, number: int) -> None:
        """Send a signal, if the process runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM, if the process runs."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL, if the process runs."""
        self.send_signal(signal.SIGKILL)


@contextlib.contextmanager
def _as_begins() -> Iterator[None]:
    """Inside, a process can be started that does not import this one's main module, with what libraries read first."""
    main, before = sys.modules["__main__"], dict(os.environ)
    sys.modules["__main__"] = types.ModuleType("__main__")
    os.environ.update(OF_IMPORTS)
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        os.environ.clear()
        os.environ.update(before)


def _run(program: list[str], env: dict[str, str], cwd: str, closing: bool, out: str, err: str) -> None:
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if not closing:
        importlib.import_module("gpt2_variants.report").show = lambda run: None
    if program[0] == "-m":
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name="__main__", alter_sys=True)
    elif program[0] == "-c":
        sys.argv = ["-c", *program[2:]]
        exec(compile(program[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")
