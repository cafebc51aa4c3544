"""What a run says before its first step and while it goes on: few lines, all its own."""

import io
import math
import os
import socket
import subprocess
import sys
import types

import pytest
from conftest import ROOT, launch, output_of

from gpt2_variants.config.command_line import parse
from gpt2_variants.measuring import duration
from gpt2_variants.training import engine
from gpt2_variants.training.progress import Progress


def before_the_first_step(said: str) -> list[str]:
    lines = said.splitlines()
    return lines[: next(n for n, line in enumerate(lines) if line.startswith("the first step is done"))]


def test_a_run_says_what_it_is_in_five_lines_with_wandb(tiny_run, tmp_path):
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    options = ["--variant", "duo_predict", *tiny_run, "--max_steps", "1", "--report_to", "wandb"]
    (process,) = launch(1, [*options, "--output_dir", str(folder)], fresh=True)
    out, err = output_of(process)
    assert process.returncode == 0, err
    lines = before_the_first_step(err)
    assert len(lines) == 5, lines
    model, data, training, numbers, wandb = lines
    assert wandb.startswith("W&B: offline")
    assert model.startswith("duo_predict: ")
    for text in ("parameters, in bf16, on ", "cores), into ", str(folder)):
        assert text in model
    assert data.startswith("data: ")
    assert "tokens" in data
    assert training.startswith("training: 1 step of 8 x 32 tokens, 256 in all; --preset demo sets ")
    assert "learning_rate=0.002" in training
    assert "train_batch_size" not in training, "it was asked for"
    assert numbers.startswith("to come: loss, in nats per prediction")
    assert str(folder / "metrics.jsonl") in numbers
    vocabulary = int(numbers.split("among ")[1].split(" entries")[0].replace(",", ""))
    assert f"{math.log(vocabulary):.2f} is guessing" in numbers
    assert out.startswith("duo_predict, "), "the summary at the end, and nothing of DeepSpeed's"


def test_a_preset_that_was_chosen_is_said_with_the_reason(corpus, tmp_path):
    options = parse(["--variant", "gpt2", "--dataset", str(corpus), "--output_dir", str(tmp_path / "run")])
    assert options.chosen[0] == "preset=demo"
    asked = parse(["--variant", "gpt2", "--preset", "demo", "--output_dir", str(tmp_path / "run")])
    assert "preset=demo" not in asked.chosen


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (49.94, "49.9 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (119.6, "2 min 0 s"),
        (3599.4, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (7200 + 59 * 60 + 31, "3 h 0 min"),
        (360000, "100 h 0 min"),
    ],
)
def test_durations_are_in_one_form(seconds, words):
    assert duration(seconds) == words


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_there_is_one_time_left(stream, monkeypatch):
    """The bar's own guess, from steps, disagreed with that from tokens."""
    out = stream()
    monkeypatch.setattr(sys, "stderr", out)
    with Progress(0, 400, shown=True) as progress:
        progress.show(1, 7.5, None, tokens_left=399 * 1024)
        progress.show(100, 6.25, 1024.0, tokens_left=300 * 1024)
        progress.show(400, 5.0, 1024.0, tokens_left=0)
    shown = out.getvalue().replace("\r", "\n").splitlines()
    last_of = {step: [line for line in shown if step in line][-1].strip() for step in ("1/400", "100/400", "400/400")}
    assert "left" not in last_of["1/400"]
    assert last_of["100/400"].endswith("loss 6.2500, 1,024 tokens/s, 5 min 0 s left")
    assert last_of["400/400"].endswith("loss 5.0000, 1,024 tokens/s")
    assert not any("<" in line or "?" in line or "step/s" in line for line in shown)
    assert any("steps" in line for line in shown) == (stream is Terminal)


def test_a_port_that_is_taken_is_one_line(tiny_run, tmp_path):
    """`deepspeed` takes 29500 for every run of a machine."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        env = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, "train_ds.py", "--variant", "gpt2", *tiny_run, "--output_dir", str(tmp_path / "run")]
        env["MASTER_PORT"] = str(taken.getsockname()[1])
        out = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 2
    assert out.stderr.splitlines()[-1].startswith(f"error: port {env['MASTER_PORT']}: another process listens there")
    assert "Traceback" not in out.stderr
    assert not (tmp_path / "run").exists()


AT_THE_FIRST_STEP = """
import os, sys
from gpt2_variants.train_command import main
from gpt2_variants.training.loop import Loop

def first_step(self, *_):
    print(*sys.modules)
    sys.stdout.flush()
    os._exit(0)

Loop._report_first_step = first_step
main()
"""
NOT_NEEDED = ("torch._inductor.compile_fx", "wandb", "matplotlib", "tensorboard")
NOT_NEEDED += tuple(
    f"gpt2_variants.{room}" for room in ("report", "hub", "inference", "pictures", "drawing", "contract")
)


def test_what_the_first_step_does_not_need_is_not_imported_before_it(tiny_run, tmp_path):
    """Inductor alone takes more than a second: DeepSpeed imports it by its Muon, whatever the optimizer."""
    options = ["--variant", "gpt2", *tiny_run, "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TORCH", "RANK"))}
    command = [sys.executable, "-c", AT_THE_FIRST_STEP, *options]
    out = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    imported = set(out.stdout.split())
    assert {"torch", "deepspeed", "gpt2_variants.training.loop"} <= imported
    assert imported.isdisjoint(NOT_NEEDED)


@pytest.mark.parametrize(
    ("kind", "compiled", "left_out"), [("AdamW", False, True), ("Muon", False, False), ("AdamW", True, False)]
)
def test_nothing_is_left_out_of_a_run_that_compiles_or_takes_muon(kind, compiled, left_out, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "as it was")
    plan = types.SimpleNamespace(compile=compiled, optimizer={"type": kind})
    with engine._without_inductor(plan):
        assert (os.environ["TORCHDYNAMO_DISABLE"] == "1") == left_out
    assert os.environ["TORCHDYNAMO_DISABLE"] == "as it was"
    monkeypatch.delenv("TORCHDYNAMO_DISABLE")
    with engine._without_inductor(plan):
        pass
    assert "TORCHDYNAMO_DISABLE" not in os.environ
