"""Whenever a process dies, a folder is under its own name complete or absent, and what it left blocks no next start."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import tiny, train
from test_tokenizers import words

import train_ds
from gpt2_variants import VARIANTS
from gpt2_variants import export as exporting
from gpt2_variants.config import checks
from gpt2_variants.config.options import Options
from gpt2_variants.training import checkpoint

CHANGES = ("rename", "replace", "unlink", "rmdir", "mkdir")  # what changes the names in a folder


class Killed(BaseException):
    """Stands for SIGKILL: no `except` clause sees it."""


@pytest.fixture
def kill_after(monkeypatch):
    """Let so many changes of names happen, then die at the next one; returns how many a call would make in all."""

    def call(function, changes: int | None) -> int:
        done = 0
        with pytest.MonkeyPatch.context() as patch:
            for name in CHANGES:
                original = getattr(os, name)

                def counted(*args, _original=original, **kwargs):
                    nonlocal done
                    if done == changes:
                        raise Killed
                    done += 1
                    return _original(*args, **kwargs)

                patch.setattr(os, name, counted)
            try:
                function()
            except Killed:
                assert changes is not None
        return done

    return call


class Engine:
    """Writes two files, as DeepSpeed's engine would."""

    checkpoint_engine = None

    def save_checkpoint(self, root, tag, **_):
        folder = Path(root, tag)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("a.pt", "b.pt"):
            (folder / name).write_text(f"{name} of {tag}")


@pytest.fixture
def save(monkeypatch):
    """`checkpoint.save` of such an engine, on one rank that needs no process group."""
    monkeypatch.setattr(checkpoint, "decided_by_rank_0", lambda decide: decide())
    monkeypatch.setattr(checkpoint.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(checkpoint.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(checkpoint.dist, "barrier", lambda: None)

    def describe(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    return lambda root, step, keep=2: checkpoint.save(
        Engine(), root, step, {}, {"cut": {}, "identity": {}}, keep, (), describe, 1
    )


def steps(root: Path) -> list[int]:
    """The steps of the folders that are named as checkpoints, all of which are whole."""
    found = sorted(root.glob("step-*"))
    assert [checkpoint.fault_of(path) for path in found] == [None] * len(found)
    return [int(path.name[5:]) for path in found]


def test_a_checkpoint_is_whole_or_absent_at_every_kill(save, tmp_path, kill_after):
    """Of a save that deletes an older checkpoint: at each change of a name in it the process dies."""
    begun = tmp_path / "begun"
    for step in (2, 4):
        save(begun, step)
    total = kill_after(lambda: save(shutil.copytree(begun, tmp_path / "whole"), 6), None)
    assert steps(tmp_path / "whole") == [4, 6]
    seen = set()
    for changes in range(total):
        root = shutil.copytree(begun, tmp_path / str(changes))
        kill_after(lambda root=root: save(root, 6), changes)
        seen.add(tuple(steps(root)))
        save(root, 8)  # what the kill left is in nobody's way, and gone
        assert steps(root)[-1] == 8
        assert not [path for path in root.iterdir() if path.name.startswith(".tmp")]
    assert seen == {(2, 4), (2, 4, 6), (4, 6)}


def test_a_broken_checkpoint_of_the_same_step_is_replaced_whole_or_absent(save, tmp_path, kill_after):
    begun = tmp_path / "begun"
    for step in (2, 4):
        save(begun, step)
    (begun / "step-00000004/b.pt").write_text("half")
    assert checkpoint.fault_of(begun / "step-00000004") is not None
    broken = (begun / "step-00000004/b.pt").read_bytes()
    total = kill_after(lambda: save(shutil.copytree(begun, tmp_path / "whole"), 4), None)
    assert steps(tmp_path / "whole") == [2, 4]
    absent = 0
    for changes in range(total):
        root = shutil.copytree(begun, tmp_path / str(changes))
        kill_after(lambda root=root: save(root, 4), changes)
        place = root / "step-00000004"
        absent += not place.exists()
        assert not place.exists() or checkpoint.fault_of(place) is None or (place / "b.pt").read_bytes() == broken
        assert checkpoint.newest_valid(root)[0].name in ("step-00000002", "step-00000004")
    assert absent > 0, "the moment between the two renames was among them"


def test_checkpoints_are_set_aside_from_the_newest_on(save, tmp_path, kill_after):
    """So that those left are the run up to some step; the metrics so far are copied before anything is moved."""
    begun, metrics = tmp_path / "begun", tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 6}\n')
    for step in (2, 4, 6):
        save(begun, step, keep=9)
    total = kill_after(lambda: checkpoint.set_aside(shutil.copytree(begun, tmp_path / "whole"), 3, metrics), None)
    for changes in range(total):
        root = shutil.copytree(begun, tmp_path / str(changes))
        kill_after(lambda root=root: checkpoint.set_aside(root, 3, metrics), changes)
        assert steps(root) == [2, 4, 6][: len(steps(root))]
        moved = list(root.glob("set-aside-*/step-*"))
        assert not moved or (root / "set-aside-001/metrics.jsonl").read_text() == metrics.read_text()


def test_an_export_is_whole_or_absent_at_every_kill(tmp_path, kill_after):
    """Also of one that replaces an older one, and of one after another that was killed while it deleted that."""
    model = tiny("gpt2")
    weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    tokenizer = words({f"w{n}": n for n in range(67)})

    def export(folder: Path) -> None:
        exporting.export(VARIANTS["gpt2"], model.config, weights, tokenizer, 48, folder)

    begun = tmp_path / "begun"
    export(begun / "model")
    names = sorted(path.name for path in (begun / "model").iterdir())
    total = kill_after(lambda: export(shutil.copytree(begun, tmp_path / "whole") / "model"), None)
    for changes in range(total):
        root = shutil.copytree(begun, tmp_path / str(changes))
        kill_after(lambda root=root: export(root / "model"), changes)
        if (root / "model").exists():
            assert sorted(path.name for path in (root / "model").iterdir()) == names
        export(root / "model")
        assert sorted(path.name for path in root.iterdir()) == ["model"]


MANIFESTS = {
    "empty": lambda text: b"",
    "cut off": lambda text: text[:-5],
    "not UTF-8": lambda text: b"\xff" + text,
    "null": lambda text: b"null",
    "a list": lambda text: b"[]",
    "a number": lambda text: b"7",
    "nested": lambda text: b"[" * 100_000,
    "no files": lambda text: text.replace(b'"files"', b'"fires"'),
    "files that are a list": lambda text: json.dumps({**json.loads(text), "files": ["a.pt"]}).encode(),
    "a file without a hash": lambda text: json.dumps({**json.loads(text), "files": {"a.pt": {"bytes": 3}}}).encode(),
    "another step": lambda text: text.replace(b'"step": 4', b'"step": 6'),
    "another rank": lambda text: text.replace(b'"cut": {}', b'"cut": {"world_size": 2}'),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_damaged_manifest_is_passed_over_in_a_line(kind, save, tmp_path):
    for step in (2, 4):
        save(tmp_path, step)
    manifest = tmp_path / "step-00000004/manifest.json"
    before = manifest.read_bytes()
    manifest.write_bytes(MANIFESTS[kind](before))
    assert manifest.read_bytes() != before
    newest, (line,) = checkpoint.newest_valid(tmp_path)
    assert newest.name == "step-00000002"
    assert line == f"checkpoint {manifest.parent}: has a damaged manifest; passed over"


LEFTOVERS = {
    "a lock": [".lock"],
    "a half run.json": [".lock", ".run.json.tmp"],
    "half of everything": [".lock", ".run.json.tmp", ".ds_config.json.tmp", ".metrics.jsonl.tmp"],
    "empty checkpoints": [".lock", "checkpoints/"],
    "a checkpoint half written": [".lock", "checkpoints/.tmp-step-00000002/a.pt"],
    "empty metrics": [".lock", "metrics.jsonl"],
}
OWN = ["notes.txt", "checkpoints/mine.pt", "code/mine.py", ".hidden", "metrics.jsonl=x", "model/config.json"]


def fill(folder: Path, names: list[str]) -> Path:
    """Make empty files and, where a name ends with "/", folders; "name=text" has content."""
    for name in names:
        place, _, text = name.partition("=")
        target = folder / place
        if place.endswith("/"):
            target.mkdir(parents=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
    return folder


def place_faults(folder: Path) -> list[str]:
    return checks._place_faults(Options(variant="gpt2", output_dir=str(folder)))


@pytest.mark.parametrize("names", LEFTOVERS.values(), ids=LEFTOVERS)
def test_our_own_leftovers_block_no_start(names, tmp_path):
    assert place_faults(fill(tmp_path / "run", names)) == []


@pytest.mark.parametrize("name", OWN)
def test_what_is_somebodys_own_does(name, tmp_path):
    (line,) = place_faults(fill(tmp_path / "run", [".lock", name]))
    assert line.startswith(f"--output_dir {tmp_path / 'run'}: is not empty and holds no run")


def test_a_folder_of_leftovers_is_trained_in(tiny_run, tmp_path, in_process):
    everything = [name for names in LEFTOVERS.values() for name in names if name != "checkpoints/"]
    folder = train([*tiny_run, "--max_steps", "2"], fill(tmp_path / "run", everything), variant="gpt2")
    assert not list((folder / "checkpoints").glob(".tmp*"))
    assert not list(folder.glob(".*.tmp"))
    assert train_ds.main(["--variant", "gpt2", *tiny_run, "--output_dir", str(folder)]) == 2
