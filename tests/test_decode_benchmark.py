"""The benchmark of inference: what it runs, reports and refuses; no times are asserted."""

import importlib
import json

import pytest
import torch
from conftest import ROOT


@pytest.fixture(scope="module")
def decode():
    """benchmarks/decode.py; its folder is on the path while the tests of this module run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("decode")


TINY = ["--size", "nano", "--prompt_length", "5", "--new_tokens", "3", "--rounds", "2", "--batch_sizes", "1", "2"]


def test_figures_of_every_case_and_batch_size(decode, tmp_path):
    assert decode.main([*TINY, "--variants", "parallel", "duo_predict", "--output_dir", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "decode.json").read_text())
    rows = record["tables"]["Variants"]
    cases = ["gpt2", "parallel", "duo_predict"]
    assert [(row["batch"], row["case"]) for row in rows] == [(batch, case) for batch in (1, 2) for case in cases]
    for row in rows:
        rounds = 4 if row["case"] == "gpt2" else 2  # gpt2 takes turns with each of the two variants
        assert len(row["prefill_seconds"]) == len(row["decode_seconds"]) == rounds
        tokens = row["decode_tokens_per_second"] * row["decode_seconds_per_step"]
        assert tokens == pytest.approx(row["batch"])
        assert row["decode_relative"] > 0
        assert row["prefill_relative"] > 0
    assert "| parallel | 2 |" in (tmp_path / "decode.md").read_text()


def test_the_ratio_is_the_references_time_over_the_cases_own(decode):
    seconds = {"gpt2": ([2.0, 2.0, 9.0], [1.0, 1.0, 1.0]), "drift": ([1.0, 4.0, 3.0], [2.0, 2.0, 4.0])}
    row = decode._row(decode.parse(TINY), "drift", 2, seconds)
    assert row["prefill_relative"] == 2.0  # of 2, 0.5 and 3
    assert row["decode_relative"] == 0.5
    assert row["prefill_tokens_per_second"] == 2 * 5 / 3
    assert row["decode_tokens_per_second"] == 2 * 3 / 2


@pytest.mark.parametrize("variant", ["gpt2", "parallel_add", "rotating_head"])
def test_the_steps_decode_what_generate_does(decode, variant):
    model = decode.make_model(decode.parse(TINY), variant, "cpu")
    prompt = torch.randint(0, 4000, (2, 5), generator=torch.Generator().manual_seed(0))
    generated = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    *_, tokens = decode.take(decode.Case(variant, model), prompt, 3)
    assert torch.equal(tokens, generated[:, 6:])


def test_faults_are_told_at_once_a_line_each(decode, capsys, tmp_path):
    (tmp_path / "file").touch()
    arguments = ["--variants", "gpt3", "--size", "huge", "--dtype", "fp8", "--batch_sizes", "1", "0"]
    arguments += ["--prompt_length", "x", "--rounds", "-1", "--output_dir", str(tmp_path / "file")]
    assert decode.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    starts = ["--variants gpt3: not known", "--size huge: not known", "--dtype fp8: bfloat16 or float32 is allowed"]
    starts += ["--batch_sizes 0: a whole number", "--prompt_length x: a whole number", "--rounds -1: a whole number"]
    starts += [f"--output_dir {tmp_path / 'file'}: is a file"]
    for line, start in zip(lines, starts, strict=True):
        assert line.startswith(f"error: {start}")
    assert decode.main(["--unknown", "1"]) == 2
    assert capsys.readouterr().err.startswith("error: unrecognized arguments: --unknown 1")
