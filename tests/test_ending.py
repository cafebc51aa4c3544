"""How a process ends: its exit code, what it still does, and that no rank's end cuts off another's work."""

import os
import re
import runpy
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, launch, output_of, train

import train_ds
from gpt2_variants import __main__ as commands
from gpt2_variants.training.stopping import Stopper


def end(body: str, *, stdout=subprocess.PIPE) -> subprocess.CompletedProcess:
    """A script whose `main` has that body, ended by `end_with`."""
    code = "import atexit, os, sys, threading, time\nfrom gpt2_variants.ending import end_with\ndef main():\n"
    code += textwrap.indent(textwrap.dedent(body), "    ") + "\nend_with(main)\nprint('not reached')"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)


@pytest.mark.parametrize("code", [0, 2, 3, 130, 143])
def test_the_exit_code_is_what_main_returns(code):
    out = end(f"print('done'); return {code}")
    assert (out.returncode, out.stdout, out.stderr) == (code, "done\n", "")


def test_an_uncaught_exception_is_told_once_and_is_a_1():
    out = end("raise OSError('no such luck')")
    assert out.returncode == 1
    assert out.stderr.count("Traceback") == 1
    assert out.stderr.splitlines()[-1] == "OSError: no such luck"


@pytest.mark.parametrize(
    ("raised", "code", "said"), [("0", 0, ""), ("2", 2, ""), ("None", 0, ""), ("'why'", 1, "why\n")]
)
def test_sys_exit_means_what_it_means_elsewhere(raised, code, said):
    out = end(f"sys.exit({raised})")
    assert (out.returncode, out.stderr) == (code, said)


def test_what_python_does_at_an_end_is_done_in_its_order_but_for_the_teardown():
    out = end(
        """
        class Left:
            def __del__(self): os.write(1, b"taken apart")
        sys.left = Left()
        atexit.register(print, "registered first")
        atexit.register(print, "registered last")
        threading.Thread(target=lambda: (time.sleep(0.2), print("the thread is waited for"))).start()
        sys.stdout.write("printed, ")
        return 0
        """
    )
    assert out.returncode == 0
    assert out.stdout == "printed, the thread is waited for\nregistered last\nregistered first\n"


def test_a_reader_that_has_gone_is_no_error_and_another_pipe_is():
    reader, writer = os.pipe()
    os.close(reader)
    for body in ("print('x', flush=True); return 0", "print('x'); return 0"):
        out = end(body, stdout=writer)
        assert (out.returncode, out.stderr) == (1, "")
    os.close(writer)
    out = end("r, w = os.pipe(); os.close(r); os.write(w, b'x')")
    assert out.returncode == 1
    assert out.stderr.splitlines()[-1].startswith("BrokenPipeError")


def test_output_that_cannot_be_written_is_said():
    with open("/dev/full", "w") as full:
        out = end("print('x'); return 0", stdout=full)
    assert out.returncode == 1
    assert out.stderr == "error: the output could not be written: [Errno 28] No space left on device\n"


def test_every_script_ends_by_it_and_main_ends_no_process(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(commands, "end_with", ended.append)
    monkeypatch.setattr("gpt2_variants.ending.end_with", ended.append)
    commands.script()
    runpy.run_path(str(ROOT / "train_ds.py"), run_name="__main__")
    assert ended == [commands.main, train_ds.main]
    assert '"gpt2-variants = gpt2_variants.__main__:script"' in (ROOT / "setup.py").read_text()
    assert commands.main(["list"]) == 0


def test_a_stopper_gives_signals_back():
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    mine = [signal.getsignal(number) for number in before]
    try:
        stopper = Stopper()
        assert [signal.getsignal(number) for number in before] == [stopper._on_signal] * 2
        stopper.close()
        assert [signal.getsignal(number) for number in before] == mine
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_training_gives_signals_back(tiny_run, tmp_path, in_process):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(tiny_run, tmp_path / "run", "--max_steps", "1", variant="gpt2")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


TWO = """
import os, sys, time
import torch.distributed as dist
from gpt2_variants.ending import end_with
from gpt2_variants.ranks import RankZeroFailed, while_others_wait
from gpt2_variants.training.stopping import Stopper

dist.init_process_group("gloo")
rank, case = dist.get_rank(), sys.argv[1]
if rank == 1:
    open(sys.argv[2] + ".met", "w").close()

def wait_for_the_end_of_rank_0():
    store = dist.distributed_c10d._get_default_store()
    try:
        while True:
            store.check(["any"])
            time.sleep(0.01)
    except RuntimeError:
        pass  # its server has ended

def work():
    if case in ("killed", "gone"):
        while not os.path.exists(sys.argv[2] + ".met"):
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    if case == "failed":
        raise OSError("disk full")
    time.sleep(1)
    open(sys.argv[2], "w").write("whole")

def main():
    if case == "stopped":
        stopper = Stopper()
        stopper.agreed()
        groups = len(dist.distributed_c10d._world.pg_map)
        if rank == 0:
            work()
        stopper.wait_for_all()
        stopper.close()
        assert len(dist.distributed_c10d._world.pg_map) == groups - 1
    else:
        if case == "gone":
            work() if rank == 0 else wait_for_the_end_of_rank_0()
        try:
            while_others_wait(work)
        except RankZeroFailed:
            return 1
    print(os.path.exists(sys.argv[2]))
    return 130

end_with(main)
"""


@pytest.mark.parametrize(
    ("case", "codes"),
    [("done", [130, 130]), ("stopped", [130, 130]), ("failed", [1, 1]), ("killed", [-9, 1]), ("gone", [-9, 1])],
)
def test_the_other_ranks_wait_for_what_rank_0_does(case, codes, tmp_path):
    processes = launch(2, [case, str(tmp_path / "out")], ("-c", TWO), fresh=True)
    outputs = [output_of(p) for p in processes]
    assert [p.returncode for p in processes] == codes, outputs
    if codes == [130, 130]:
        assert [out for out, _ in outputs] == ["True\n"] * 2
    rank_0, rank_1 = (err for _, err in outputs)
    assert rank_0.splitlines()[-1:] == {"failed": ["[rank0]: OSError: disk full"]}.get(case, [])
    lost = ["error: rank 1: rank 0 has ended before its work was done"]
    said = rank_1.splitlines()  # where torch's store has lost rank 0, it says so first
    assert (said[-1:] if codes[0] == -9 else said) == (lost if codes[0] == -9 else [])


# A process on one core, Gloo's threads at SCHED_IDLE: they drop their references when all else is done.
AMPLIFIED = """
import os, runpy, sys, threading, time

os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ["RANK"]) % os.cpu_count()]})
low = set()

def lower():
    while True:
        for task in os.listdir("/proc/self/task"):
            try:
                name = open(f"/proc/self/task/{task}/comm").read()
                if task not in low and name.startswith("pt_gloo"):
                    os.sched_setscheduler(int(task), os.SCHED_IDLE, os.sched_param(0))
                    low.add(task)
            except (FileNotFoundError, ProcessLookupError):
                pass  # it has ended meanwhile
        time.sleep(0.05)

threading.Thread(target=lower, daemon=True).start()
import gpt2_variants.report
gpt2_variants.report.show = lambda run: print(len(low), "threads lowered")
end = sys.argv.pop(1)
sys.argv[0] = "train_ds.py"
if end == "as the script":
    runpy.run_path("train_ds.py", run_name="__main__")
else:
    from gpt2_variants.train_command import main
    sys.exit(main())
"""


def ends_of_amplified_runs(end: str, runs: int, options: list[str], folder: Path) -> Counter[int]:
    """How many of the processes of so many runs of 2 ranks ended with which code."""
    codes: Counter[int] = Counter()
    for number in range(runs):
        processes = launch(2, [end, *options, "--output_dir", str(folder / str(number))], ("-c", AMPLIFIED), fresh=True)
        outs = [output_of(p, 300)[0] for p in processes]
        assert re.search(r"^[1-9]\d* threads lowered", outs[0], re.MULTILINE), outs
        codes.update(p.returncode for p in processes)
    return codes


@pytest.mark.slow
def test_no_run_aborts_at_its_end(tiny_run, tmp_path):
    """24 runs of 2 ranks at ZeRO stage 3, with Gloo's threads slowed down until the processes end.

    Measured so on 2 cores of an AMD EPYC, torch 2.13.0+cpu, Python 3.11: of 48 processes 8 aborted where `main` was
    followed by Python's own end and Gloo's groups were kept, none as the script ends now.
    """
    options = ["--variant", "gpt2", *tiny_run, "--max_steps", "3", "--deepspeed_config", "zero3.json"]
    runs = int(os.environ.get("AMPLIFIED_RUNS", "24"))
    assert ends_of_amplified_runs("as the script", runs, options, tmp_path) == {0: 2 * runs}
