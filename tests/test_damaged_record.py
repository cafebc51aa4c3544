"""A `run.json` that is damaged or gone: rebuilt from a checkpoint when the run goes on, named by all other readers."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from conftest import finish, launch, metrics, train

import train_ds
from gpt2_variants.__main__ import main
from gpt2_variants.compare.state import differences
from gpt2_variants.config.command_line import parse
from gpt2_variants.records import DamagedRecord, fault_of_facts, never_began, read_facts
from gpt2_variants.training.session import prepare

AUTO = ("--resume_from_checkpoint", "auto")
DAMAGE = {  # what became of a record -> what is said of it
    "empty": (lambda text: b"", "is empty"),
    "zeros": (lambda text: b"\0" * len(text), "is empty"),
    "cut off": (lambda text: text[: len(text) // 2], "cannot be read"),
    "a list": (lambda text: b"[1, 2]", "holds no JSON object, but a list"),
    "a number": (lambda text: b"3", "holds no JSON object, but a whole number"),
    "null": (lambda text: b"null", "holds no JSON object, but null"),
    "true": (lambda text: b"true", "holds no JSON object, but true"),
    "a text": (lambda text: b'"x"', "holds no JSON object, but text"),
    "not UTF-8": (lambda text: b"\xff\xfe" + text, "is not text in UTF-8"),
    "nested": (lambda text: b"[" * 100_000, "cannot be read"),
    "a long number": (lambda text: b'{"schema": ' + b"9" * 5000 + b"}", "cannot be read"),
    "starts": (lambda text: changed(text, starts={"a": 1}), "says starts is an object, where a list is needed"),
    "a start": (lambda text: changed(text, starts=[3]), "has an entry of starts that is none"),
    "plan": (lambda text: changed(text, plan=[1]), "says plan is a list, where an object is needed"),
    "asked": (lambda text: changed(text, asked=["--seed"]), "says asked is a list, where an object is needed"),
    "options": (lambda text: changed(text, options="x"), "says options is text, where an object is needed"),
    "streams": (lambda text: changed(text, streams=[{}]), "has an entry of streams that is none"),
    "in the plan": (lambda text: in_plan(text, world_size="2"), "says plan.world_size is text, where a whole number"),
    "a flag in the plan": (lambda text: in_plan(text, seed=True), "says plan.seed is true, where a whole number"),
    "a list in the plan": (lambda text: in_plan(text, model=[]), "says plan.model is a list, where an object"),
}


def changed(text: bytes, **facts) -> bytes:
    return json.dumps({**json.loads(text), **facts}).encode()


def in_plan(text: bytes, **fields) -> bytes:
    return changed(text, plan={**json.loads(text)["plan"], **fields})


def damage(folder: Path, kind: str) -> bytes:
    """Damage the run.json in `folder`; what it holds then. "missing": nothing, and it is gone."""
    path = folder / "run.json"
    if kind == "missing":
        path.unlink()
        return b""
    path.write_bytes(DAMAGE[kind][0](path.read_bytes()))
    return path.read_bytes()


@pytest.fixture(scope="module")
def originals(tiny_run, tmp_path_factory):
    """A run of 4 steps of 6 with checkpoints after 2 and 4, stopped there; and one that went on to its end."""
    place = tmp_path_factory.mktemp("originals")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt2_variants.report.show", lambda run: None)
        options = [*tiny_run, "--save_steps", "2", "--eval_steps", "2", "--no-compile"]
        stopped = train([*options, "--max_steps", "4"], place / "stopped", "--adam_beta2", "0.98", variant="drift")
        whole = shutil.copytree(stopped, place / "whole")
        assert train_ds.main(["--output_dir", str(whole), *AUTO, "--max_steps", "6"]) == 0
    return stopped, whole


@pytest.fixture
def run(originals, tmp_path, in_process) -> Path:
    return shutil.copytree(originals[0], tmp_path / "run")


def asked_and_json(words: list[str]):
    """What a command line comes to, but for where it starts."""
    options = parse(words)
    return {k: v for k, v in dataclasses.asdict(options).items() if k not in ("output_dir", "resume_from_checkpoint")}


@pytest.mark.parametrize("kind", ["missing", *DAMAGE])
def test_what_was_asked_comes_from_the_newest_checkpoint(kind, run, originals, capfd):
    """By `auto`, by the run's folder and by a checkpoint in it, with no other option repeated; nothing is written."""
    expected = asked_and_json(["--output_dir", str(originals[0]), *AUTO, "--max_steps", "6"])
    content = damage(run, kind)
    capfd.readouterr()
    for words in (
        ["--output_dir", str(run), *AUTO],
        ["--resume_from_checkpoint", str(run)],
        ["--resume_from_checkpoint", str(run / "checkpoints/step-00000002")],
    ):
        assert asked_and_json([*words, "--max_steps", "6"]) == expected
        (line,) = [line for line in capfd.readouterr().err.splitlines() if "run.json" in line]
        why = "is missing" if kind == "missing" else DAMAGE[kind][1]
        assert line.startswith(f"{run}: run.json {why}")
        assert line.endswith("what the run is, is read from step-00000004")
    assert kind == "missing" or (run / "run.json").read_bytes() == content


@pytest.mark.parametrize("kind", ["missing", "empty", "cut off", "not UTF-8", "starts"])
def test_a_run_goes_on_as_if_nothing_had_been(kind, run, originals, capfd):
    whole = originals[1]
    content = damage(run, kind)
    assert train_ds.main(["--output_dir", str(run), *AUTO, "--max_steps", "6"]) == 0
    assert metrics(run) == metrics(whole)
    for name in ("model.safetensors", "config.json"):
        assert (run / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()
    facts, expected = (read_facts(folder) for folder in (run, whole))
    own = {"starts", "options", "train_seconds"}
    assert {k: v for k, v in facts.items() if k not in own} == {k: v for k, v in expected.items() if k not in own}
    first, second = facts["starts"]
    assert (first["resumed_from"], second["rebuilt_from"]) == (None, "step-00000004")
    kept = list(run.glob("run.json.damaged-*"))
    if kind == "missing":
        assert not kept
    else:
        assert [path.read_bytes() for path in kept] == [content]
        assert kept[0].name in capfd.readouterr().err


def test_two_damaged_records_are_both_kept(run):
    for number in (1, 2):
        damage(run, "cut off")
        assert train_ds.main(["--output_dir", str(run), *AUTO, "--max_steps", str(4 + number)]) == 0
    assert sorted(path.name for path in run.glob("run.json.*")) == ["run.json.damaged-001", "run.json.damaged-002"]


def test_an_older_whole_checkpoint_counts_where_the_newest_is_not_whole(run, capfd):
    damage(run, "empty")
    (run / "checkpoints/step-00000004/mp_rank_00_model_states.pt").write_bytes(b"half")
    assert train_ds.main(["--output_dir", str(run), *AUTO, "--max_steps", "4"]) == 0
    assert read_facts(run)["starts"][-1]["rebuilt_from"] == "step-00000002"
    assert metrics(run)[-1]["step"] == 4


@pytest.mark.parametrize(
    ("variant", "further"),
    [
        ("gpt2", ("--lr_scheduler_type", "cosine", "--warmup_steps", "1", "--bf16")),
        ("gpt2", ("--lr_scheduler_type", "constant", "--deepspeed_config", "zero3.json")),
        *((variant, ()) for variant in ("duo_predict", "drift_diffusion", "parallel_concat", "rotating_head_norm")),
    ],
)
def test_the_plan_alone_tells_a_recipe_again(variant, further, tiny_run, tmp_path, monkeypatch):
    """Of a manifest that a version of before left: the plan that comes of it is the one that it holds."""
    from gpt2_variants.config.recovered import _of_plan

    words = [*tiny_run, *further, "--variant", variant, "--output_dir", str(tmp_path / "new")]
    _, plan = prepare(parse(words))
    then = json.loads(json.dumps(dataclasses.asdict(plan)))
    facts = {**_of_plan(then), "plan": then}
    assert fault_of_facts(facts) is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text(json.dumps(facts))
    _, again = prepare(parse(["--output_dir", str(tmp_path / "run"), *AUTO]))
    now = json.loads(json.dumps(dataclasses.asdict(again)))
    assert {k: v for k, v in now.items() if k != "chosen"} == {k: v for k, v in then.items() if k != "chosen"}


def test_a_checkpoint_without_a_record_is_gone_on_from_by_its_plan(run, originals, capfd):
    for path in run.glob("checkpoints/step-*/manifest.json"):
        manifest = json.loads(path.read_text())
        del manifest["record"], manifest["sha256"]
        path.write_text(json.dumps(manifest))
    damage(run, "missing")
    assert train_ds.main(["--output_dir", str(run), *AUTO, "--max_steps", "6"]) == 0
    assert metrics(run) == metrics(originals[1])
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("from step 4 on: ")]
    assert len(said) == 1
    assert "total_steps 6, before it was 4" in said[0]


@pytest.mark.parametrize("kind", ["missing", "empty", "a list"])
def test_what_no_checkpoint_tells_is_asked_for_in_one_line(kind, run, tiny_run, capfd):
    """Nothing is left but a record without its sense; with the options given anew it begins."""
    shutil.rmtree(run / "checkpoints")
    content = damage(run, kind)
    assert train_ds.main(["--output_dir", str(run), *AUTO]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert ("holds no run" if kind == "missing" else "give --variant and all other options anew") in line
    again = ["--variant", "gpt2", *tiny_run, "--max_steps", "2", "--output_dir", str(run), *AUTO]
    assert train_ds.main(again) == (2 if kind == "missing" else 0)  # other files are there, and no run
    if kind != "missing":
        assert [path.read_bytes() for path in run.glob("run.json.damaged-*")] == [content]


@pytest.mark.parametrize("content", [b"", b"\0" * 200, b" \n"])
def test_an_empty_record_of_a_start_that_trained_nothing_blocks_no_next_one(content, tiny_run, tmp_path, in_process):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run.json").write_bytes(content)
    assert never_began(folder)
    train([*tiny_run, "--max_steps", "2"], folder, variant="gpt2")
    assert (folder / "run.json.damaged-001").read_bytes() == content


@pytest.mark.parametrize("content", [b"[1]", b"{", b"notes"])
def test_somebodys_own_file_of_that_name_does(content, tiny_run, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_bytes(content)
    assert train_ds.main(["--variant", "gpt2", *tiny_run, "--output_dir", str(folder)]) == 2
    assert (folder / "run.json").read_bytes() == content


@pytest.mark.parametrize("kind", ["missing", "empty", "cut off", "a list", "not UTF-8", "starts", "in the plan"])
def test_all_other_readers_name_it_with_the_cure_in_one_line(kind, run, tmp_path, capfd):
    damage(run, kind)
    model = run / "model"
    commands = {
        "report": ["report", str(run)],
        "push": ["push", str(run)],
        "generate": ["generate", "--model", str(model), "--prompt", "The"],
    }
    if kind == "missing":
        commands.pop("generate")  # it needs none
    for words in commands.values():
        capfd.readouterr()
        assert main(words) == 2, words
        err = capfd.readouterr().err
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        assert str(run) in line
        assert "run.json" in line
        assert f"train_ds.py --resume_from_checkpoint auto --output_dir {run} rebuilds it" in line
    # an export needs no record, and a comparison goes by that of the checkpoint
    assert main(["export", "--checkpoint", str(run), "--output_dir", str(tmp_path / "exported")]) == 0
    _, plan = prepare(parse(["--output_dir", str(run), *AUTO]))
    assert differences(run, plan) == []
    assert len(differences(run, dataclasses.replace(plan, block_size=16))) == 1


def test_a_report_of_several_tells_of_each_damaged_one(run, originals, tmp_path, capfd):
    other = shutil.copytree(originals[1], tmp_path / "other")
    damage(run, "cut off")
    damage(other, "plan")
    assert main(["report", str(run), str(other), str(originals[0])]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"error: {folder}: run.json ") for line, folder in zip(lines, (run, other), strict=True))


def test_a_value_that_an_option_cannot_have_is_named(run, capfd):
    for name, value in (("learning_rate", "fast"), ("model_args", 3), ("report_to", 5), ("variant", 7)):
        text = json.dumps({**read_facts(run), "asked": {**read_facts(run)["asked"], name: value}})
        (run / "run.json").write_text(text)
        assert train_ds.main(["--output_dir", str(run), *AUTO, "--max_steps", "6"]) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert f"{run}/run.json: asked.{name}: " in line
        (run / "run.json").write_text(json.dumps({**json.loads(text), "asked": {"variant": "drift"}}))


def test_a_record_that_is_whole_has_no_fault(originals):
    for folder in originals:
        assert fault_of_facts(json.loads((folder / "run.json").read_text())) is None
    with pytest.raises(FileNotFoundError):
        read_facts(originals[0] / "none")
    assert issubclass(DamagedRecord, ValueError)


def test_two_ranks_rebuild_it_once(tiny_run, tmp_path, in_process):
    folder = tmp_path / "run"
    options = ["--variant", "gpt2", *tiny_run, "--save_steps", "2", "--output_dir", str(folder)]
    assert [code for code, _ in finish(launch(2, [*options, "--max_steps", "2"]))] == [0, 0]
    content = damage(folder, "cut off")
    results = finish(launch(2, ["--output_dir", str(folder), *AUTO, "--max_steps", "4"]))
    assert [code for code, _ in results] == [0, 0], results
    said = [[line for line in err.splitlines() if "run.json" in line] for _, err in results]
    assert [len(lines) for lines in said] == [2, 0]
    assert [path.read_bytes() for path in folder.glob("run.json.damaged-*")] == [content]
    assert [line["step"] for line in metrics(folder) if "loss" in line] == [1, 2, 3, 4]
    assert read_facts(folder)["starts"][-1]["rebuilt_from"] == "step-00000002"
