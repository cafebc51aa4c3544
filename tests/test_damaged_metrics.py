"""`metrics.jsonl` damaged: what is no record is dropped, counted and said; a step whose record is lost is marked."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import metrics, train
from made_runs import make_run

import train_ds
from gpt2_variants.__main__ import main
from gpt2_variants.records import read_facts
from gpt2_variants.report import read_run
from gpt2_variants.trackers.jsonl import JsonlTracker, Steps, read_lines

GOOD = [{"step": n, "loss": 5.0 - n / 10, "elapsed_seconds": float(n)} for n in range(1, 6)]
LINES = [json.dumps(record).encode() + b"\n" for record in GOOD]
# what stands in the place of the line of step 3 -> how many lines are counted as no records
NO_RECORDS = {
    "not UTF-8": (b'{"step": 3, "loss": "\xff\xfe"}\n', 1),
    "bytes of anything": (bytes(range(128, 256)) + b"\n", 1),
    "zeros": (b"\0" * 64 + b"\n", 1),
    "a number": (b"3\n", 1),
    "a list": (b"[3, 4]\n", 1),
    "null": (b"null\n", 1),
    "text": (b'"step"\n', 1),
    "no step": (b'{"loss": 4.7}\n', 1),
    "a step that is text": (b'{"step": "3", "loss": 4.7}\n', 1),
    "a step that is no whole number": (b'{"step": 3.5, "loss": 4.7}\n', 1),
    "a step that is a flag": (b'{"step": true, "loss": 4.7}\n', 1),
    "a step below 0": (b'{"step": -3, "loss": 4.7}\n', 1),
    "a loss that is text": (b'{"step": 3, "loss": "low"}\n', 1),
    "a loss that is a list": (b'{"step": 3, "loss": [4.7]}\n', 1),
    "half a line": (b'{"step": 3, "lo\n', 1),
    "half a line and the next": (b'{"step": 3, "lo', 1),  # the line of step 4 is lost with it
    "nested": (b"[" * 100_000 + b"\n", 1),
    "a long number": (b'{"step": ' + b"9" * 5000 + b"}\n", 1),
    "two": (b"3\n\0\0\n", 2),
    "nothing": (b"", 0),
    "an empty line": (b"\n\r\n", 0),
}


@pytest.mark.parametrize("kind", NO_RECORDS)
def test_what_is_no_record_is_counted(kind, tmp_path, capfd):
    path = tmp_path / "metrics.jsonl"
    bad, count = NO_RECORDS[kind]
    content = b"".join([*LINES[:2], bad, *LINES[3:]])
    path.write_bytes(content)
    found = read_lines(path)
    kept = [r for r in GOOD if r["step"] != 3 and not (kind == "half a line and the next" and r["step"] == 4)]
    assert found == (kept, count)
    tracker = JsonlTracker(path, resume_step=4, logged={"training": [[1, 4, 1]], "evaluations": []})
    tracker.log({"step": 5, "loss": 4.0})
    tracker.close()
    assert metrics(tmp_path) == [{k: v for k, v in r.items() if k != "elapsed_seconds"} for r in kept[:-1]] + [
        {"step": 5, "loss": 4.0}
    ]
    lost = [3, 4] if kind == "half a line and the next" else [3]
    assert (tracker.damaged, list(tracker.lost["training"])) == (count, lost)
    assert tracker.logged() == {"training": [[1, 5, 1]], "evaluations": []}
    (said,) = capfd.readouterr().err.splitlines()
    assert f"the training records of step{'s 3 to 4' if len(lost) > 1 else ' 3'} are lost" in said
    copies = list(tmp_path.glob("metrics.jsonl.damaged-*"))
    assert [copy.read_bytes() for copy in copies] == [content] * bool(count)
    assert bool(count) == ("metrics.jsonl.damaged-001" in said)


@pytest.mark.parametrize("end", [b"", b'{"step": 6, "lo', b"{", LINES[4][:-1]])
def test_the_half_line_of_a_killed_process_is_nothing_unusual(end, tmp_path, capfd):
    """Also not one that lacks its newline alone."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(LINES[:4]) + end)
    logged = {"training": [[1, 4, 1]], "evaluations": []}
    tracker = JsonlTracker(path, resume_step=9, logged=logged)
    tracker.close()
    assert path.read_bytes() == b"".join(LINES[: 5 if end == LINES[4][:-1] else 4])
    assert (tracker.damaged, tracker.lost) == (0, {})
    assert capfd.readouterr().err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_zeros_before_a_record_take_nothing_from_it(tmp_path):
    """As of a machine that crashed, after which the run went on in the same file."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINES[0] + b"\0" * 100 + LINES[1])
    assert read_lines(path) == (GOOD[:2], 1)


@pytest.mark.parametrize(
    "steps", [[], [7], [1, 2, 3], [10, 20, 30, 35], [1, 5, 10, 15, 16], [100, 200, 300, 310, 320, 321], [3, 3, 4, 4]]
)
def test_ranges_hold_the_steps_that_they_are_made_of(steps):
    made = Steps(steps)
    assert list(made) == sorted(set(steps))
    assert sum(len(range(first, last + 1, every)) for first, last, every in made.ranges) == len(set(steps))


def test_steps_of_an_even_run_take_one_range():
    assert Steps(range(50, 20_001, 50)).ranges == [[50, 20_000, 50]]
    assert str(Steps([1, 2, 3, 9, 20, 30])) == "1 to 3, 9 and 20, 30"
    assert str(Steps([*range(10, 401, 10), 405])) == "10 to 400 (every 10 steps), 405"


@pytest.fixture(scope="module")
def originals(tiny_run, tmp_path_factory):
    place = tmp_path_factory.mktemp("originals")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt2_variants.report.show", lambda run: None)
        options = [*tiny_run, "--save_steps", "2", "--eval_steps", "2"]
        stopped = train([*options, "--max_steps", "4"], place / "stopped", variant="gpt2")
        whole = shutil.copytree(stopped, place / "whole")
        assert train_ds.main(["--output_dir", str(whole), "--resume_from_checkpoint", "auto", "--max_steps", "6"]) == 0
    return stopped, whole


def damaged(folder: Path, lost: int, content: bytes) -> None:
    """Put `content` in the place of the line with this number, from 0; -1: of the whole file."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(content if lost < 0 else b"".join([*lines[:lost], content, *lines[lost + 1 :]]))


@pytest.mark.parametrize(
    ("number", "content", "steps"),
    [
        (0, b"\xff\n", {"training": [[1, 1, 1]]}),
        (2, b"\0\0\0\n", {"evaluations": [[2, 2, 1]]}),
        (5, b"", {"evaluations": [[4, 4, 1]]}),
        (-1, b"\0" * 99, {"training": [[1, 4, 1]], "evaluations": [[2, 4, 2]]}),
        (-1, b"", {"training": [[1, 4, 1]], "evaluations": [[2, 4, 2]]}),
    ],
)
def test_a_lost_step_is_marked_when_the_run_goes_on(number, content, steps, originals, tmp_path, in_process, capfd):
    stopped, whole = originals
    run = shutil.copytree(stopped, tmp_path / "run")
    kinds = [(r["step"], "loss" in r) for r in metrics(run)]
    assert kinds == [(1, True), (2, True), (2, False), (3, True), (4, True), (4, False)]
    damaged(run, number, content)
    assert train_ds.main(["--output_dir", str(run), "--resume_from_checkpoint", "auto", "--max_steps", "6"]) == 0
    assert "are lost" in capfd.readouterr().err
    expected = metrics(whole)
    assert metrics(run) == (expected[6:] if number < 0 else [*expected[:number], *expected[number + 1 :]])
    start = read_facts(run)["starts"][-1]
    assert (start["metrics_lost"], start["metrics_damaged"]) == (steps, int(content.strip(b"\n") != b""))
    assert read_facts(run)["logged"] == {"training": [[1, 6, 1]], "evaluations": [[2, 6, 2]]}
    assert "are lost" in read_run(run).damage
    assert main(["report", str(run)]) == 0
    said = capfd.readouterr()
    assert said.err.startswith(f"{run}/metrics.jsonl: the ")
    assert "are lost" in (run / "report/report.md").read_text()
    assert "are lost" in said.out


def test_a_run_that_is_whole_has_lost_nothing(originals, capfd):
    for folder in originals:
        assert read_run(folder).damage == ""
        assert "metrics_lost" not in read_facts(folder)["starts"][-1]


def test_the_last_evaluation_of_a_finished_run_is_made_of_its_record(originals, tmp_path):
    """The report would else go by the one before."""
    run = shutil.copytree(originals[1], tmp_path / "run")
    last = read_run(run).evaluations[-1]
    damaged(run, len(metrics(run)) - 1, b"\xff\xff\n")
    found = read_run(run)
    names = [name for name in last if name.startswith("eval_")]
    assert [found.final[name] for name in names] == [last[name] for name in names]
    assert found.evaluations[-1]["step"] == last["step"] == 6
    assert found.damage == ("metrics.jsonl: 1 line is no record of a step; the evaluation records of step 6 are lost")


def test_an_older_record_that_does_not_tell_what_was_logged_accuses_nobody(tmp_path):
    run = make_run(tmp_path / "old")
    damaged(run, 0, b"")
    assert read_run(run).damage == ""
    damaged(run, 0, b"\xff\n")
    assert read_run(run).damage == "metrics.jsonl: 1 line is no record of a step"
