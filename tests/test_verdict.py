"""The verdict: how far variants are from the baseline, against numpy and scipy, and in what words."""

import json
import math
import sys

import numpy as np
import pytest
from made_runs import DATA, PAIRED, SKIP, groups_of, judged, make_run, make_seeds, row
from scipy import stats

from gpt2_variants import report
from gpt2_variants.faults import UsageError
from gpt2_variants.report import statistics


def test_equal_tokens_and_equal_flops_by_linear_interpolation(tmp_path, text_of):
    base = make_run(tmp_path / "base", losses={10: 6.0, 20: 5.0, 30: 4.5})
    duo = make_run(tmp_path / "duo", variant="duo_predict", losses={10: 5.8, 25: 4.6}, further={SKIP: 3.0})
    v = judged(base, duo)
    at = np.interp(2500, [1000, 2000, 3000], [6.0, 5.0, 4.5])
    assert v.at_tokens.place == 2500
    assert v.at_tokens.estimate.mean == pytest.approx(4.6 - at)
    assert v.at_tokens.percent == pytest.approx(100 * (math.exp(4.6 - at) - 1))
    # duo's tokens cost twice as many FLOPs: of the baseline's 3,000,000 it had seen 1,500 tokens
    ours = np.interp(1500, [1000, 2500], [5.8, 4.6])
    assert v.at_flops.place == 3_000_000
    assert v.at_flops.estimate.mean == pytest.approx(ours - 4.5)
    assert v.at_flops.percent == pytest.approx(100 * (math.exp(ours - 4.5) - 1))
    assert v.ratios["flops_per_token"] == 2
    text = text_of([base, duo])
    assert "too few seeds: at least two of each are needed to tell a difference from chance" in text
    assert "At equal cost duo_predict stood at step 15 of 25" in text
    assert "`python -m gpt2_variants compare --equal flops` trains the fair one, of --max_steps 15." in text
    assert "At equal data gpt2 stood at step 25 of 30" in text


def test_runs_that_end_together_are_read_at_their_ends(tmp_path):
    v = judged(make_run(tmp_path / "a"), make_run(tmp_path / "b", variant="drift", losses={10: 9.0, 20: 3.9}))
    assert v.at_tokens.estimate.mean == pytest.approx(-0.1)
    assert v.at_tokens.at_the_end
    assert v.notes == []


def test_before_a_runs_first_evaluation_nothing_is_compared(tmp_path):
    v = judged(make_run(tmp_path / "a", losses={10: 5.0}), make_run(tmp_path / "b", variant="drift", losses={20: 4.0}))
    assert v.at_tokens is None
    assert "they have no evaluation in common" in " ".join(map(str, report.verdict_said([v], [v.baseline, v.group])))


@pytest.mark.parametrize(
    ("ends", "word", "words"),
    [
        ([4.00, 4.02], "undecided", "at equal data (2,000 training tokens) undecided: no difference larger than "),
        ([3.70, 3.74], "better", "at equal data (2,000 training tokens) better: perplexity \N{MINUS SIGN}28.1 ["),
        ([4.50, 4.54], "worse", "at equal data (2,000 training tokens) worse: perplexity +60.0 ["),
    ],
)
def test_from_two_seeds_on_a_difference_has_an_interval_and_a_verdict(ends, word, words, tmp_path, text_of):
    base_ends = [4.0, 4.1, 4.05]
    base = [make_run(tmp_path / f"b{n}", seed=n, losses={20: end}) for n, end in enumerate(base_ends)]
    ours = [make_run(tmp_path / f"v{n}", "drift", n, losses={20: end}) for n, end in enumerate(ends)]
    found = judged(*base, *ours).at_tokens
    test = stats.ttest_ind(ends, base_ends, equal_var=False)
    interval = test.confidence_interval()
    assert (found.estimate.low, found.estimate.high) == pytest.approx(interval)
    assert found.estimate.mean == pytest.approx(np.mean(ends) - np.mean(base_ends))
    assert found.p_adjusted == found.estimate.p == pytest.approx(test.pvalue)
    assert (found.percent_low, found.percent_high) == pytest.approx([100 * (math.exp(x) - 1) for x in interval])
    assert (found.word, found.comparisons, found.estimate.paired) == (word, 1, False)
    text = text_of([*base, *ours])
    assert f"drift against gpt2: {words}" in text
    cells = row(text, "Against the baseline", "drift | gpt2 | tokens")
    signed = [f"{x:+.4f}".replace("-", "\N{MINUS SIGN}") for x in (found.estimate.mean, *interval)]
    assert cells[2:6] == ["tokens", "2,000", "2 and 3", f"{signed[0]} [{signed[1]}, {signed[2]}]"]
    assert cells[7:] == ["&lt; 0.001" if test.pvalue < 0.001 else f"{test.pvalue:.3f}", word]


def test_seeds_are_paired_where_their_data_come_in_one_order(tmp_path):
    base = make_seeds(tmp_path, "gpt2", [4.0, 4.4, 4.2])
    ours = make_seeds(tmp_path, "drift", [3.9, 4.31, 4.08])
    found = judged(*base, *ours).at_tokens
    differences = [-0.1, -0.09, -0.12]
    half = 4.302653 * np.std(differences, ddof=1) / math.sqrt(3)
    assert found.estimate.paired
    assert found.estimate.n == 3
    assert (found.estimate.low, found.estimate.high) == pytest.approx(
        (np.mean(differences) - half, np.mean(differences) + half)
    )
    assert found.word == "better"
    unpaired = make_seeds(tmp_path / "other", "drift", [3.9, 4.31, 4.08], options={"train_batch_size": 4})
    found = judged(*base, *unpaired).at_tokens
    assert not found.estimate.paired
    assert found.estimate.p == pytest.approx(
        stats.ttest_ind([3.9, 4.31, 4.08], [4.0, 4.4, 4.2], equal_var=False).pvalue
    )
    assert found.word == "undecided"


def test_seeds_that_one_side_lacks_stand_in_no_pair_and_that_is_said(tmp_path):
    base = make_seeds(tmp_path, "gpt2", [4.0, 4.4, 4.2, 9.0])
    v = judged(*base, *make_seeds(tmp_path, "drift", [9.0, 3.9, 4.31], first=0)[1:])
    assert (v.at_tokens.estimate.n, v.at_tokens.estimate.mean) == (2, pytest.approx(-0.095))
    assert v.notes == ["They are compared by pairs of seeds; gpt2's 3, 4 are in none."]
    # one seed in common is no pair of pairs
    apart = judged(*base, *make_seeds(tmp_path / "apart", "drift", [4.0, 4.1, 4.2], first=4))
    assert not apart.at_tokens.estimate.paired
    assert apart.at_tokens.word == "undecided"


def test_a_seed_twice_counts_once_and_is_not_paired(tmp_path):
    base = make_seeds(tmp_path, "gpt2", [4.0, 4.4])
    again = make_run(tmp_path / "again", seed=2, losses={10: 5.0, 20: 4.6}, options=dict(PAIRED))
    ours = make_seeds(tmp_path, "drift", [3.9, 4.3])
    found = judged(*base, again, *ours).at_tokens
    assert not found.estimate.paired
    assert found.estimate.p == pytest.approx(stats.ttest_ind([3.9, 4.3], [4.0, 4.5], equal_var=False).pvalue)
    same = judged(base[0], make_run(tmp_path / "same", seed=1, options=dict(PAIRED)), *ours).at_tokens
    assert (same.word, same.p_adjusted, same.estimate.low) == ("too few seeds", None, None)


def test_p_values_are_adjusted_for_the_variants_of_a_page(tmp_path, text_of):
    base = make_seeds(tmp_path, "gpt2", [4.0, 4.4, 4.2])
    names = ("drift", "parallel", "diffusion")
    ends = ([3.9, 4.35, 4.08], [3.85, 4.21, 4.05], [4.1, 4.3, 4.25])
    runs = [run for name, of_name in zip(names, ends, strict=True) for run in make_seeds(tmp_path, name, of_name)]
    alone = [stats.ttest_rel(of_name, [4.0, 4.4, 4.2]).pvalue for of_name in ends]
    verdicts = report.judge(groups_of(*base, *runs))
    smallest, middle, largest = sorted(alone)
    adjusted = {smallest: 3 * smallest, middle: max(3 * smallest, 2 * middle)}
    adjusted[largest] = max(adjusted[middle], largest)
    for axis in ("tokens", "flops", "time"):
        found = [getattr(v, f"at_{axis}") for v in verdicts]
        assert [d.estimate.p for d in found] == pytest.approx(alone)
        assert [d.p_adjusted for d in found] == pytest.approx([adjusted[p] for p in alone])
        assert [d.comparisons for d in found] == [3, 3, 3]
    assert [v.at_tokens.word for v in verdicts] == ["undecided", "better", "undecided"]
    text = text_of([*base, *runs])
    words = f"adjusted p = {adjusted[alone[0]]:.3f}; alone it would be told from chance, among 3 comparisons it is not"
    assert alone[0] < 0.05
    assert text.count(words) == 1
    assert text.count("would be told from chance") == 1


def test_the_words_of_what_was_not_told_name_what_was_not_found_and_what_it_would_take(tmp_path, text_of):
    base = make_seeds(tmp_path, "gpt2", [4.0, 4.4, 4.2])
    differences = np.array([0.0, -0.03, 0.03]) + 0.004
    ours = make_seeds(tmp_path, "drift", list(np.array([4.0, 4.4, 4.2]) + differences))
    half = 4.302653 * 0.03 / math.sqrt(3)
    n = next(n for n in range(2, 1000) if stats.t.ppf(0.975, n - 1) * 0.03 / math.sqrt(n) <= 0.004)
    words = (
        f"drift against gpt2: at equal data (2,000 training tokens) undecided: no difference larger than "
        f"{0.004 + half:.4f} nats found (loss +0.0040 [\N{MINUS SIGN}{half - 0.004:.4f}, +{half + 0.004:.4f}] nats"
    )
    text = text_of([*base, *ours])
    assert words in text
    ends = "as at equal data. At equal time (40 s of training on the same machine) as at equal data."
    assert (
        f"with about {n} seeds of each, a difference of the size seen would be found in every second case. At equal"
        in text
    )
    assert f"At equal cost (2e6 training FLOPs) {ends}" in text


def test_no_difference_stands_without_an_interval(tmp_path, text_of):
    base = make_seeds(tmp_path, "gpt2", [4.0, 4.1])
    ours = make_seeds(tmp_path, "drift", [3.1234])
    text = text_of([*base, *ours])
    assert "too few seeds: at least two of each are needed" in text
    assert row(text, "Against the baseline", "drift | gpt2 | tokens")[5:] == ["-", "-", "-", "too few seeds"]
    outside = text.split("## Is it better?")[1].split("## ")[0]
    assert "nats" not in outside
    assert "perplexity" not in outside


def test_a_loss_that_is_no_number_decides_nothing(tmp_path, text_of):
    base = make_seeds(tmp_path, "gpt2", [4.0, 4.1])
    ours = make_seeds(tmp_path, "drift", [math.nan, 3.0])
    found = judged(*base, *ours).at_tokens
    assert (found.word, found.p_adjusted, found.percent) == ("undecided", None, None)
    assert "undecided: a run's loss is not a number there" in text_of([*base, *ours])


# --- runs that were trained to equal cost -----------------------------------------------------------------------------


def test_for_each_axis_the_runs_are_taken_whose_schedule_ended_there(tmp_path, text_of):
    """duo_predict costs twice as much per token: 20 steps at equal tokens, 10 at equal FLOPs."""
    base, whole, half = [], [], []

    def run(name, variant, seed, steps, losses):
        schedule = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": steps // 10, "total_num_steps": steps}}
        plan = {"variant": variant, "seed": seed, "block_size": 64, "total_steps": steps, "warmup_steps": steps // 10}
        plan |= {"schedule": schedule, "data_fingerprint": "print of blocks of 64", **PAIRED}
        return make_run(tmp_path / f"{name}{seed}", variant, seed, losses, plan=plan)

    for seed, shift in enumerate((0.0, 0.1, -0.1)):
        base.append(run("b", "gpt2", seed, 20, {10: 5.0, 20: 4.0 + shift}))
        noise = 0.01 * seed
        whole.append(run("w", "duo_predict", seed, 20, {5: 6.0, 10: 5.0, 20: 3.5 + shift + noise}))
        half.append(run("h", "duo_predict", seed, 10, {5: 6.0, 10: 3.8 + shift - noise}))
    groups = groups_of(*base, *whole, *half)
    assert [group.label for group in groups] == [
        "gpt2",
        "duo_predict, total_steps=20",
        "duo_predict, total_steps=10",
    ]
    assert [group.name for group in groups] == ["gpt2", "duo_predict", "duo_predict"]
    (v,) = report.judge(groups)
    assert (v.at_tokens.group, v.at_flops.group) == (groups[1], groups[2])
    assert (v.at_tokens.place, v.at_flops.place) == (2000, 2_000_000)
    assert v.at_tokens.at_the_end
    assert v.at_flops.at_the_end
    assert v.at_tokens.estimate.mean == pytest.approx(-0.5 + 0.01)
    assert v.at_flops.estimate.mean == pytest.approx(-0.2 - 0.01)
    assert v.notes == []
    # without the runs of 10 steps those of 20 are cut
    cut = judged(*base, *whole)
    assert cut.at_flops.group.runs[0].folder == whole[0]
    assert not cut.at_flops.at_the_end
    assert cut.at_flops.estimate.mean == pytest.approx(5.0 - 4.0)
    assert any("cut in mid-schedule" in note and "compare --equal flops" in note for note in cut.notes)
    text = text_of([*base, *whole, *half])
    assert "At equal cost (2e6 training FLOPs), by duo_predict, total_steps=10, better" in text
    assert row(text, "Against the baseline", "duo_predict | gpt2 | FLOPs")[3:5] == ["2e6", "3 pairs"]


def test_of_baselines_of_several_lengths_the_farthest_that_a_variant_reached_too_is_taken(tmp_path):
    length = lambda steps: {"options": {"max_steps": steps}, "losses": {5: 5.0, steps: 4.0}}
    base = [make_run(tmp_path / f"b{steps}", **length(steps)) for steps in (10, 20, 30)]
    ours = [make_run(tmp_path / f"v{steps}", "drift", **length(steps)) for steps in (10, 20)]
    v = judged(*base, *ours)
    assert (v.at_tokens.group.first.step, v.at_tokens.baseline.first.step) == (20, 20)
    other = make_run(tmp_path / "other", "drift", options={"max_steps": 20, "learning_rate": 0.5})
    assert len(report.judge(groups_of(*base, *ours, other))) == 2, "another rate is no other length"


def test_a_run_that_ended_before_its_schedule_is_cut(tmp_path):
    base = make_run(tmp_path / "a", options={"max_steps": 20})
    v = judged(base, make_run(tmp_path / "b", "drift", options={"max_steps": 40}))
    assert not v.at_tokens.at_the_end
    assert "At equal data drift stood at step 20 of 40, cut in mid-schedule" in " ".join(v.notes)


def test_equal_time_is_of_one_machine(tmp_path):
    base = make_seeds(tmp_path, "gpt2", [4.0, 4.1])
    same = make_seeds(tmp_path, "drift", [3.5, 3.7])
    assert judged(*base, *same).at_time.place == 40
    other = make_seeds(tmp_path / "h", "drift", [3.5, 3.7], starts=[{"world_size": 1, "device": "NVIDIA H100"}])
    v = judged(*base, *other)
    assert v.at_time is None
    assert [d.axis for d in v.differences] == ["tokens", "flops"]


@pytest.mark.parametrize(("longer", "same"), [(1.04, True), (1.06, False)])
def test_ends_that_lie_a_few_percent_of_time_apart_are_the_same_end(longer, same, tmp_path):
    base = make_run(tmp_path / "a", losses={50: 5.0, 100: 4.0})
    other = make_run(tmp_path / "b", "drift", losses={50: 5.0, 100: 4.0})
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["elapsed_seconds"] *= longer
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    v = judged(base, other)
    assert v.at_tokens.at_the_end
    assert v.at_time.at_the_end == same
    assert v.at_time.place == 200
    assert v.at_time.ours == pytest.approx(100 / longer)
    assert any("compare --equal time" in note for note in v.notes) != same


def test_several_runs_need_scipy_and_one_run_does_not(tmp_path, monkeypatch, text_of):
    runs = [make_run(tmp_path / x) for x in "ab"]
    found = statistics.importlib.util.find_spec
    monkeypatch.setattr(statistics.importlib.util, "find_spec", lambda name: None if name == "scipy" else found(name))
    monkeypatch.setitem(sys.modules, "scipy", None)  # importing it fails
    assert "4.0000" in text_of(runs[:1])
    with pytest.raises(UsageError, match="need scipy"):
        text_of(runs)


def test_the_baseline_with_the_same_settings_is_taken(tmp_path):
    slow = make_run(tmp_path / "slow", options={"learning_rate": 0.1})
    fast = make_run(tmp_path / "fast", options={"learning_rate": 0.9})
    ours = make_run(tmp_path / "ours", "drift", options={"learning_rate": 0.9})
    v = judged(slow, fast, ours)
    assert v.baseline.first.folder == fast
    assert v.notes == []
    assert judged(slow, ours).notes[0].startswith("Their learning rates differ, 0.9 and 0.1: that is fair if each was")


def test_a_variants_own_fields_are_no_other_settings(tmp_path):
    base = make_run(tmp_path / "a")
    cost = {"infill": 3.0, "flops_per_token": 1000.0}
    own = make_run(tmp_path / "b", "duo_predict", **cost, options={"model_args": {"leak_free": False}})
    assert judged(base, own).notes == []
    both = {"model_args": {"leak_free": False, "resid_pdrop": 0.5}}
    notes = judged(base, make_run(tmp_path / "c", "duo_predict", **cost, options=both)).notes
    assert notes == ["Settings differ beside the variant: resid_pdrop 0.5 and default."]


def test_other_tokens_or_text_are_not_compared(tmp_path):
    base = make_run(tmp_path / "a")
    for n, facts in enumerate(
        (
            {"data_fingerprint": "another"},
            {"unigram_perplexity": 500.0},
            {"options": {"block_size": 32}, "data": DATA.format(32).replace("builtin, 400", "other, 500")},
            {"options": {"block_size": 32}, "data": DATA.format(32).replace("builtin: topics", "my.txt: local")},
            {"options": {"block_size": 32}, "unigram_perplexity": 820.0},
        )
    ):
        v = judged(base, make_run(tmp_path / f"b{n}", "drift", **facts))
        assert v.not_comparable, facts
        assert v.at_tokens is v.at_flops is None
        assert "their perplexities are not comparable" in str(report.verdict_said([v], [v.baseline, v.group])[0])


def test_another_block_size_is_compared_and_said(tmp_path):
    base = make_run(tmp_path / "a")
    short = make_run(
        tmp_path / "b",
        "duo_predict",
        further={SKIP: 3.0},
        tokens_per_step=50,
        options={"block_size": 32},
        unigram_perplexity=801.0,
    )
    v = judged(base, short)
    assert v.not_comparable is None
    assert v.at_tokens.place == 1000
    assert v.notes[0].startswith("Their blocks have 32 and 64 tokens")
    assert v.notes[1] == "A step has 50 and 100 tokens."


def test_time_and_memory_are_compared_on_one_machine_only(tmp_path):
    base = make_run(tmp_path / "a")
    same = judged(base, make_run(tmp_path / "b", "drift")).ratios
    assert (same["tokens_per_second"], same["peak_memory"], same["seconds"]) == (1, 1, 1)
    for n, starts in enumerate(
        (
            [{"world_size": 2, "device": "A CPU (2 cores)"}],
            [{"world_size": 1, "device": "NVIDIA H100"}],
            [{"world_size": 1, "device": "A CPU (2 cores)"}, {"world_size": 1, "device": "NVIDIA H100"}],
        )
    ):
        v = judged(base, make_run(tmp_path / f"c{n}", "drift", starts=starts))
        assert v.ratios["tokens_per_second"] is v.ratios["peak_memory"] is v.ratios["seconds"] is None
        assert v.ratios["flops_per_token"] == 1
        assert "They did not run on the same machine: time, speed and memory are not compared." in v.notes


def test_memory_says_which_memory(tmp_path, text_of):
    cpu = make_run(tmp_path / "a")
    gpu = make_run(tmp_path / "b", "drift", starts=[{"world_size": 1, "device": "NVIDIA H100"}])
    words = ("the resident set of the process, on a CPU", "GPU memory by torch's allocator, of the first process")
    for folders, word in (([cpu], words[0]), ([gpu], words[1]), ([cpu, gpu], "GPU memory on a GPU, the resident set")):
        assert f"Peak memory is {word}" in text_of(folders, tmp_path / "out")
    assert row(text_of([cpu]), "Cost", "gpt2")[3:6] == ["50", "1.00", "40"]


def test_a_seed_twice_is_said(tmp_path, text_of):
    runs = [make_run(tmp_path / x) for x in "ab"]
    assert "gpt2: a seed stands more than once" in text_of(runs)


def test_without_a_baseline_it_is_said(tmp_path, text_of):
    runs = [make_run(tmp_path / x, x) for x in ("drift", "parallel")]
    assert "No finished run of gpt2, the baseline, is among these" in text_of(runs)
