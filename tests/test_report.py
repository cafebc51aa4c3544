"""Several runs beside one another: figures against ones computed here another way."""

import importlib.util
import json
import math

import numpy as np
import pytest
from made_runs import groups_of, make_run, row
from scipy import stats

from gpt2_variants import __main__, report
from gpt2_variants.faults import UsageError

# --- groups and their figures -----------------------------------------------------------------------------------------


def test_seeds_are_averaged_with_their_sample_standard_deviation(tmp_path, text_of):
    ends = [3.9, 4.0, 4.3]
    runs = [make_run(tmp_path / str(n), seed=n, losses={10: 5.0, 20: end}) for n, end in enumerate(ends)]
    (group,) = groups_of(*runs)
    loss, perplexity = group.final("eval_loss"), group.final("eval_perplexity")
    assert (loss.mean, loss.sd, loss.n) == pytest.approx((np.mean(ends), np.std(ends, ddof=1), 3))
    assert (perplexity.mean, perplexity.sd) == pytest.approx((np.exp(ends).mean(), np.exp(ends).std(ddof=1)))
    text = text_of(runs)
    cells = row(text, "Validation", "gpt2")
    intervals = [stats.ttest_1samp(x, 0).confidence_interval() for x in (ends, np.exp(ends))]
    (a, b), (c, d) = intervals
    perplexity = f"{np.exp(ends).mean():.2f} ± {np.exp(ends).std(ddof=1):.2f}"
    assert cells[1:4] == ["3", f"4.0667 ± 0.2082 [{a:.4f}, {b:.4f}]", f"{perplexity} [{c:.2f}, {d:.2f}]"]
    assert cells[6:9] == ["20", "2,000", "2e6"]  # the same for every seed: no spread


def test_one_run_has_no_spread(tmp_path, text_of):
    text = text_of([make_run(tmp_path / "a")])
    assert row(text, "Validation", "gpt2")[1:4] == ["1", "4.0000", f"{math.exp(4):.2f}"]
    assert "Is it better" not in text


def test_what_decides_no_result_does_not_part_seeds_and_what_does_is_the_label(tmp_path):
    a = make_run(tmp_path / "a", seed=1, options={"save_steps": 5, "report_to": "none", "hub_model_id": "x/y"})
    b = make_run(tmp_path / "b", seed=2, options={"save_steps": 9, "eval_steps": 3, "logging_steps": 2})
    c = make_run(tmp_path / "c", options={"learning_rate": 0.5, "model_args": {"n_layer": 3}})
    labels = {group.label: [run.folder.name for run in group.runs] for group in groups_of(c, b, a)}
    assert labels == {
        "gpt2, learning_rate=0.5, n_layer=3": ["c"],
        "gpt2, learning_rate=0.001, n_layer=default": ["a", "b"],
    }


def test_a_named_size_stands_for_its_shape_and_the_steps_for_the_length(tmp_path):
    def plan(size, width, steps):
        model = {"n_embd": width, "n_layer": 4, "n_head": 2}
        length = {"total_steps": steps, "warmup_steps": steps // 10}
        return {"variant": "gpt2", "seed": 1, "block_size": 64, "size": size, "model": model, **length}

    runs = [
        make_run(tmp_path / f"{size}{steps}", schema=2, plan=plan(size, width, steps))
        for size, width, steps in (("pico", 64, 20), ("nano", 192, 20), ("nano", 192, 40))
    ]
    labels = [group.label for group in groups_of(*runs)]
    assert labels == [
        f"gpt2, size={size}, total_steps={steps}" for size, steps in (("pico", 20), ("nano", 20), ("nano", 40))
    ]
    other = make_run(tmp_path / "wide", schema=2, plan=plan("nano", 256, 20))
    assert "n_embd=256" in groups_of(*runs, other)[-1].label  # the size alone would not tell it


def test_equal_options_on_other_data_are_another_group(tmp_path):
    runs = [make_run(tmp_path / x, data_fingerprint=x * 10) for x in ("a", "b")]
    assert [group.label for group in groups_of(*runs)] == ["gpt2, data aaaaaaaa", "gpt2, data bbbbbbbb"]


def test_a_run_that_is_not_finished_is_shown_and_neither_averaged_nor_compared(tmp_path, text_of):
    base = [make_run(tmp_path / f"base{n}", seed=n) for n in (1, 2)]
    cut = make_run(
        tmp_path / "cut",
        seed=3,
        losses={10: 1.0},
        status="interrupted",
        reason="SIGTERM at step 10 of 20",
        train_seconds=99,
    )
    other = make_run(tmp_path / "other", variant="parallel", status="running", losses={10: 1.0})
    whole = make_run(tmp_path / "whole", variant="drift")
    text = text_of([*base, cut, other, whole])
    assert row(text, "Validation", "gpt2")[1:3] == ["2", "4.0000 [4.0000, 4.0000]"]
    assert row(text, "Validation", "gpt2 (interrupted at step 10, seed 3)")[1:3] == ["1", "1.0000"]
    assert row(text, "Cost", "gpt2 (interrupted at step 10, seed 3)")[5] == "20"
    assert "parallel (running at step 10, seed 42): not finished, and not compared." in text
    assert "interrupted: SIGTERM at step 10 of 20" in text
    assert [v.group.label for v in report.judge(groups_of(*base, cut, other, whole))] == ["drift"]


def test_two_unfinished_runs_that_stand_alike_keep_labels_of_their_own(tmp_path):
    runs = [make_run(tmp_path / x, status="failed") for x in ("a", "b")]
    labels = [group.label for group in groups_of(*runs)]
    assert len(set(labels)) == 2
    assert labels[0].endswith(f", {runs[0]}")


def test_tokens_between_records_are_interpolated_and_after_the_last_go_on(tmp_path):
    folder = make_run(tmp_path / "a", losses={10: 5.0, 25: 4.5, 37: 4.0})
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [r for r in records if "eval_loss" in r or r["step"] in (10, 20, 30)]
    for r in kept:
        if r["step"] == 30 and "loss" in r:
            r["tokens"] = 2950  # the last batch of an epoch was short
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept))
    curve = report.read_run(folder).evaluation_curve("tokens")
    assert [place for place, _ in curve] == pytest.approx([1000, (2000 + 2950) / 2, 2950 * 37 / 30])


# --- what is missing, and what is wrong -------------------------------------------------------------------------------


def test_damaged_and_old_runs_are_shown_with_gaps(tmp_path):
    whole = make_run(tmp_path / "whole")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "run.json").write_text('{"variant": "drift", "status": "finished"}')
    cut = make_run(tmp_path / "cut", "parallel", unigram_perplexity="absent", starts="absent", num_parameters="absent")
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')
    new = make_run(tmp_path / "new", "invented_later", flops_per_token=None)
    text = report.write([whole, bare, cut, new]).text
    assert row(text, "Validation", "drift") == ["drift", "1", "-", "-", "-", "-", "0", "-", "-"]
    assert row(text, "Validation", "parallel")[2:7] == ["4.0000", f"{math.exp(4):.2f}", "0.0400", "-", "20"]
    assert row(text, "Cost", "parallel")[1] == "-"
    assert row(text, "Cost", "parallel")[6] == "several, or not known"
    assert row(text, "Validation", "invented_later")[8] == "-"
    assert "invented_later against gpt2: at equal data (2,000 training tokens)" in text
    for folder in (bare, cut, new):
        assert __main__.main(["report", str(folder)]) == 0


def test_folders_that_are_no_runs_are_told_all_at_once(tmp_path, capsys):
    good = make_run(tmp_path / "good")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "run.json").write_text('{"variant": "gp')
    (tmp_path / "empty").mkdir()
    folders = [good, tmp_path / "half", tmp_path / "empty", tmp_path / "nowhere"]
    assert __main__.main(["report", *map(str, folders)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"error: {tmp_path / 'half'}: run.json cannot be read")
    for line, name in zip(lines[1:], ("empty", "nowhere"), strict=True):
        assert line.startswith(f"error: {tmp_path / name}: holds no run and no model")
        assert "give a run's folder" in line
    assert not (tmp_path / "report").exists()


def test_an_output_dir_that_is_a_file_is_a_fault(tmp_path):
    run = make_run(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; a folder is needed"):
        report.write([run], tmp_path / "file")
    with pytest.raises(UsageError, match="cannot be written"):
        report.write([run], tmp_path / "file" / "below")


def test_without_matplotlib_one_line_names_the_cure(tmp_path, monkeypatch, capsys):
    run = make_run(tmp_path / "a")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    assert __main__.main(["report", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("pip install matplotlib")


def test_where_the_report_goes(tmp_path, monkeypatch, capsys, text_of):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a/1", "runs/a/2", "runs/b"):
        make_run(tmp_path / name, seed=len(name))
    for folders, place in (
        (["runs/b"], "runs/b/report"),
        (["runs/a/1", "runs/a/2"], "runs/a/report"),
        (["runs/a/1", "runs/b", "runs/a/../b"], "runs/report"),
    ):
        assert __main__.main(["report", *folders]) == 0
        out = capsys.readouterr().out
        assert f"page        {place}/report.html" in out
        assert "|" not in out
    assert row((tmp_path / "runs/report/report.md").read_text(), "Validation", "gpt2")[1] == "2"
    # `runs/*` names the report's own folder
    assert __main__.main(["report", "runs/b", "runs/report"]) == 0
    assert __main__.main(["report", "runs/report"]) == 2


def test_a_finished_run_shows_itself_even_where_its_report_cannot_be_written(tmp_path, capsys):
    from gpt2_variants.config.options import Options

    folder = make_run(tmp_path / "a")
    report.show(Options(variant="gpt2", output_dir=str(folder)))
    out = capsys.readouterr().out
    assert report.summary(folder) in out
    assert f"report      {folder / 'report' / 'report.html'}\n" in out
    assert f"compare     python -m gpt2_variants report {folder} OTHER_RUN ...\n" in out
    other = make_run(tmp_path / "b")
    (other / "report").write_text("")
    report.show(Options(variant="gpt2", output_dir=str(other)))
    assert "report      none: --output_dir" in capsys.readouterr().out


def test_the_terminals_table(tmp_path, text_of):
    base = [make_run(tmp_path / f"g{n}", seed=n, losses={20: 4.0 + n / 100}) for n in range(3)]
    long = "a_variant_whose_name_is_longer_than_a_terminal_has_columns_for_it_beside_its_figures"
    good = [make_run(tmp_path / f"d{n}", long, n, losses={20: 3.5 + n / 90}) for n in range(3)]
    alone = make_run(tmp_path / "p", "parallel", losses={20: 4.5})
    other = make_run(tmp_path / "o", "drift", losses={20: 4.5}, data_fingerprint="another")
    lines = report.write([*base, *good, alone, other]).terminal.splitlines()
    assert max(map(len, lines)) <= 100
    interval = stats.ttest_ind([3.5, 3.5 + 1 / 90, 3.5 + 2 / 90], [4.0, 4.01, 4.02], equal_var=False)
    low, high = (f"{end:.4f}".replace("-", "\N{MINUS SIGN}") for end in interval.confidence_interval())
    (first,) = [line for line in lines if line.startswith("a_variant")]
    assert first.split()[1:] == ["3", "3.5111", "tokens", "\N{MINUS SIGN}0.4989", f"[{low},", f"{high}]", "better"]
    assert "".join(line.split(" ")[0] for line in lines[3:6] if not line.startswith(" ")).startswith(
        "a_variant_whose_name"
    )
    assert [line.split()[:3] for line in lines if line.startswith("gpt2")] == [["gpt2", "3", "4.0100"]]
    (parallel,) = [line for line in lines if line.startswith("parallel")]
    assert parallel.split() == ["parallel", "1", "4.5000", "tokens", "-", "too", "few", "seeds"]
    assert [line.endswith("not comparable") for line in lines if line.startswith("drift")] == [True]
