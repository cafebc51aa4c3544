"""`--num_gpus`: DeepSpeed's launcher without its log, and one end for all."""

import base64
import json
import os
import re
import signal
import subprocess
import sys

import psutil
import pytest
from conftest import ROOT, output_of, patience, wait_until

import train_ds
from gpt2_variants import __main__ as commands

# In place of Python: writes down what it is called with, and goes as DeepSpeed's launcher does after a signal.
STAND_IN = """#!/bin/sh
printf '%s\\n' "$@" > {folder}/words
echo "$PYTHONPATH" > {folder}/path
trap 'echo INT >> {folder}/signals; sleep 0.5; touch {folder}/saved; exit 1' INT
trap 'echo TERM >> {folder}/signals; sleep 0.5; touch {folder}/saved; exit 1' TERM
touch {folder}/ready
[ -n "{code}" ] && exit {code}
while :; do sleep 0.05; done
"""
# In place of a shell's prompt: what a script starts by `&` ignores Ctrl-C, or by `nohup` the end of a terminal.
PARENT = """if True:
    import signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    real, sys.executable = sys.executable, sys.argv.pop(1)
    import train_ds
    sys.exit(train_ds.main())
"""


@pytest.fixture
def stand_in(tmp_path):
    def start(*words: str, code: int | str = "") -> tuple[subprocess.Popen, list[str]]:
        path = tmp_path / "python"
        path.write_text(STAND_IN.format(folder=tmp_path, code=code))
        path.chmod(0o755)
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "PYTHONPATH")}
        command = [sys.executable, "-c", PARENT, str(path), *words]
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, start_new_session=True, stderr=subprocess.PIPE, text=True
        )
        wait_until(lambda: (tmp_path / "ready").exists() or process.poll() is not None)
        return process, (tmp_path / "words").read_text().splitlines()

    return start


def test_the_launcher_is_told_how_many_where_and_to_be_quiet(stand_in, tmp_path):
    process, words = stand_in("--variant", "gpt2", "--num_gpus", "3", "--model_args", "n_layer=2", "n_head=2", code=3)
    assert process.wait(patience(30)) == 3
    assert words[:3] == ["-m", "deepspeed.launcher.launch", "--log_level=critical"]
    (world,) = (word.split("=", 1)[1] for word in words if word.startswith("--world_info="))
    assert json.loads(base64.urlsafe_b64decode(world)) == {"localhost": [0, 1, 2]}
    (port,) = (word for word in words if word.startswith("--master_port="))
    assert port != "--master_port=29500"
    rest = ["--module", "gpt2_variants", "train", "--variant", "gpt2", "--model_args", "n_layer=2", "n_head=2"]
    assert words[-len(rest) :] == rest
    assert (tmp_path / "path").read_text().strip() == str(ROOT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_after_a_signal_it_waits_for_the_launcher(number, stand_in, tmp_path):
    """Ctrl-C reaches the whole group; SIGTERM this process alone, which hands it on; the others act by a SIGTERM."""
    process, _ = stand_in("--num_gpus", "2", "--variant", "gpt2")
    if number == signal.SIGTERM:
        process.send_signal(number)
    else:
        os.killpg(process.pid, number)
    assert process.wait(patience(30)) == 128 + number
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "signals").read_text() == ("INT\n" if number == signal.SIGINT else "TERM\n")
    assert process.stderr.read() == ""


@pytest.mark.parametrize("ranks", ["0", "-1", "two", "1.5"])
def test_no_number_of_ranks_is_one_line(ranks, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    assert train_ds.main(["--variant", "gpt2", f"--num_gpus={ranks}"]) == 2
    assert capsys.readouterr().err == f"error: --num_gpus {ranks}: a whole number, at least 1, is needed\n"


def test_where_no_training_starts_it_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "0")
    assert train_ds.main(["--variant", "gpt2", "--num_gpus", "2"]) == 2
    assert "a launcher has started this process" in capsys.readouterr().err
    assert train_ds.main(["--variant", "gpt2", "--num_gpus", "2", "--dry_run"]) == 2
    assert "error: --num_gpus: starts a training; --dry_run goes over 1 to 1,024 GPUs" in capsys.readouterr().err
    assert commands.main(["compare", "--variants", "gpt2", "--output_dir", str(tmp_path), "--num_gpus", "2"]) == 2
    assert "--num_gpus: starts a training" in capsys.readouterr().err


def test_more_gpus_than_are_here_are_refused(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("gpt2_variants.launch.has_cuda", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert train_ds.main(["--variant", "gpt2", "--num_gpus", "3"]) == 2
    assert capsys.readouterr().err == "error: --num_gpus 3: 2 can be seen here\n"


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_ends_when_the_checkpoint_is_saved(tiny_run, tmp_path):
    """To all processes of the group, as a terminal sends it; two ranks."""
    folder = tmp_path / "run"
    steps = ["--max_steps", "100000", "--eval_steps", "100000", "--save_steps", "100000", "--logging_steps", "100000"]
    command = [sys.executable, "train_ds.py", "--num_gpus", "2", "--variant", "gpt2", *tiny_run, *steps]
    env = {name: value for name, value in os.environ.items() if name != "RANK"}
    process = subprocess.Popen(
        [*command, "--output_dir", str(folder)],
        cwd=ROOT,
        env=env,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    before = []
    for line in process.stderr:
        before.append(line)
        if line.startswith("the first step is done"):
            break
    ranks = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    out, after = output_of(process)
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in ranks)
    assert process.returncode == 130
    said = (
        r"interrupted: SIGINT at step \d+ of 100000; a checkpoint was saved; go on with --resume_from_checkpoint auto\n"
    )
    assert re.fullmatch(said, after)
    assert len(list((folder / "checkpoints").glob("step-*"))) == 1
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert len(before) == 5, before
    assert out == ""
