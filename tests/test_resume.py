"""Going on with a run: what changed acts and is said, what cannot change is refused, and nothing is lost."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import metrics, record, train, zero
from transformers import AutoModelForCausalLM, get_scheduler

import train_ds
from gpt2_variants.config.command_line import parse
from gpt2_variants.config.deepspeed_json import resolve_ds_config
from gpt2_variants.training import loop

AUTO = ("--resume_from_checkpoint", "auto")


def rates(folder: Path) -> dict[int, float]:
    return {line["step"]: line["learning_rate"] for line in metrics(folder) if "loss" in line}


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (folder / "checkpoints").glob("step-*"))


def linear(peak: float, warmup: int, total: int) -> list[float]:
    """transformers' own rates of `total` steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    schedule = get_scheduler("linear", optimizer, warmup, total)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.fixture
def begun(tiny_run, tmp_path, in_process):
    """A run of 6 steps with checkpoints after 2, 4 and 6."""
    options = [*tiny_run, "--save_steps", "2", "--eval_steps", "2", "--save_total_limit", "10", "--max_steps", "6"]
    return train(options, tmp_path / "run", variant="gpt2")


def go_on(*options: str, code: int = 0) -> None:
    assert train_ds.main([*options]) == code


def test_the_folder_alone_is_enough(begun, capfd):
    """Neither variant nor any other option: all of them come from the run, and only what is asked for changes."""
    before = record(begun)
    go_on("--output_dir", str(begun), *AUTO, "--max_steps", "9")
    after = record(begun)
    assert after["plan"]["total_steps"] == 9
    same = {k: v for k, v in after["plan"].items() if v == before["plan"][k]}
    assert before["plan"].keys() - same.keys() == {"total_steps", "schedule", "ds_config"}
    assert rates(begun) == {i + 1: rate for i, rate in enumerate(linear(2e-3, 1, 6) + linear(2e-3, 1, 9)[6:])}
    assert "from step 6 on: total_steps 9, before it was 6" in capfd.readouterr().err
    assert after["starts"][1]["changed"] == ["total_steps 9, before it was 6"]


@pytest.mark.parametrize(
    ("sections", "options", "shares"),
    [
        ({}, ("--per_device_train_batch_size", "4"), {1: (4, 1), 2: (2, 1), 4: (1, 1)}),
        ({}, ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"), {1: (2, 4), 2: (2, 2)}),
        (
            {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
            (),
            {1: (2, 4), 2: (2, 2), 8: (1, 1)},
        ),
    ],
)
def test_the_global_batch_stays_on_another_number_of_ranks(
    sections, options, shares, tiny_run, ds_json, tmp_path, in_process, monkeypatch
):
    """However it was asked for at the first start."""
    own = [word for i, word in enumerate(tiny_run) if "--train_batch_size" not in tiny_run[max(i - 1, 0) : i + 1]]
    path = ds_json(**sections) if sections else "zero1.json"
    folder = train([*own, *options, "--deepspeed_config", path, "--max_steps", "1"], tmp_path / "run", variant="gpt2")
    total = record(folder)["plan"]["train_batch_size"]
    for world, (micro, accumulation) in shares.items():
        monkeypatch.setenv("WORLD_SIZE", str(world))
        config = resolve_ds_config(parse(["--output_dir", str(folder), *AUTO, "--max_steps", "2"]), world, 2)
        names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        assert [config[name] for name in names] == [total, micro, accumulation]


def test_a_runs_folder_means_its_newest_checkpoint(begun, capfd):
    go_on("--resume_from_checkpoint", str(begun), "--max_steps", "7")
    assert "step-00000006" in record(begun)["starts"][1]["resumed_from"]
    assert [line["step"] for line in metrics(begun) if "loss" in line] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("option", "value", "field"),
    [
        ("--learning_rate", "5e-4", "learning_rate"),
        ("--weight_decay", "0.5", "weight_decay"),
        ("--max_grad_norm", "0.1", "gradient_clipping"),
        ("--adam_beta2", "0.9", "optimizer"),
        ("--lr_scheduler_type", "cosine", "schedule"),
        ("--warmup_steps", "5", "warmup_steps"),
    ],
)
def test_what_changes_acts_and_is_said(option, value, field, begun, tiny_run, tmp_path, capfd):
    """It gives other weights than going on from the same checkpoint without it, which gives those of the run itself."""
    unchanged, changed = tmp_path / "unchanged", tmp_path / "changed"
    start = ["--resume_from_checkpoint", str(begun / "checkpoints/step-00000004")]
    go_on(*start, "--output_dir", str(unchanged))
    go_on(*start, "--output_dir", str(changed), option, value)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("from step 4 on: ")]
    (line,) = said
    assert field in line
    assert line.removeprefix("from step 4 on: ") in record(changed)["starts"][0]["changed"]
    assert (
        record(changed)["asked"][option[2:]] == pytest.approx(float(value)) if option != "--lr_scheduler_type" else True
    )
    a, b = (AutoModelForCausalLM.from_pretrained(f / "model").state_dict() for f in (unchanged, changed))
    assert any(not torch.equal(a[k], b[k]) for k in a)
    again = AutoModelForCausalLM.from_pretrained(begun / "model").state_dict()
    assert all(torch.equal(a[k], again[k]) for k in a), "without a change the same weights come again"


@pytest.mark.parametrize("stage", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_changes_act_at_every_zero_stage(stage, tiny_run, ds_json, tmp_path, in_process):
    """What a checkpoint of DeepSpeed brings with it differs between the stages: rate, decay, clipping."""
    config = ("--deepspeed_config", ds_json(zero_optimization=zero(stage)))
    folder = train([*tiny_run, *config, "--save_steps", "2", "--max_steps", "4"], tmp_path / "run", variant="gpt2")
    start = ["--resume_from_checkpoint", str(folder / "checkpoints/step-00000002")]
    found = {}
    for change in ((), ("--learning_rate", "5e-4"), ("--weight_decay", "0.5"), ("--max_grad_norm", "0.1")):
        out = tmp_path / f"out{len(found)}"
        go_on(*start, "--output_dir", str(out), *change)
        found[change] = AutoModelForCausalLM.from_pretrained(out / "model").state_dict()["transformer.wte.weight"]
    whole = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()["transformer.wte.weight"]
    assert torch.equal(found.pop(()), whole)
    assert not any(torch.equal(weights, whole) for weights in found.values())
    smaller = found[("--weight_decay", "0.5")]
    assert smaller.norm() < whole.norm()


def test_a_learning_rate_that_is_asked_for_has_the_rates_of_its_own_schedule(begun):
    go_on("--output_dir", str(begun), "--resume_from_checkpoint", str(begun / "checkpoints/step-00000002"),
          "--learning_rate", "5e-4", "--max_steps", "8")  # fmt: skip
    assert [rates(begun)[step] for step in range(3, 9)] == linear(5e-4, 1, 8)[2:]
    assert [rates(begun)[step] for step in (1, 2)] == linear(2e-3, 1, 6)[:2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seed", "7"), "--seed 7: {} was made with seed 42; leave it out"),
        (("--variant", "duo_predict"), "--variant duo_predict: {} was made with variant gpt2"),
        (("--model_args", "n_layer=3", "n_embd=48"), "n_embd=48, n_layer=3: {} was made with n_embd=32, n_layer=2"),
        (("--train_batch_size", "4"), "--train_batch_size 4: {} was made with train_batch_size 8"),
        (("--no-bf16",), "--bf16 (precision float32): {} was made with precision bf16"),
        (("--max_steps", "5"), "{}: has done 6 steps, and the run is to have 5; give more --max_steps"),
    ],
)
def test_what_decides_weights_or_data_is_refused_by_name(options, message, begun, capfd):
    go_on("--output_dir", str(begun), *AUTO, *options, code=2)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert message.format(begun / "checkpoints/step-00000006") in line
    assert "{" not in line
    assert record(begun)["status"] == "finished"


def test_other_data_are_refused_by_name(begun, tmp_path, capfd):
    (tmp_path / "other.txt").write_text("".join(f"Line {i} of another text.\n" for i in range(3000)))
    go_on("--output_dir", str(begun), *AUTO, "--dataset", str(tmp_path / "other.txt"), code=2)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert f"--dataset {tmp_path / 'other.txt'}: " in line
    assert "was made with the training data of " in line


def as_an_older_version_left_it(folder: Path) -> None:
    """`run.json` and manifests without a plan: None where the JSON decided, shapes as they were asked for."""
    facts = record(folder)
    options = {**facts["options"], "learning_rate": 2e-3, "weight_decay": None, "report_to": "none"}
    options = {k: v for k, v in options.items() if k not in ("bf16", "load_best_model_at_end", "warmup_steps")}
    for name in ("schema", "plan", "asked", "deepspeed_json"):
        del facts[name]
    (folder / "run.json").write_text(json.dumps({**facts, "options": options}))
    for path in folder.glob("checkpoints/step-*/manifest.json"):
        manifest = json.loads(path.read_text())
        for name in ("plan", "record", "sha256"):
            manifest.pop(name, None)
        kept = ("variant", "init_from", "data", "block_size", "train_batch_size", "seed")
        identity = {name: manifest["identity"][name] for name in kept}
        manifest["identity"] = {**identity, "size": "nano", "model_args": options["model_args"]}
        path.write_text(json.dumps(manifest))


def test_a_run_of_an_older_version_goes_on(begun, tiny_run, tmp_path, capfd):
    whole = train([*tiny_run, "--save_steps", "2", "--eval_steps", "2", "--save_total_limit", "10", "--max_steps", "6"],
                  tmp_path / "whole", variant="gpt2")  # fmt: skip
    as_an_older_version_left_it(begun)
    go_on("--resume_from_checkpoint", str(begun / "checkpoints/step-00000004"))
    assert metrics(begun) == metrics(whole)
    assert record(begun)["schema"] == 2
    as_an_older_version_left_it(begun)
    go_on("--output_dir", str(begun), *AUTO, "--model_args", "n_layer=3", "--max_steps", "9", code=2)
    assert "--model_args n_layer=3: " in capfd.readouterr().err


def test_an_earlier_checkpoint_retires_the_later_ones(begun, capfd):
    """The case of a branch: what was trained last is what auto goes on from, and the abandoned steps are kept aside."""
    lines = metrics(begun)
    go_on("--resume_from_checkpoint", str(begun / "checkpoints/step-00000002"), "--max_steps", "3",
          "--save_total_limit", "2")  # fmt: skip
    assert checkpoints(begun) == [2, 3]
    assert (begun / "checkpoints/latest").read_text() == "step-00000003"
    aside = begun / "checkpoints/set-aside-001"
    assert sorted(p.name for p in aside.iterdir()) == ["metrics.jsonl", "step-00000004", "step-00000006"]
    assert f"{aside}: the checkpoints after step 2" in capfd.readouterr().err
    assert len((aside / "metrics.jsonl").read_text().splitlines()) == len(lines)
    assert [line["step"] for line in metrics(begun) if "loss" in line] == [1, 2, 3]
    go_on("--output_dir", str(begun), *AUTO, "--max_steps", "5")
    assert record(begun)["starts"][-1]["resumed_from"].endswith("step-00000003")
    # those moved aside are still whole
    go_on("--resume_from_checkpoint", str(aside / "step-00000006"), "--output_dir", str(begun.parent / "back"),
          "--max_steps", "7")  # fmt: skip
    assert rates(begun.parent / "back") == {7: linear(2e-3, 1, 7)[6]}


def test_a_checkpoint_of_another_run_begins_a_branch_and_auto_finds_its_way_back(begun, tmp_path):
    """Also where the branch was stopped before its first checkpoint."""
    branch = tmp_path / "branch"
    start = str(begun / "checkpoints/step-00000004")

    class Stopped(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_save", lambda self: (_ for _ in ()).throw(Stopped))
        with pytest.raises(Stopped):
            train_ds.main(["--resume_from_checkpoint", start, "--output_dir", str(branch)])
    assert checkpoints(branch) == []
    go_on("--output_dir", str(branch), *AUTO)
    assert [s["resumed_from"] for s in record(branch)["starts"]] == [start, start]
    assert checkpoints(begun) == [2, 4, 6], "the other run is left alone"
    assert metrics(branch) == [line for line in metrics(begun) if line["step"] > 4]


@pytest.mark.parametrize("link", [False, True])
def test_a_folder_is_the_same_however_it_is_named(link, begun, monkeypatch, capfd):
    """By a relative path, and through a link."""
    monkeypatch.chdir(begun.parent)
    name = begun.name
    if link:
        (begun.parent / "link").symlink_to(begun)
        name = "link"
    go_on("--output_dir", name, *AUTO)
    assert "nothing is left to do" in capfd.readouterr().err
    go_on("--output_dir", name, *AUTO, "--max_steps", "7")
    assert checkpoints(begun) == [2, 4, 6, 7]
    go_on("--output_dir", name, "--resume_from_checkpoint", f"{name}/checkpoints/step-00000006", "--max_steps", "8")
    assert checkpoints(begun) == [2, 4, 6, 8]
    assert [line["step"] for line in metrics(begun) if "loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert sorted(p.name for p in (begun / "checkpoints").glob("set-aside-*/step-*")) == ["step-00000007"]


def test_a_finished_run_says_that_nothing_is_left_to_do(begun, capfd):
    before = {p: p.read_bytes() for p in begun.rglob("*") if p.is_file()}
    go_on("--output_dir", str(begun), *AUTO)
    assert "finished at step 6, nothing is left to do" in capfd.readouterr().err
    assert {p: p.read_bytes() for p in begun.rglob("*") if p.is_file()} == before


def test_auto_without_a_run_says_what_is_missing(tmp_path, capfd):
    go_on("--output_dir", str(tmp_path / "none"), *AUTO, code=2)
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{tmp_path / 'none'} holds no run to go on with" in line


def test_the_advice_after_a_loss_that_is_not_finite_works_as_printed(tiny_run, tmp_path, in_process, capfd):
    """The case: a rate at which the first update destroys the weights, and a checkpoint of them."""
    options = [*tiny_run, "--save_steps", "1", "--save_total_limit", "20", "--max_steps", "6"]
    folder = train([*options, "--learning_rate", "1e25", "--warmup_steps", "0"], tmp_path / "run", code=3)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("stopped: ")]
    assert record(folder)["status"] == "failed"
    advised = line[line.index("--resume_from_checkpoint") :].split()
    go_on(*advised)
    after = record(folder)
    assert after["status"] == "finished"
    assert after["plan"]["learning_rate"] == float(advised[-1]) == after["asked"]["learning_rate"]
    assert all(math.isfinite(entry["loss"]) for entry in metrics(folder) if "loss" in entry)


def test_the_checkpoint_that_gave_a_loss_that_is_not_finite_is_passed_over(tiny_run, tmp_path, in_process, capfd):
    original = loop.Loop._optimizer_step

    def poisoned(self, batches):
        losses = original(self, batches)
        if self.step == 4:
            with torch.no_grad():
                self.engine.module.transformer.ln_f.weight.fill_(math.nan)
        return losses

    options = [*tiny_run, "--save_steps", "2", "--eval_steps", "100", "--max_steps", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_optimizer_step", poisoned)
        folder = train(options, tmp_path / "run", variant="gpt2", code=3)
    assert checkpoints(folder) == [2, 4]
    assert "the loss of step 5" in (folder / "checkpoints/step-00000004/not_finite.txt").read_text()
    go_on("--resume_from_checkpoint", str(folder / "checkpoints/step-00000004"), "--learning_rate", "1e-5", code=3)
    assert record(folder)["plan"]["learning_rate"] == 1e-5, "one that is named is gone on from all the same"
    go_on("--output_dir", str(folder), *AUTO, "--learning_rate", "2e-3")
    assert "step-00000004: from it the loss of step 5 (epoch 0, global batch 4) is not finite; passed over" in (
        capfd.readouterr().err
    )
    whole = train(options, tmp_path / "whole", variant="gpt2")
    assert metrics(folder) == metrics(whole)
    assert (folder / "checkpoints/set-aside-001/step-00000004/manifest.json").is_file()


def test_a_validation_loss_that_is_not_finite_stops_before_it_is_saved(tiny_run, tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(loop, "evaluate", lambda *_: {"eval_loss": math.inf})
    folder = train([*tiny_run, "--max_steps", "5"], tmp_path / "run", variant="gpt2", code=3)
    assert checkpoints(folder) == []
    assert "the validation loss after step 5 is not finite" in record(folder)["reason"]


def test_a_start_that_fails_does_not_block_the_next(tiny_run, tmp_path, in_process, monkeypatch):
    """Whatever it fails by: its folder holds nothing of a run, and the corrected command is the same again."""

    def broken(*_):
        raise RuntimeError("CUDA out of memory")

    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_engine", broken)
        with pytest.raises(RuntimeError):
            train_ds.main(["--variant", "gpt2", *tiny_run, "--output_dir", str(folder)])
    assert record(folder)["status"] == "failed"
    train([*tiny_run, "--max_steps", "2"], folder, variant="gpt2")
    assert (record(folder)["status"], len(record(folder)["starts"])) == ("finished", 1)
    train([*tiny_run, "--max_steps", "2"], folder, variant="gpt2", code=2)


LOSSES = (5.0, 3.0, 4.0, 3.5)  # of the evaluations after steps 2, 4, 6 and 8


@pytest.mark.parametrize("limit", ["1", "2"])
def test_the_best_model_is_kept_and_exported(limit, tiny_run, ds_json, tmp_path, in_process, monkeypatch):
    original = loop.evaluate

    scripted_losses = iter(LOSSES)

    def scripted(*arguments):
        return {**original(*arguments), "eval_loss": next(scripted_losses)}

    monkeypatch.setattr(loop, "evaluate", scripted)
    options = [*tiny_run, "--eval_steps", "2", "--save_steps", "3", "--save_total_limit", limit, "--max_steps", "8"]
    folder = train([*options, "--load_best_model_at_end"], tmp_path / "run", variant="gpt2")
    facts = record(folder)
    assert facts["plan"]["load_best_model_at_end"] is True
    assert (facts["best"]["step"], facts["best"]["eval_loss"], facts["final_eval"]["eval_loss"]) == (4, 3.0, 3.0)
    kept = {"1": [4, 8], "2": [4, 6, 8]}[limit]
    assert checkpoints(folder) == kept
    monkeypatch.setattr(loop, "evaluate", original)
    fourth = train([*options, "--max_steps", "4", "--lr_scheduler_type", "constant"], tmp_path / "four", variant="gpt2")
    weights = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    exported = tmp_path / "exported"
    from gpt2_variants.__main__ import main

    assert (
        main(["export", "--checkpoint", str(folder / "checkpoints/step-00000004"), "--output_dir", str(exported)]) == 0
    )
    same = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    assert all(torch.equal(weights[k], same[k]) for k in weights)
    last = AutoModelForCausalLM.from_pretrained(fourth / "model").state_dict()
    assert any(not torch.equal(weights[k], last[k]) for k in weights)


def test_without_asking_the_last_weights_are_exported(begun):
    assert record(begun)["plan"]["load_best_model_at_end"] is False
    assert "best" not in record(begun)
    np.testing.assert_equal(record(begun)["final_eval"]["eval_loss"], metrics(begun)[-1]["eval_loss"])
