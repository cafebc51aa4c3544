"""A terminal that is closed, a reader that goes, and the signals that queues send."""

import contextlib
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios

import pytest
from conftest import ROOT, launch, metrics, patience, record, train, wait_for_steps

from gpt2_variants import signals
from gpt2_variants.steady_output import goes_on_unheard
from gpt2_variants.training import loop

MORE = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
ENDLESS = ["--max_steps", "100000", "--eval_steps", "100000", "--save_steps", "100000"]


@pytest.mark.parametrize("number", MORE)
def test_a_signal_stops_a_training_only_where_it_would_end_the_process(number):
    with signals.handled([number], signal.SIG_DFL):
        assert number in signals.that_stop()
    for other in (signal.SIG_IGN, lambda *_: None):
        with signals.handled([number], other):
            assert signals.that_stop()[:2] == (signal.SIGINT, signal.SIGTERM)
            assert number not in signals.that_stop()


def send_at_step_3(monkeypatch, number: int) -> None:
    original = loop.Loop._optimizer_step

    def step(self, micro_batches):
        if self.step == 2:
            os.kill(os.getpid(), number)
        return original(self, micro_batches)

    monkeypatch.setattr(loop.Loop, "_optimizer_step", step)


@pytest.mark.parametrize("number", [MORE[0], *(pytest.param(number, marks=pytest.mark.slow) for number in MORE[1:])])
def test_it_saves_and_goes_on_bit_for_bit(number, tiny_run, tmp_path, monkeypatch, capfd):
    options = [*tiny_run, "--max_steps", "5", "--eval_steps", "5"]
    whole = train(options, tmp_path / "whole", variant="gpt2")
    with signals.handled([number], signal.SIG_DFL), monkeypatch.context() as patch:
        send_at_step_3(patch, number)
        part = train(options, tmp_path / "part", variant="gpt2", code=128 + number)
        assert signal.getsignal(number) == signal.SIG_DFL, "given back"
    assert record(part)["status"] == "interrupted"
    assert record(part)["reason"] == f"{number.name} at step 3 of 5; a checkpoint was saved"
    assert f"interrupted: {number.name} at step 3 of 5" in capfd.readouterr().err
    train(options, part, "--resume_from_checkpoint", "auto", variant="gpt2")
    assert metrics(part) == metrics(whole)


def test_under_nohup_it_goes_on(tiny_run, tmp_path, monkeypatch):
    with signals.handled([signal.SIGHUP], signal.SIG_IGN):
        send_at_step_3(monkeypatch, signal.SIGHUP)
        folder = train(tiny_run, tmp_path / "run", "--max_steps", "4", variant="gpt2")
    assert record(folder)["status"] == "finished"


@pytest.mark.slow
def test_of_two_ranks_that_get_it_both_end(tiny_run, tmp_path):
    """As a terminal sends it to all processes; one of them may be told first."""
    options = ["--variant", "gpt2", *tiny_run, *ENDLESS, "--output_dir", str(tmp_path / "run")]
    with signals.handled([signal.SIGHUP], signal.SIG_DFL):
        ranks = launch(2, options)
    wait_for_steps(ranks[0], tmp_path / "run", 3)
    for rank in ranks:
        rank.send_signal(signal.SIGHUP)
    assert [rank.wait(patience(60)) for rank in ranks] == [129, 129]
    assert record(tmp_path / "run")["status"] == "interrupted"


# Writes into its file once its reader has gone, and ends with an exit code of its own.
SPEAKER = """if True:
    import os, sys, time
    from gpt2_variants.steady_output import goes_on_unheard
    before = sys.stdout, sys.stderr
    with goes_on_unheard():
        print("heard", flush=True)
        print("heard too", file=sys.stderr)
        while not os.path.exists(sys.argv[1] + "/gone"):
            time.sleep(0.01)
        for _ in range(3):
            print("unheard", "x" * 20_000, flush=True)
            print("unheard", file=sys.stderr)
        os.write(1, b"past Python's own streams")
        os.write(2, b"too")
        print("to be written at the end", end="")
    assert (sys.stdout, sys.stderr) == before
    open(sys.argv[1] + "/done", "w").close()
    sys.exit(7)
"""


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_what_nobody_reads_is_dropped_and_the_work_goes_on(kind, tmp_path):
    reader, writer = os.pipe() if kind == "pipe" else pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SPEAKER, str(tmp_path)], cwd=ROOT, stdout=writer, stderr=writer, start_new_session=True
    )
    os.close(writer)
    said = b""
    while said.count(b"\n") < 2:
        said += os.read(reader, 1000)
    assert said.split() == b"heard heard too".split()
    os.close(reader)
    (tmp_path / "gone").touch()
    assert process.wait(patience(30)) == 7
    assert (tmp_path / "done").exists()


def test_a_full_disk_is_no_lost_reader(tmp_path):
    code = (
        "from gpt2_variants.steady_output import goes_on_unheard\nwith goes_on_unheard():\n    print('x', flush=True)"
    )
    with open("/dev/full", "w") as full:
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert out.returncode != 0
    assert "No space left on device" in out.stderr


def test_streams_that_others_have_put_there_stay(capsys):
    before = sys.stdout, sys.stderr
    with goes_on_unheard():
        assert (sys.stdout, sys.stderr) == before
        print("kept")
    assert capsys.readouterr().out == "kept\n"


def in_a_terminal(command: list[str]) -> tuple[subprocess.Popen, int]:
    """The process, which is the first of a session with a terminal of its own; and the terminal's other end."""
    ours, theirs = pty.openpty()

    def take_it() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True, preexec_fn=take_it, **streams)
    os.close(theirs)
    return process, ours


class Reader:
    """Reads what a process writes into a terminal, so that it does not wait for somebody to do so; `poll` is its."""

    def __init__(self, process: subprocess.Popen, terminal: int):
        self._process, self._terminal = process, terminal
        os.set_blocking(terminal, False)

    def poll(self) -> int | None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._terminal, 100_000)
        return self._process.poll()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[], ["--num_gpus", "2"]])
def test_a_terminal_that_is_closed_ends_a_run_with_a_checkpoint(ranks, tiny_run, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "train_ds.py", *ranks, "--variant", "gpt2", *tiny_run, *ENDLESS]
    process, terminal = in_a_terminal([*command, "--output_dir", str(folder)])
    wait_for_steps(Reader(process, terminal), folder, 3)
    os.close(terminal)
    assert process.wait(patience(60)) == 129
    assert record(folder)["status"] == "interrupted"
    assert record(folder)["reason"].startswith("SIGTERM at step" if ranks else "SIGHUP at step")
    assert len(list((folder / "checkpoints").glob("step-*"))) == 1


@pytest.mark.slow
def test_a_reader_that_goes_does_not_end_a_run(tiny_run, tmp_path):
    """As a `tee` that is killed: the run is trained, exported and reported on to its end."""
    folder = tmp_path / "run"
    (process,) = launch(
        1, ["--variant", "gpt2", *tiny_run, "--max_steps", "300", "--output_dir", str(folder)], fresh=True
    )
    process.stderr.readline()
    process.stderr.close()
    process.stdout.close()
    assert process.wait(patience(120)) == 0
    assert record(folder)["status"] == "finished"
    assert metrics(folder)[-1]["step"] == 300
    assert (folder / "report/report.html").is_file()
