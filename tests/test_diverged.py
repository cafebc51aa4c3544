"""After a loss that is not finite a run goes on from the last checkpoint that is sound, and says which that is."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import metrics, train, zero
from made_runs import make_run

import train_ds
from gpt2_variants import report
from gpt2_variants.training import checkpoint, loop, soundness
from gpt2_variants.training.checkpoint import newest_valid


def losses(*values: float, key: str = "loss", first: int = 1) -> list[dict]:
    return [{"step": first + n, key: value} for n, value in enumerate(values)]


@pytest.mark.parametrize(
    ("records", "step", "ruined_at"),
    [
        (losses(9.0, 8.0, 7.0), 3, None),
        (losses(9.0, 8.0, 10.0), 3, None),  # exactly 2 nats above the lowest before
        (losses(9.0, 8.0, 10.1), 3, 3),
        (losses(9.0, 8.0, 10.1), 2, 3),  # the weights after step 2 gave the loss of step 3
        (losses(9.0, 8.0, 10.1), 1, None),
        (losses(9.0, 8.0, 10.1, 7.9), 3, 3),
        (losses(9.0, 8.0, 10.1, 7.9), 4, None),
        (losses(9.0, 8.0, math.nan), 3, 3),
        (losses(9.0, 8.0, math.inf), 2, 3),
        (losses(math.nan, 8.0), 2, None),
        (losses(80.0), 1, None),  # nothing to measure it by
        ([], 5, None),
        ([{"step": 100, "loss": 5.0}, {"step": 200, "loss": 8.0}], 250, 200),  # the last one logged by then
        ([{"step": 100, "loss": 5.0}, {"step": 200, "loss": 8.0}], 150, None),  # 50 steps after
        (losses(5.0, 8.0, key="eval_loss"), 2, 2),
        (losses(5.0, 8.0, key="eval_loss"), 1, None),
        ([*losses(5.0, 5.0, 5.0), {"step": 1, "eval_loss": 4.0}, {"step": 3, "eval_loss": 6.1}], 3, 3),
    ],
)
def test_a_loss_is_out_of_range_2_nats_above_the_lowest_before(records, step, ruined_at):
    said = soundness.out_of_range(records, step)
    assert (said is None) == (ruined_at is None)
    assert said is None or f"at step {ruined_at}, " in said


def spoil(file: Path, where: tuple, value: float) -> None:
    """Put `value` at one place of one tensor in a checkpoint, and its new hash into the manifest."""
    content = torch.load(file, weights_only=False)
    place = content
    for name in where:
        place = place[name]
    place.data.view(-1)[3] = value
    torch.save(content, file)
    manifest = json.loads((file.parent / "manifest.json").read_text())
    del manifest["sha256"]
    with file.open("rb") as stream:
        manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": checkpoint._sha256(stream)}
    (file.parent / "manifest.json").write_text(json.dumps(manifest))


WEIGHT = ("module", "transformer.ln_f.weight")
PARTITION = ("optimizer_state_dict", "base_optimizer_state", "state", 0)
PLACES = {
    0: [
        ("mp_rank_00_model_states.pt", WEIGHT, "weight"),
        ("mp_rank_00_model_states.pt", ("optimizer", "fp32_groups", 0, 0), "fp32_groups"),
        ("mp_rank_00_model_states.pt", ("optimizer", "optimizer_state_dict", "state", 0, "exp_avg"), "exp_avg"),
    ],
    1: [
        ("mp_rank_00_model_states.pt", WEIGHT, "ln_f.weight"),
        ("*optim_states.pt", ("optimizer_state_dict", "single_partition_of_fp32_groups", 0), "single_partition"),
        ("*optim_states.pt", (*PARTITION, "exp_avg"), "exp_avg"),
        ("*optim_states.pt", (*PARTITION, "exp_avg_sq"), "exp_avg_sq"),
    ],
}


@pytest.fixture(scope="module", params=PLACES)
def begun(request, tiny_run, ds_json, tmp_path_factory):
    """A run of a ZeRO stage with whole checkpoints after 2, 4 and 6 steps; and the stage."""
    place = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpt2_variants.report.show", lambda run: None)
        config = ("--deepspeed_config", ds_json(zero_optimization=zero(request.param)))
        options = [*tiny_run, *config, "--save_steps", "2", "--eval_steps", "9", "--max_steps", "6"]
        return train(options, place / "run", variant="gpt2"), request.param


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_found_wherever_it_stands(value, begun, tmp_path):
    folder, stage = begun
    root = folder / "checkpoints"
    assert [soundness.not_finite_in(path) for path in sorted(root.glob("step-*"))] == [None] * 3
    for n, (name, where, said) in enumerate(PLACES[stage]):
        copy = shutil.copytree(root, tmp_path / str(n) / "checkpoints")
        (file,) = (copy / "step-00000006").glob(name)
        spoil(file, where, value)
        assert checkpoint.fault_of(copy / "step-00000006") is None
        (line,) = soundness.pass_over_ruined(copy, folder / "metrics.jsonl")
        assert line.startswith("step-00000006 is passed over: its ")
        assert said in line
        assert line.endswith(f"is not finite ({file.name})")
        newest, passed = newest_valid(copy)
        assert newest.name == "step-00000004"
        assert passed == [f"checkpoint {copy / 'step-00000006'}: {line.split(': ', 1)[1]}; passed over"]


def stopped_line(err: str) -> str:
    (line,) = [line for line in err.splitlines() if line.startswith("stopped: ")]
    return line


def go_on_as_said(line: str) -> None:
    assert train_ds.main(line[line.index("--resume_from_checkpoint") :].split()) == 0


def test_finite_losses_of_a_ruined_optimizer_do_not_keep_its_checkpoint(tiny_run, tmp_path, in_process, capfd):
    """Adam's first moment of a weight is not finite from step 4 on, which shows in a loss a step later."""
    original = loop.Loop._save

    def ruining(self):
        if self.step == 4:
            for state in self.engine.optimizer.optimizer.state.values():
                state["exp_avg"].view(-1)[0] = math.inf
        original(self)

    options = [*tiny_run, "--save_steps", "2", "--eval_steps", "100", "--max_steps", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "_save", ruining)
        folder = train(options, tmp_path / "run", variant="gpt2", code=3)
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4, 5], "the loss of step 5 was finite"
    line = stopped_line(capfd.readouterr().err)
    assert "the loss of step 6" in line
    assert "step-00000004 is passed over: its optimizer's " in line
    assert "a lower rate goes on from step-00000002: " in line
    reason = json.loads((folder / "run.json").read_text())["reason"]
    assert "step-00000004 is passed over" in reason
    go_on_as_said(line)
    assert json.loads((folder / "run.json").read_text())["starts"][-1]["resumed_from"].endswith("step-00000002")


def test_a_run_that_diverges_goes_on_from_before_it_did(tiny_run, tmp_path, in_process, capfd):
    """At a rate of 1e4 after a rise of 20 steps: finite losses of millions, then none that is finite."""
    rates = ("--learning_rate", "1e4", "--warmup_steps", "20", "--max_steps", "40")
    options = [*tiny_run, "--save_steps", "1", "--eval_steps", "100", *rates, "--save_total_limit", "9"]
    folder = train(options, tmp_path / "run", variant="gpt2", code=3)
    seen = [line["loss"] for line in metrics(folder)]
    assert seen[1] < 10 < 1e5 < seen[-1] < math.inf
    line = stopped_line(capfd.readouterr().err)
    first_risen = next(n for n, loss in enumerate(seen, start=1) if loss > min(seen[:n]) + 2)
    sound = first_risen - 2  # the step before gave that loss
    assert f"a lower rate goes on from {checkpoint.name_of(sound)}: " in line
    marked = sorted(path.parent.name for path in (folder / "checkpoints").glob("step-*/not_finite.txt"))
    assert marked == [checkpoint.name_of(step) for step in range(sound + 1, len(seen) + 1)]
    go_on_as_said(line)
    after = [entry["loss"] for entry in metrics(folder) if "loss" in entry]
    assert max(after) < 10
    assert after[:sound] == seen[:sound]


def test_the_last_checkpoint_in_range_is_not_deleted_for_ruined_ones(tiny_run, tmp_path, in_process, monkeypatch):
    """With one that is kept by the limit: two stay while the loss is out of range."""
    scripted = iter([9.0, 8.0, 7.0, 6.0, 20.0, 30.0, 40.0, 50.0])
    original = loop.Loop._log_training

    def told(self, losses, progress):
        original(self, losses, progress)
        self.losses[-1]["loss"] = next(scripted)

    monkeypatch.setattr(loop.Loop, "_log_training", told)
    options = [*tiny_run, "--save_steps", "2", "--eval_steps", "100", "--max_steps", "8", "--save_total_limit", "1"]
    folder = train(options, tmp_path / "run", variant="gpt2")
    assert sorted(path.name for path in (folder / "checkpoints").glob("step-*")) == ["step-00000004", "step-00000008"]


def test_a_marker_of_an_older_version_is_told_as_before(begun, tmp_path):
    copy = shutil.copytree(begun[0] / "checkpoints", tmp_path / "checkpoints")
    (copy / "step-00000006/not_finite.txt").write_text("the loss of step 7 is not finite\n")
    _, (line,) = newest_valid(copy)
    assert line.endswith("step-00000006: from it the loss of step 7 is not finite; passed over")


def test_a_report_draws_a_run_that_diverged(tmp_path):
    """A perplexity beyond all axes, and one that is no number, have no marker."""
    for name, value in (("huge", 700.0), ("none", math.nan), ("endless", math.inf)):
        run = make_run(tmp_path / name, losses={10: 5.0, 20: value} if math.isfinite(value) else {10: 5.0, 20: 6.0})
        if not math.isfinite(value):
            lines = (run / "metrics.jsonl").read_text().replace("6.0,", f"{json.dumps(value)},")
            (run / "metrics.jsonl").write_text(lines.replace(str(math.exp(6.0)), json.dumps(value)))
        assert report.write([run]).page.is_file()
