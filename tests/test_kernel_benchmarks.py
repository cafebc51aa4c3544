"""The benchmarks of loss head, attention and data: what they compute, report and refuse; no times are asserted."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, from_benchmarks

kernel_speed, loss_heads = from_benchmarks("kernel_speed"), from_benchmarks("loss_heads")
duo_attentions, data = from_benchmarks("duo_attentions"), from_benchmarks("data")

TINY = ["--rows", "5", "--channels", "8", "--vocabulary", "11", "--no-compile", "--rounds", "2", "--head_rounds", "2"]
TINY += ["--heads", "2", "--head_size", "8", "--tokens", "4"]


def test_figures_of_loss_heads_attention_and_step(kernel_speed, duo_attentions, tmp_path):
    step = duo_attentions.StepShape(sequences=2, tokens=6, layers=1, channels=16, heads=2, vocabulary=32)
    plan = replace(kernel_speed.parse([*TINY, "--output_dir", str(tmp_path)]), step=step)
    assert kernel_speed.carry_out(plan) == 0
    record = json.loads((tmp_path / "kernels.json").read_text())
    heads, attention, steps = record["tables"].values()

    assert [row["alternative"] for row in heads] == 2 * ["plain", "ours", "torch's linear_cross_entropy", "Liger"]
    by_name = {(row["alternative"], row["dtype"]): row for row in heads}
    assert by_name["Liger", "float32"]["not_measured"].startswith("for GPUs")
    for (name, dtype), row in by_name.items():
        if "not_measured" in row:
            continue
        assert len(row["rounds"]) == 2
        assert row["peak_bytes"] >= 0
        assert row["relative_min"] <= row["relative"] <= row["relative_max"]
        exact = dtype == "float32"
        assert row["grad_hidden_error"] < (1e-6 if exact else 1e-2)
        assert row["grad_weight_error"] < (1e-6 if exact else 1e-2)
        in_low_precision = name.startswith("torch") and not exact  # its sum of losses is rounded to bf16
        assert row["loss_error"] < (5e-2 if in_low_precision else 1e-5)

    ways = ["dense mask", "ours", "ours by the flash kernel", "ours by blocks", "FlexAttention"]
    assert [row["way"] for row in attention] == 4 * ways
    for row in attention:
        measured = "not_measured" not in row
        assert measured == (row["way"] != "FlexAttention" and not (row["way"].endswith("kernel") and row["dropout"]))
        if measured:
            assert len(row["both_rounds"]) == 2
        if measured and not row["dropout"]:
            exact = row["dtype"] == "float32"
            assert row["error"] < (1e-5 if exact else 5e-2)
            assert row["grad_error"] < (1e-5 if exact else 5e-2)

    assert [(row["dtype"], row["dropout"]) for row in steps] == [
        (dtype, dropout) for dtype in ("bfloat16", "float32") for dropout in (0.0, 0.1)
    ]
    assert steps[0]["loss_difference"] < 0.05
    assert steps[2]["loss_difference"] < 1e-5
    page = (tmp_path / "kernels.md").read_text()
    for said in ("5 rows x 8 x 11", "| ours by blocks | B 1, H 2, S 4, D 8 | float32 |", "CUDA only", record["device"]):
        assert said in page


def test_a_head_that_fails_is_noted_and_the_others_go_on(loss_heads, tmp_path):
    shape, said = loss_heads.Shape(5, 8, 11), []
    loss_heads.write_reference(shape, tmp_path / "reference")
    names = ["plain", "none such"]
    plain, bad = loss_heads._measure_dtype(shape, torch.float32, names, 1, tmp_path / "reference", said.append)
    assert plain["relative"] == 1
    assert bad["failed"]
    assert bad["not_measured"] == "ValueError: there is no loss head 'none such'"
    assert len(said) == 2
    with loss_heads._noted(bad):
        raise EOFError
    assert bad["not_measured"] == "its process was killed: out of memory?"


@pytest.mark.parametrize("neighbour", [True, False])
def test_flex_attention_is_given_the_dense_mask(duo_attentions, neighbour):
    place = torch.arange(2 * 5 - 1)
    seen = duo_attentions.sees(5, neighbour)(0, 0, place[:, None], place[None, :])
    assert torch.equal(seen, duo_attentions.dense_mask(5, neighbour, torch.device("cpu")))


@pytest.mark.slow
def test_figures_of_the_data(data, tmp_path, monkeypatch):
    measured = {
        "tables": {"Variants": [{"case": "gpt2", "size": "nano", "tokens_per_step": 32, "seconds_per_step": 2}]}
    }
    (tmp_path / "throughput.json").write_text(json.dumps(measured))
    monkeypatch.setattr(data.results_page, "folder", lambda device: tmp_path)
    arguments = ["--megabytes", "1", "--block_size", "16", "--batch_size", "4", "--batches", "3"]
    assert data.main([*arguments, "--processes", "1", "--rounds", "2"]) == 0
    record = json.loads((tmp_path / "data.json").read_text())
    (loader,), shares, (one,) = (record["tables"][name] for name in ("Data loader", "Share of a step", "Tokenising"))
    assert loader["tokens"] == 4 * 16
    assert loader["seconds_min"] <= loader["seconds"] <= loader["seconds_max"]
    (nano,) = shares
    assert nano["share"] == pytest.approx(32 / 64 * loader["seconds"] / 2)
    assert one["processes"] == 1
    assert one["load_scaling"] == one["tokenise_scaling"] == 1
    assert len(one["load_seconds"]) == len(one["tokenise_seconds"]) == 2
    assert one["tokenise_megabytes_per_second"] > 0


def test_faults_are_told_at_once_a_line_each(kernel_speed, data, capsys, tmp_path):
    (tmp_path / "file").touch()
    place = ["--output_dir", str(tmp_path / "file")]

    def lines(main, arguments):
        assert main([*arguments, *place]) == 2
        return capsys.readouterr().err.splitlines()

    told = lines(
        kernel_speed.main,
        [
            "--rows",
            "0",
            "--vocabulary",
            "1",
            "--tokens",
            "8",
            "1",
            "--dropouts",
            "1",
            "--dtypes",
            "fp8",
            "--rounds",
            "x",
        ],
    )
    starts = ["--rows 0: a whole number from 1", "--vocabulary 1: a whole number from 2", "--tokens 1: a whole number"]
    starts += ["--dropouts 1: a number from 0 to below 1", "--dtypes fp8: not known; of bfloat16, float32"]
    starts += ["--rounds x: a whole", f"--output_dir {tmp_path / 'file'}: is a file"]
    for line, start in zip(told, starts, strict=True):
        assert line.startswith(f"error: {start}")

    told = lines(data.main, ["--tokenizer", "./none", "--block_size", "1", "--processes", "0"])
    starts = ["--tokenizer ./none: no such folder", "--block_size 1: a whole number from 2"]
    starts += [f"--output_dir {tmp_path / 'file'}: is a file", "--processes 0: a whole number"]
    for line, start in zip(told, starts, strict=True):
        assert line.startswith(f"error: {start}")
    assert kernel_speed.main(["--unknown"]) == data.main(["--unknown"]) == 2
    assert capsys.readouterr().err.count("error: unrecognized arguments: --unknown") == 2


@pytest.mark.parametrize("installed", [True, False])
def test_the_command_gives_way_to_the_package_of_its_name(installed, tmp_path):
    """transformers imports `kernels`, and finds a script's own folder first."""
    if installed:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("from .part import VALUE")
        (tmp_path / "kernels" / "part.py").write_text("VALUE = 1")
    code = "import kernels; print(getattr(kernels, 'VALUE', None), len(vars(kernels)) > 0)"
    path = f"{ROOT / 'benchmarks'}:{tmp_path}"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[0] == ("1" if installed else "None")


@pytest.mark.slow
def test_the_command_is_the_benchmark():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "kernels.py"), "--rows", "none"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --rows")
