"""TF32, repeatable operators, and what a first step leaves out of the speed; all of it recorded."""

import contextlib
import json
import os
from dataclasses import replace

import pytest
import torch
from conftest import finish, launch, metrics, train

from gpt2_variants.config.command_line import parse
from gpt2_variants.config.deepspeed_json import resolve_ds_config
from gpt2_variants.config.plan import DataFacts, make_plan, recipe
from gpt2_variants.training.arithmetic import arithmetic
from gpt2_variants.training.loop import Loop

SETTINGS = (
    torch.are_deterministic_algorithms_enabled,
    torch.get_float32_matmul_precision,
    lambda: torch.backends.cudnn.deterministic,
    lambda: torch.backends.cudnn.benchmark,
    lambda: torch.utils.deterministic.fill_uninitialized_memory,
    lambda: os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
)


def settings() -> list:
    return [setting() for setting in SETTINGS]


def test_deterministic_is_on_while_training_and_off_afterwards(tiny_run, tmp_path, monkeypatch, in_process):
    seen = []
    step = Loop._optimizer_step
    monkeypatch.setattr(Loop, "_optimizer_step", lambda self, *a: seen.append(settings()) or step(self, *a))
    before = settings()
    folder = train([*tiny_run, "--max_steps", "2"], tmp_path / "run", "--deterministic", variant="gpt2")
    assert seen == [[True, "highest", True, False, False, ":4096:8"]] * 2
    assert settings() == before
    assert before[0] is False
    assert json.loads((folder / "run.json").read_text())["plan"]["deterministic"] is True
    plain = train([*tiny_run, "--max_steps", "2"], tmp_path / "plain", variant="gpt2")
    assert seen[2:] == [before] * 2
    assert metrics(plain) == metrics(folder)  # on a CPU everything is


@pytest.fixture
def plan(tiny_run, tmp_path):
    run = parse(["--variant", "gpt2", *tiny_run, "--output_dir", str(tmp_path / "run")])
    return make_plan(run, DataFacts(100, None, "", None), run.make_config(100), 1)


def test_tf32_is_on_inside_and_off_afterwards_also_after_a_failure(plan):
    with arithmetic(plan):
        assert torch.get_float32_matmul_precision() == "highest"
    with contextlib.suppress(KeyError), arithmetic(replace(plan, tf32=True)):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("words", "on"), [([], True), (["--no-tf32"], False), (["--tf32"], True)])
def test_tf32_is_the_default_on_cuda_alone(words, on, tiny_run, tmp_path, monkeypatch, capsys):
    for module in ("plan", "checks"):
        monkeypatch.setattr(f"gpt2_variants.config.{module}.has_cuda", lambda: True)
    run = parse(["--variant", "gpt2", *tiny_run, "--output_dir", str(tmp_path / "run"), *words])
    assert make_plan(run, DataFacts(100, None, "", None), run.make_config(100), 1).tf32 is on


def test_tf32_without_cuda_is_refused(tiny_run, tmp_path, in_process, capsys):
    assert not torch.cuda.is_available()
    train(tiny_run, tmp_path / "run", "--tf32", variant="gpt2", code=2)
    assert "error: --tf32: has no effect without a CUDA device" in capsys.readouterr().err


def test_a_plan_of_before_is_of_the_same_recipe(plan):
    now = vars(plan)
    before = {name: value for name, value in now.items() if name not in ("tf32", "deterministic")}
    assert recipe(now) == recipe(before)
    assert recipe({**now, "tf32": True}) != recipe(before)


def test_the_first_step_is_left_out_of_the_speed(tiny_run, tmp_path, monkeypatch, in_process):
    """It takes an hour here, by a clock of 1 s a step; the steps after it give the speed, also after a resume."""
    clock = {"now": 0.0, "steps": 0}
    monkeypatch.setattr("gpt2_variants.measuring.time.perf_counter", lambda: clock["now"])
    step = Loop._optimizer_step

    def slow_at_first(self, *args):
        if clock.get("of") is not self:
            clock.update(of=self, now=clock["now"] + 3600)
        else:
            clock["now"] += 1
        return step(self, *args)

    monkeypatch.setattr(Loop, "_optimizer_step", slow_at_first)
    folder = train([*tiny_run, "--max_steps", "5", "--logging_steps", "2"], tmp_path / "run", variant="gpt2")
    more = ("--max_steps", "8", "--resume_from_checkpoint", "auto")
    train([*tiny_run, "--logging_steps", "2"], folder, *more, variant="gpt2")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    speeds = {line["step"]: line["tokens_per_second"] for line in lines if "loss" in line}
    # step 6 is the first after the resume, and is logged: there is no speed yet
    assert speeds == {2: 8 * 32, 4: 8 * 32, 5: 8 * 32, 6: None, 8: 8 * 32}


def test_gradients_are_sent_during_the_backward_pass_from_two_ranks_on(tiny_run, ds_json, tmp_path):
    def resolved(world: int, **zero) -> dict:
        path = ds_json(zero_optimization={"stage": 1, **zero})
        options = ["--variant", "gpt2", *tiny_run, "--deepspeed_config", path, "--output_dir", str(tmp_path / "run")]
        run = parse(options)
        made = make_plan(run, DataFacts(100, None, "", None), run.make_config(100), world)
        assert made.ds_config == resolve_ds_config(run, world, made.total_steps)
        return made

    for zero in ({}, {"overlap_comm": "auto"}):
        assert resolved(1, **zero).ds_config["zero_optimization"]["overlap_comm"] is False
        assert resolved(2, **zero).ds_config["zero_optimization"]["overlap_comm"] is True
        assert "overlap_comm=true" in resolved(2, **zero).chosen
        assert "overlap_comm=true" not in resolved(1, **zero).chosen
    for stated in (True, False):
        for world in (1, 2):
            assert resolved(world, overlap_comm=stated).ds_config["zero_optimization"]["overlap_comm"] is stated
            assert "overlap_comm=true" not in resolved(world, overlap_comm=stated).chosen


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_sending_during_the_backward_pass_changes_no_loss(stage, tiny_run, ds_json, tmp_path):
    """In bf16, on two ranks."""
    losses = {}
    for overlap in (False, True):
        folder = tmp_path / str(overlap)
        path = ds_json(zero_optimization={"stage": stage, "overlap_comm": overlap})
        options = ["--variant", "gpt2", *tiny_run, "--max_steps", "4", "--deepspeed_config", path]
        assert [code for code, _ in finish(launch(2, [*options, "--output_dir", str(folder)]))] == [0, 0]
        losses[overlap] = metrics(folder)
    assert losses[True] == losses[False]
