"""What a person sees: the end of a demo, and the small commands."""

import json

import pytest
from conftest import launch

from gpt2_variants import VARIANTS, __main__
from gpt2_variants.report import plot, summary

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A finished tiny run, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    (process,) = launch(1, ["--variant", "duo_predict", *tiny_run, "--max_steps", "6", "--output_dir", str(folder)])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return folder, out, err


def test_a_demo_ends_with_figures_plot_and_sample(run):
    folder, out, err = run
    facts = json.loads((folder / "run.json").read_text())
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"perplexity {last['eval_perplexity']:.2f}" in out
    assert f"infill      perplexity {last['eval_infill_perplexity']:.2f}" in out
    assert f"unigram perplexity of the same text {facts['unigram_perplexity']:.2f}" in out
    assert "sample      'The following statement" in out
    assert (folder / "curves.png").read_bytes().startswith(PNG)
    assert "step 6/6: loss" in err
    assert "tokens/s" in err
    assert "\r" not in err  # no carriage returns in a log file
    for noise in ("Warning", "WARNING", "Traceback"):
        assert noise not in err + out


def test_report_prints_the_figures_and_draws_the_plot_anew(run, capsys):
    folder = run[0]
    (folder / "curves.png").unlink()
    assert __main__.main(["report", str(folder)]) == 0
    out = capsys.readouterr().out
    assert summary(folder) in out
    assert plot(folder).read_bytes().startswith(PNG)


def test_generate_continues_the_prompt_the_same_way_for_the_same_seed(run, capsys):
    outs = []
    for seed in ("1", "1", "2"):
        assert (
            __main__.main(["generate", "--model", str(run[0] / "model"), "--prompt", "The time", "--seed", seed]) == 0
        )
        outs.append(capsys.readouterr().out)
    assert outs[0].startswith("The time")
    assert outs[0] == outs[1] != outs[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--model", "nowhere", "--prompt", "x"], "--model nowhere: no exported model there"),
        (["report", "nowhere"], "nowhere: holds no run"),
    ],
)
def test_faults_are_one_line_and_exit_code_2(arguments, message, capsys):
    assert __main__.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_prompt_that_is_empty_or_too_long_is_a_fault(run, capsys):
    for prompt, message in (("", "the prompt is empty"), ("The time " * 40, "the model 32 positions")):
        assert __main__.main(["generate", "--model", str(run[0] / "model"), "--prompt", prompt]) == 2
        assert message in capsys.readouterr().err


def test_list_names_every_variant(capsys):
    assert __main__.main(["list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in VARIANTS)
    assert len(out.splitlines()) == len(VARIANTS)
