"""Ends that no run can tell of itself, or that come twice or amid a write: one clear line each, and nothing is lost."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, finish, launch, metrics, train, wait_for_steps

import train_ds
from gpt2_variants import processes, report
from gpt2_variants.__main__ import main
from gpt2_variants.reasons import disk_fault, reason_of
from gpt2_variants.records import read_facts, status_of
from gpt2_variants.report import read_run

AUTO = ("--resume_from_checkpoint", "auto")


def ended_process(kill: bool) -> dict:
    """What a process told of itself that is gone now; with `kill` as a zombie, which nobody has waited for."""
    code = "import json, sys; from gpt2_variants.processes import this_process; print(json.dumps(this_process()))"
    code += "; sys.stdout.flush(); import time; time.sleep(100 if sys.argv[1] == 'True' else 0)"
    process = subprocess.Popen([sys.executable, "-c", code, str(kill)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    told = json.loads(process.stdout.readline())
    if kill:
        assert processes.lives(told) is True
        process.kill()
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        ZOMBIES.append(process)
    else:
        process.wait()
    return told


ZOMBIES: list[subprocess.Popen] = []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_whether_a_process_lives():
    own = processes.this_process()
    assert own["pid"] == os.getpid()
    assert processes.lives(own) is True
    assert processes.lives(json.loads(json.dumps(own))) is True
    for change, expected in (
        ({"started": own["started"] + 1}, False),  # the number was given to another process since
        ({"boot": "another"}, False),  # the machine was started anew
        ({"host": "another"}, None),
        ({"namespace": "pid:[1]"}, None),  # a container
        ({"boot": None}, None),  # told outside of Linux
        ({"pid": "12"}, None),
        ({"pid": 2**22 + 1}, False),  # above all that there can be
    ):
        assert processes.lives({**own, **change}) is expected, change
    assert processes.lives({}) is None
    assert processes.lives(ended_process(kill=False)) is False
    assert processes.lives(ended_process(kill=True)) is False
    ZOMBIES.pop().wait()


def test_the_age_of_this_process_does_not_hang_on_the_clock(monkeypatch):
    age = processes.seconds_since_start()
    import psutil

    assert age == pytest.approx(time.time() - psutil.Process().create_time(), abs=2)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert age <= processes.seconds_since_start() < age + 10


@pytest.mark.parametrize(
    ("facts", "status"),
    [
        ({}, "of unknown status"),
        ({"status": "running"}, "running"),  # an older record
        ({"status": "running", "starts": []}, "running"),
        ({"status": "running", "starts": [{"process": None}]}, "running"),
        ({"status": "finished", "starts": [{"process": {"pid": 1}}]}, "finished"),
        ({"status": "running", "starts": [{"process": {"host": "node7", "boot": "b"}}]}, "running (on node7)"),
    ],
)
def test_what_a_record_says_stands_unless_its_process_is_gone(facts, status):
    assert status_of(facts) == status


def test_a_run_that_was_killed_has_died_for_the_next_reader(tiny_run, tmp_path, in_process, capfd):
    """With W&B on, offline: the run there is gone on with too."""
    options = [
        *tiny_run,
        "--save_steps",
        "2",
        "--eval_steps",
        "100",
        "--lr_scheduler_type",
        "constant",
        "--report_to",
        "wandb",
    ]
    folder = tmp_path / "run"
    words = ["--variant", "gpt2", *options, "--max_steps", "100000", "--output_dir", str(folder)]
    (process,) = launch(1, words)
    wait_for_steps(process, folder, 7)
    assert status_of(read_facts(folder)) == "running"
    process.kill()
    finish([process])
    assert read_facts(folder)["status"] == "running", "nobody could write another"
    pid, own = process.pid, read_facts(folder)["wandb_run_id"]
    assert read_run(folder).status == "died"
    assert main(["report", str(folder)]) == 0
    assert "died" in capfd.readouterr().out
    assert "| died |" in (folder / "report/report.md").read_text()
    assert main(["push", str(folder)]) == 2
    assert f"{folder}: the run died: its process is gone, and only a finished one is pushed" in capfd.readouterr().err
    last = max(line["step"] for line in metrics(folder))
    assert train_ds.main(["--output_dir", str(folder), *AUTO, "--max_steps", str(last + 2)]) == 0
    assert f"{folder}: died: process {pid} on " in capfd.readouterr().err
    facts = read_facts(folder)
    assert [start.get("ended") for start in facts["starts"]] == ["died", None]
    assert (facts["wandb_run_id"], facts["status"]) == (own, "finished")
    assert [line["step"] for line in metrics(folder) if "loss" in line] == list(range(1, last + 3))
    whole = train([*options, "--report_to", "none"], tmp_path / "whole", "--max_steps", str(last + 2), variant="gpt2")
    assert metrics(folder) == metrics(whole)


def test_the_other_ranks_of_a_killed_one_end_in_a_line(tiny_run, tmp_path):
    folder = tmp_path / "run"
    options = ["--variant", "gpt2", *tiny_run, "--save_steps", "2", "--eval_steps", "1000", "--max_steps", "100000"]
    ranks = launch(2, [*options, "--output_dir", str(folder)])
    wait_for_steps(ranks[0], folder, 3)
    ranks[0].send_signal(signal.SIGKILL)
    _, (code, err) = finish(ranks)
    assert code == 1
    assert err.splitlines()[-1].startswith("error: rank 1: another rank has ended, which says why")
    assert "Traceback" not in err
    assert read_run(folder).status == "died"


def test_two_signals_end_a_run_as_one_does(tiny_run, tmp_path, in_process):
    """The second comes while the first is answered; then a SIGINT too, and the code is that of one of them."""
    options = ["--variant", "gpt2", *tiny_run, "--save_steps", "50", "--eval_steps", "1000"]
    for name, signals in (("terms", ["SIGTERM", "SIGTERM"]), ("both", ["SIGTERM", "SIGINT", "SIGTERM"])):
        folder = tmp_path / name
        (process,) = launch(1, [*options, "--max_steps", "100000", "--output_dir", str(folder)])
        wait_for_steps(process, folder, 3)
        for number in signals:
            process.send_signal(getattr(signal, number))
        ((code, err),) = finish([process])
        assert code == 143 if name == "terms" else code in (130, 143), err
        (said,) = [line for line in err.splitlines() if line.startswith("interrupted: ")]
        assert said.startswith(f"interrupted: {signal.Signals(code - 128).name} at step ")
        assert "Traceback" not in err
        facts = read_facts(folder)
        assert (facts["status"], status_of(facts)) == ("interrupted", "interrupted")
        saved = sorted((folder / "checkpoints").glob("step-*"))[-1]
        assert f"at step {int(saved.name[5:])} of" in facts["reason"]


def test_a_clock_that_jumps_changes_nothing(tiny_run, tmp_path, in_process, monkeypatch):
    """Back and ahead by years, at each look at it."""
    options = [*tiny_run, "--save_steps", "2", "--max_steps", "4"]
    whole = train(options, tmp_path / "whole", variant="gpt2")
    real, looks = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() + (1e8 if next(looks) % 2 else -1e8))
    folder = train(options, tmp_path / "run", variant="gpt2")
    assert train_ds.main(["--output_dir", str(folder), *AUTO, "--max_steps", "6"]) == 0
    assert metrics(folder)[: len(metrics(whole))] == metrics(whole)
    elapsed = [json.loads(line)["elapsed_seconds"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert elapsed == sorted(elapsed)
    assert 0 < elapsed[-1] < 600
    for start in read_facts(folder)["starts"]:
        assert 0 < start["seconds_to_first_step"] < 7200


class Foreign(Exception):
    """As the libraries raise that are written in Rust."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "x", "/a/b"), "the disk is full (/a/b); make room"),
        (OSError(errno.EDQUOT, "x"), "the disk quota is used up; make room, or ask for more"),
        (OSError(errno.EFBIG, "x"), "a file may not become as large as is needed; raise the limit (ulimit -f)"),
        (OSError(errno.EROFS, "x", "/a"), "the disk can only be read (/a); mount it for writing"),
        (PermissionError(errno.EACCES, "x", "/a"), "permission was denied (/a); give the permission"),
        (Foreign("I/O error: No space left on device (os error 28)"), "the disk is full; make room"),
        (RuntimeError("[Errno 28] Error writing bytes to file"), "the disk is full; make room"),
        (FileNotFoundError(errno.ENOENT, "x", "/a"), None),
        (ValueError("28"), None),
    ],
)
def test_what_a_disk_refuses_is_named_with_the_cure(error, said):
    assert disk_fault(error) == said
    outer = RuntimeError("the checkpoint was not written")
    outer.__cause__ = error
    assert disk_fault(outer) == said
    assert reason_of(error) == (said or f"{type(error).__name__}: {error}")


def test_an_error_that_was_answered_is_not_blamed():
    error = ValueError("another")
    error.__context__ = OSError(errno.ENOSPC, "x")
    assert disk_fault(error) == "the disk is full; make room"
    error.__suppress_context__ = True  # by `raise ... from None`
    assert disk_fault(error) is None


UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]
# The disk is filled at a moment of the run, for real; then the same folder goes on with the room back.
FILLING = """
import json, os, sys
from pathlib import Path
import deepspeed
import train_ds
from gpt2_variants import hub, report
from gpt2_variants.__main__ import main
from gpt2_variants.report import closing, page
from gpt2_variants.trackers import jsonl
from gpt2_variants.training import checkpoint

disk, options = Path(sys.argv[1]), sys.argv[2:]

def fill(leave):
    with open(disk / "filler", "ab", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
        os.ftruncate(file.fileno(), max(0, file.tell() - leave))

def filled(owner, name, leave, when=lambda *args, **kwargs: True):
    original = getattr(owner, name)
    def call(*args, **kwargs):
        if when(*args, **kwargs):
            fill(leave)
        return original(*args, **kwargs)
    setattr(owner, name, call)
    return lambda: setattr(owner, name, original)

at_step_4 = lambda self, root, tag, **_: tag.endswith("4")
PLACES = {
    "checkpoint": (deepspeed.DeepSpeedEngine, "save_checkpoint", 100_000, at_step_4),
    "manifest": (checkpoint, "_publish", 0, lambda temporary, final, manifest: manifest["step"] == 4),
    "latest": (checkpoint, "write_aside", 0, lambda path, text: path.name == "latest" and text.endswith("4")),
    "metrics": (jsonl.JsonlTracker, "log", 0, lambda self, record: record["step"] == 3),
    "export": (hub, "export", 60_000),
    "report": (closing, "plot", 0),
}
for name, (owner, attribute, leave, *when) in PLACES.items():
    folder = disk / name
    print(f"== {name}", file=sys.stderr, flush=True)
    undo = filled(owner, attribute, leave, *when)
    first = train_ds.main([*options, "--output_dir", str(folder)])
    undo()
    print(f"== {name} codes", first, file=sys.stderr, flush=True)
    if name == "report":
        assert main(["report", str(folder)]) == 1
        assert not [p for p in folder.rglob("*.tmp")]
    status = json.loads((folder / "run.json").read_text())["status"]
    (disk / "filler").unlink()
    print(f"== {name} again", status, file=sys.stderr, flush=True)
    again = train_ds.main(["--output_dir", str(folder), "--resume_from_checkpoint", "auto"])
    os.system(f"cp -r {folder} {sys.argv[1]}-kept && rm -r {folder}")
    assert again == 0, again
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0,
    reason="needs the right to mount in a namespace of its own",
)
def test_a_disk_that_fills_amid_a_write_is_one_line_and_costs_nothing(tiny_run, tmp_path, in_process):
    """Amid a checkpoint's weights, its manifest, a line of metrics, an export and a report."""
    options = ["--variant", "gpt2", *tiny_run, "--save_steps", "2", "--eval_steps", "100", "--max_steps", "6"]
    disk, kept = tmp_path / "disk", tmp_path / "disk-kept"
    disk.mkdir()
    kept.mkdir()
    script = 'mount -t tmpfs -o size=8m none "$1" && exec "$2" -c "$3" "$1" "$4" "$5" "$6" "$7" "${@:8}"'
    command = ["bash", "-c", script, "-", str(disk), sys.executable, FILLING, *options]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK")}
    out = subprocess.run([*UNSHARE, *command], capture_output=True, text=True, cwd=ROOT, env=env | {"PYTHONPATH": "."})
    assert out.returncode == 0, out.stderr
    assert "Traceback" not in out.stderr
    whole = train(options[2:], tmp_path / "whole", variant="gpt2")
    parts = re.split(r"^== (\w+)$", out.stderr, flags=re.MULTILINE)
    said = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert list(said) == ["checkpoint", "manifest", "latest", "metrics", "export", "report"]
    for name, text in said.items():
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        fails = name != "report"
        assert f"== {name} codes {int(fails)}" in text
        left = {"report": "finished", "latest": "running", "metrics": "running"}  # no room for another word
        assert f"== {name} again {left.get(name, 'failed')}" in text
        assert len(errors) == 1, text
        assert "the disk is full" in errors[0]
        assert metrics(kept / name) == metrics(whole), name
        weights = (kept / name / "model/model.safetensors").read_bytes()
        assert weights == (whole / "model/model.safetensors").read_bytes()


ON_ONE_RANK = """
import errno, os, sys, torch
from gpt2_variants.ending import end_with
import train_ds
original = torch.save
def save(content, path, *args, **kwargs):
    if "step-00000004" in str(path) and os.environ["RANK"] == "1":
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    return original(content, path, *args, **kwargs)
torch.save = save
end_with(lambda: train_ds.main(sys.argv[1:]))
"""


def test_a_disk_that_fills_on_one_rank_ends_all_of_them(tiny_run, tmp_path, in_process):
    """As on nodes whose quotas differ: the others would wait for it."""
    options = ["--variant", "gpt2", *tiny_run, "--save_steps", "2", "--eval_steps", "100", "--max_steps", "6"]
    folder = tmp_path / "run"
    results = finish(launch(2, [*options, "--output_dir", str(folder)], program=("-c", ON_ONE_RANK)))
    assert [code for code, _ in results] == [1, 1], results
    errors = [line for _, err in results for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(
        r"the checkpoint of step 4 was not written: the disk is full \(.*\); make room \(rank 1\)", errors[0]
    )
    assert not any("Traceback" in err for _, err in results)
    assert read_facts(folder)["status"] == "failed"
    assert [path.name for path in (folder / "checkpoints").glob("*step*")] == ["step-00000002"]


def test_a_report_whose_disk_is_full_leaves_the_older_one(tmp_path, monkeypatch, capfd):
    from made_runs import make_run

    run = make_run(tmp_path / "run")
    report.write([run])
    before = {p.name: p.read_bytes() for p in (run / "report").iterdir()}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert main(["report", str(run)]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"error: {run / 'report'}: the report was not written: the disk is full; make room"
    assert {p.name: p.read_bytes() for p in (run / "report").iterdir()} == before
