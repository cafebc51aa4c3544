"""The command `compare`: its experiment, the choice of rates, the ladder, and going on."""

import json
import math
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest

from gpt2_variants.__main__ import main
from gpt2_variants.compare import runner, session
from gpt2_variants.compare.experiment import Entry, Trial
from gpt2_variants.compare.ladder import PowerLaw, multiplier
from gpt2_variants.compare.tuning import Choice, extended


def fake_loss(plan):
    """A loss that depends on rate, size and seed as no real one does, and is known."""
    bend = (math.log10(plan.learning_rate) + {"gpt2": 2.5, "drift": 3.0}.get(plan.variant, 2.5)) ** 2
    return 4 + bend + 0.01 * (plan.seed % 7) - 0.1 * (plan.variant == "drift") - 0.001 * plan.num_parameters**0.5


class FakeRunner:
    """Stands in for the processes: writes what a training would leave, or fails."""

    calls: list[str] = []  # of all runs of a test
    fails: dict = {}  # part of a folder's name -> exit code

    def __init__(self, jobs, gpus):
        pass

    def run(self, trainings):
        from gpt2_variants.config.command_line import parse
        from gpt2_variants.config.plan import as_dict
        from gpt2_variants.training.session import prepare

        for index, (folder, words) in enumerate(trainings):
            self.calls.append(str(folder))
            code = next((code for part, code in self.fails.items() if part in str(folder)), 0)
            shutil.rmtree(folder, ignore_errors=True)
            _, plan = prepare(parse([w for w in words if w not in ("--resume_from_checkpoint", "auto")]))
            folder.mkdir(parents=True, exist_ok=True)
            tokens = plan.total_steps * plan.train_batch_size * plan.block_size
            facts = {"schema": 2, "status": "finished", "plan": as_dict(plan), "variant": plan.variant}
            facts |= {"num_parameters": plan.num_parameters, "flops_per_token": plan.flops_per_token}
            facts |= {"data_fingerprint": plan.data_fingerprint, "data": plan.data, "train_seconds": 1.0}
            facts |= {"starts": [{"device": "a card", "world_size": 1}]}
            if code:
                facts |= {"status": "failed", "not_finite_at": 3 if code == 3 else None}
            (folder / "run.json").write_text(json.dumps(facts))
            loss = fake_loss(plan)
            figures = {"eval_loss": loss, "eval_perplexity": math.exp(loss), "eval_accuracy": 0.1}
            speed = 500.0 if plan.variant == "duo_predict" else 1000.0
            training = {"step": plan.total_steps, "loss": loss, "tokens": tokens, "tokens_per_second": speed}
            records = [
                training | {"elapsed_seconds": 1.0},
                figures | {"step": plan.total_steps, "elapsed_seconds": 1.0},
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
            yield index, runner.Ended(code, 0.1, "error: it failed" if code else "")


@pytest.fixture
def faked(monkeypatch):
    """The fake processes; `calls` lists the folders trained, `fails` says which are to fail."""
    monkeypatch.setattr(FakeRunner, "calls", [])
    monkeypatch.setattr(FakeRunner, "fails", {})
    for module in (session, session.forecast):
        monkeypatch.setattr(module, "Runner", FakeRunner)
    return FakeRunner


@pytest.fixture
def no_page(monkeypatch):
    """The report is not written, which takes seconds."""
    monkeypatch.setattr("gpt2_variants.compare.pages.write_report", lambda *_: None)


@pytest.fixture
def words(corpus, tmp_path):
    """The command, without its variants."""
    data = ["--preset", "demo", "--dataset", str(corpus), "--block_size", "16", "--max_steps", "5"]
    return ["compare", "--output_dir", str(tmp_path / "x"), *data, "--model_args", "n_layer=2", "n_embd=32", "n_head=2"]


def trained(root):
    """The folders below `root` that hold a run, as text."""
    return sorted(str(path.parent.relative_to(root)) for path in root.rglob("run.json"))


# --- the experiment ---------------------------------------------------------------------------------------------------


def test_an_entry_has_fields_of_its_own():
    assert Entry.of("gpt2") == Entry("gpt2")
    assert Entry.of("duo_predict:infill_weight=0.5,leak_free=true").fields == ("infill_weight=0.5", "leak_free=true")
    assert Entry.of("ideas/idea.py:NAME") == Entry("ideas/idea.py:NAME")
    assert Entry.of("ideas/idea.py:NAME:n_head=2") == Entry("ideas/idea.py:NAME", ("n_head=2",))
    assert Entry.of("duo_predict:infill_weight=0").label == "duo_predict,infill_weight=0"
    assert str(Trial(Entry("gpt2"), "nano", 3).folder) == "runs/nano/gpt2/seed-3"


def test_every_seed_of_every_variant_is_trained_once_and_reported(faked, words, tmp_path, capsys):
    assert main([*words, "--variants", "drift", "--seeds", "3"]) == 0
    root = tmp_path / "x"
    expected = [f"runs/{name}/seed-{seed}" for name in ("drift", "gpt2") for seed in (42, 43, 44)]
    assert trained(root) == expected
    said = capsys.readouterr()
    assert "gpt2 is trained too: all are compared with it" in said.err
    assert re.search(r"6 runs to train, \S+ FLOPs, about \S+ hours \(.*measured\), \S+ GiB on disk", said.err)
    assert (root / "report/report.html").is_file()
    assert "python -m gpt2_variants compare" in (root / "report/report.html").read_text()
    # seed by seed, so that a machine that slows down does it to all
    order = [folder.split("/runs/")[1] for folder in faked.calls if "/runs/" in folder]
    assert order == [f"{name}/seed-{seed}" for seed in (42, 43, 44) for name in ("gpt2", "drift")]


def test_the_same_command_trains_nothing_again_and_more_seeds_only_those(faked, words, tmp_path):
    command = [*words, "--variants", "gpt2", "drift", "--seeds", "2"]
    assert main(command) == 0
    page = (tmp_path / "x/report/report.md").read_text()
    faked.calls.clear()
    assert main(command) == 0
    assert faked.calls == []
    assert (tmp_path / "x/report/report.md").read_text() == page
    assert main([*command[:-1], "3"]) == 0
    assert [folder.split("/x/")[1] for folder in faked.calls if "measured" not in folder] == [
        f"runs/{name}/seed-44" for name in ("gpt2", "drift")
    ]


def test_other_options_over_finished_runs_are_refused(faked, no_page, words, tmp_path, capsys):
    assert main([*words, "--variants", "gpt2", "--seeds", "1"]) == 0
    faked.calls.clear()
    assert main([*words, "--variants", "gpt2", "--seeds", "1", "--weight_decay", "0.3"]) == 2
    said = capsys.readouterr().err
    assert "runs/gpt2/seed-42: was trained with weight_decay 0.01, not 0.3; give another folder" in said
    assert faked.calls == []


def test_a_failed_run_is_said_and_tried_again_and_the_others_are_reported(faked, words, tmp_path, capsys):
    faked.fails["drift/seed-43"] = 1
    command = [*words, "--variants", "gpt2", "drift", "--seeds", "2"]
    assert main(command) == 1
    said = capsys.readouterr()
    assert "not finished: drift, seed 43: failed (1): error: it failed; see " in said.err
    assert (tmp_path / "x/report/report.html").is_file()
    faked.fails.clear()
    faked.calls.clear()
    assert main(command) == 0
    assert [folder.split("/x/")[1] for folder in faked.calls if "measured" not in folder] == ["runs/drift/seed-43"]


def test_parts_of_an_array_share_the_variants_and_train_each_once(faked, no_page, words, tmp_path):
    command = [*words, "--variants", "gpt2", "drift", "diffusion", "--seeds", "2", "--learning_rates", "1e-3", "3e-3"]
    for part in ("0/2", "1/2"):
        main([*command, "--task", part])
    runs = [folder for folder in faked.calls if "measured" not in folder]
    assert len(runs) == len(set(runs))
    faked.calls.clear()
    assert main(command) == 0
    assert [folder for folder in faked.calls if "/runs/" in folder] == []


def test_dry_run_says_what_it_would_take_and_trains_nothing(faked, words, tmp_path, capsys):
    assert main([*words, "--variants", "gpt2", "drift", "--seeds", "2", "--dry_run"]) == 0
    assert "4 runs to train" in capsys.readouterr().err
    assert trained(tmp_path / "x") == []


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--seeds", "0"], "--seeds 0: 1 or more is needed"),
        (["--learning_rates", "1e-3"], "--learning_rates: at least two are needed"),
        (["--learning_rates", "x", "1e-3"], "--learning_rates x: not a number above 0"),
        (["--learning_rates", "1", "2", "--learning_rate", "1"], "--learning_rate: leave it out, or --learning_rates"),
        (["--sizes", "huge"], "--sizes huge: not known; one of pico, nano"),
        (["--sizes", "pico", "nano"], "--sizes: several need --learning_rates"),
        (["--task", "2/2"], "--task 2/2: I/N is needed"),
        (["--tokens_per_parameter", "2"], "--max_steps: leave it out, or --tokens_per_parameter"),
        (["--variant", "gpt2"], "--variant: not an option of compare; give --variants"),
        (["--push_to_hub"], "--push_to_hub: not an option of compare; give the command push"),
        (["--batch", "3"], "unrecognized arguments: --batch"),
        (["--variants", "gpt3"], "gpt3: "),
        (["--variants", "gpt2:no_such=1"], "no_such"),
        (["--gpus_per_run", "99"], "--gpus_per_run 99: 0 to 0 is allowed"),
    ],
)
def test_faults_are_one_line_and_nothing_is_written(faked, words, tmp_path, capsys, more, line):
    assert main([*words, "--variants", "gpt2", *more]) == 2
    said = capsys.readouterr().err
    assert any(text.startswith("error: ") and line in text for text in said.splitlines()), said
    assert not (tmp_path / "x").exists()


# --- rates ------------------------------------------------------------------------------------------------------------


def test_each_variant_is_reported_at_its_own_best_rate(faked, words, tmp_path):
    """By `fake_loss` the best rate is 10 ** -2.5 for gpt2 and 10 ** -3 for drift: no edge of this grid."""
    rates = ["1e-4", "1e-3", "3e-3", "1e-2"]
    assert main([*words, "--variants", "gpt2", "drift", "--seeds", "2", "--learning_rates", *rates]) == 0
    root = tmp_path / "x"
    for name, rate in (("gpt2", 3e-3), ("drift", 1e-3)):
        for seed in (42, 43):
            facts = json.loads((root / f"runs/{name}/seed-{seed}/run.json").read_text())
            assert facts["plan"]["learning_rate"] == rate
    tuned = [folder for folder in trained(root) if folder.startswith("tuning")]
    assert tuned == sorted(f"tuning/{name}/rate-{float(r):g}/seed-1042" for name in ("gpt2", "drift") for r in rates)
    text = (root / "report/report.md").read_text()
    (row,) = [line for line in text.splitlines() if line.startswith("| drift |") and line.endswith("| 0.001 |")]
    assert row.count("*") == 1


def test_a_best_rate_at_the_edge_extends_the_grid_for_every_entry(faked, no_page, words, tmp_path, capsys):
    rates = ["1e-3", "3e-3", "1e-2", "3e-2"]
    assert main([*words, "--variants", "gpt2", "drift", "--seeds", "1", "--learning_rates", *rates]) == 0
    assert "edge of the grid: 0.00033 for every entry" in capsys.readouterr().err
    tuned = [folder for folder in trained(tmp_path / "x") if folder.startswith("tuning")]
    assert sum("rate-0.00033" in folder for folder in tuned) == 2
    assert len(tuned) == 2 * 5


def test_a_rate_that_diverges_is_not_chosen_and_not_tried_again(faked, words, tmp_path, capsys):
    faked.fails["gpt2/rate-0.003"] = 3
    command = [*words, "--variants", "gpt2", "--seeds", "1", "--learning_rates", "1e-4", "1e-3", "3e-3", "1e-2"]
    assert main(command) == 0
    plan = json.loads((tmp_path / "x/runs/gpt2/seed-42/run.json").read_text())["plan"]
    assert plan["learning_rate"] in (1e-3, 1e-2)  # equally far from 10 ** -2.5
    assert "diverged" in (tmp_path / "x/report/report.md").read_text()
    faked.calls.clear()
    assert main(command) == 0
    assert faked.calls == []


def test_the_best_of_losses_and_the_next_step_of_the_grid():
    middle = Choice({1e-3: 3.0, 2e-3: 2.9, 4e-3: 3.1})
    low, high = Choice({1e-3: 2.0, 2e-3: 2.9, 4e-3: 3.1}), Choice({1e-3: 3.0, 2e-3: 2.9, 4e-3: 2.8})
    none = Choice({1e-3: math.inf, 2e-3: math.inf, 4e-3: math.inf})
    assert [c.rate for c in (middle, low, high, none)] == [2e-3, 1e-3, 4e-3, None]
    assert [c.edge for c in (middle, low, high, none)] == [0, -1, 1, 0]
    assert extended([1e-3, 2e-3, 4e-3], [middle, none]) == []
    assert extended([1e-3, 2e-3, 4e-3], [middle, low, high]) == [5e-4, 8e-3]


# --- equal cost -------------------------------------------------------------------------------------------------------


def test_runs_to_equal_flops_are_as_long_as_the_baselines_flops_ask(faked, no_page, words, tmp_path):
    """duo_predict computes 31 positions for 16 tokens: about half the steps; drift's FLOPs are GPT-2's to 0.5 %."""
    more = ["--variants", "gpt2", "duo_predict", "drift", "--seeds", "1", "--equal", "tokens", "flops"]
    assert main([*words, *more, "--max_steps", "200"]) == 0
    root = tmp_path / "x/runs"
    plans = {str(p.parent.relative_to(root)): json.loads(p.read_text())["plan"] for p in root.rglob("run.json")}
    assert set(plans) == {"gpt2/seed-42", "drift/seed-42", "duo_predict/seed-42", "duo_predict/equal-flops/seed-42"}
    duo, base = plans["duo_predict/equal-flops/seed-42"], plans["gpt2/seed-42"]
    assert duo["total_steps"] == round(200 * base["flops_per_token"] / duo["flops_per_token"])
    assert plans["duo_predict/seed-42"]["total_steps"] == 200


def test_runs_to_equal_time_are_as_long_as_the_speeds_of_those_at_equal_tokens_ask(faked, no_page, words, tmp_path):
    more = ["--variants", "gpt2", "duo_predict", "drift", "--seeds", "2", "--equal", "time", "--max_steps", "200"]
    assert main([*words, *more]) == 0
    steps = {
        str(path.parent.relative_to(tmp_path / "x/runs")): json.loads(path.read_text())["plan"]["total_steps"]
        for path in (tmp_path / "x/runs").rglob("run.json")
    }
    assert steps.pop("duo_predict/equal-time/seed-42") == steps.pop("duo_predict/equal-time/seed-43") == 100
    assert set(steps.values()) == {200}
    assert len(steps) == 6


# --- the ladder -------------------------------------------------------------------------------------------------------


def test_a_power_law_and_its_inverse():
    law = PowerLaw.fit([(c, 20 * c**-0.05) for c in (1e12, 1e13, 1e15)])
    assert law.exponent == pytest.approx(-0.05)
    assert law.loss(1e14) == pytest.approx(20 * 1e14**-0.05)
    assert math.exp(law.log_flops(20 * 3e13**-0.05)) == pytest.approx(3e13)
    with pytest.raises(ValueError, match="two amounts of compute"):
        PowerLaw.fit([(1e12, 3.0), (1e12, 3.1)])


def test_a_multiplier_that_is_known_is_found_with_its_growth():
    """A variant whose loss is that of m(C) times its compute, m rising by 1.1 for each tenfold; seeds shift both."""
    sizes = {"pico": 1e12, "nano": 1e13, "micro": 1e14}

    def rungs(seed, variant):
        shift = 1 + 0.01 * seed  # of a seed, common to both: pairs cancel it
        times = {name: 1.3 * 1.1 ** math.log10(c / 1e12) if variant else 1.0 for name, c in sizes.items()}
        return {name: (c, shift * 20 * (c * times[name]) ** -0.05) for name, c in sizes.items()}

    found = multiplier(*({seed: rungs(seed, variant) for seed in range(3)} for variant in (False, True)))
    for power, size in enumerate(sizes):
        assert math.exp(found.by_size[size].mean) == pytest.approx(1.3 * 1.1**power)
        assert found.by_size[size].high - found.by_size[size].low < 1e-6
    assert 10**found.growth.mean == pytest.approx(1.1)
    assert found.beyond == ("micro",)


def test_the_multipliers_interval_is_students_over_the_seeds():
    from scipy import stats

    rng = np.random.default_rng(0)
    base = {seed: {"a": (1e12, 5.0), "b": (1e13, 4.5)} for seed in range(4)}
    logs = rng.normal(0.2, 0.1, 4)
    law = PowerLaw.fit([(1e12, 5.0), (1e13, 4.5)])
    variant = {seed: {"b": (1e13, law.loss(1e13 * math.exp(logs[seed])))} for seed in range(4)}
    found = multiplier(base, variant).by_size["b"]
    low, high = stats.t.interval(0.95, 3, loc=logs.mean(), scale=stats.sem(logs))
    assert (found.mean, found.low, found.high) == pytest.approx((logs.mean(), low, high))


def test_a_ladder_has_one_budget_per_parameter_and_its_multipliers_on_the_page(faked, words, tmp_path):
    command = [*words[: words.index("--max_steps")], "--variants", "gpt2", "drift", "--seeds", "2", "--sizes", "pico"]
    command += ["nano", "--learning_rate", "1e-3", "--tokens_per_parameter", "0.01"]
    assert main(command) == 0
    root = tmp_path / "x/runs"
    for size in ("pico", "nano"):
        plans = [json.loads(p.read_text())["plan"] for p in (root / size).rglob("run.json")]
        base = next(p for p in plans if p["variant"] == "gpt2")
        steps = round(0.01 * base["num_parameters"] / (16 * base["train_batch_size"]))
        assert {p["total_steps"] for p in plans} == {steps}
        assert base["model"]["initializer_range"] == 0.02  # GPT-2's own at every size
    text = (tmp_path / "x/report/report.md").read_text()
    assert "Compute multiplier" in text


# --- processes --------------------------------------------------------------------------------------------------------


# Seconds to sleep; and, of a test of signals, what it sends its parent once more while it ends.
SLEEP = """if True:
    import os, signal, sys, time

    def end(*_):
        for number in sys.argv[2:]:
            os.kill(os.getppid(), int(number))
        sys.exit(143)

    signal.signal(signal.SIGTERM, end)
    print("ready", flush=True)
    time.sleep(float(sys.argv[1]))
    print("done", sys.argv[1])
"""


class _Sleeping(runner.Runner):
    """Runs Python's own sleep in place of a training."""

    def _program(self, place):
        return [sys.executable, "-c", SLEEP]


def test_trainings_run_side_by_side_and_their_words_are_kept(tmp_path):
    work = [(tmp_path / str(n), ["0"]) for n in range(3)]
    ended = dict(_Sleeping(2, 0).run(work))
    assert {n: (e.code, e.last_line) for n, e in ended.items()} == dict.fromkeys(range(3), (0, "done 0"))
    assert (tmp_path / "1.log").read_text() == "ready\ndone 0\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_trainings_by_a_signal_of_their_own(number, tmp_path, monkeypatch):
    """So that they save their checkpoints; those that were not begun are not; a second one changes nothing."""
    before = signal.signal(number, signal.SIG_DFL)
    running = _Sleeping(1, 0)
    events = running.run([(tmp_path / str(n), ["600", str(int(number))]) for n in range(2)])

    def interrupt_when_ready(*_, **__):
        while not (tmp_path / "0.log").is_file() or not (tmp_path / "0.log").read_text():
            time.sleep(0.01)
        signal.raise_signal(number)

    monkeypatch.setattr(runner, "wait", interrupt_when_ready)
    with pytest.raises(runner.Stopped) as stopped:
        next(events)
    assert stopped.value.number == number
    assert signal.signal(number, before) == signal.SIG_DFL
    assert not (tmp_path / "1.log").exists()
    assert not running._processes


def test_gpus_are_shared_out_among_the_places(monkeypatch):
    monkeypatch.setattr(runner, "has_cuda", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3,5,7")
    places = runner.Runner(2, 2)
    seen = [places._environment(place)["CUDA_VISIBLE_DEVICES"] for place in range(2)]
    ports = [words[words.index("--master_port") + 1] for words in map(places._program, range(2))]
    assert seen == ["1,3", "5,7"]
    assert len(set(ports)) == 2
    assert runner.Runner(4, 1)._environment(2) == {"CUDA_VISIBLE_DEVICES": "5"}
    monkeypatch.setattr(runner, "has_cuda", lambda: False)
    assert runner.visible_gpus() == []


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_through_deepspeeds_launcher(tiny_run, tmp_path, monkeypatch):
    """On a CPU, where the launcher counts CUDA_VISIBLE_DEVICES all the same."""
    monkeypatch.setenv("LOCAL_SIZE", "2")  # by which DeepSpeed counts a CPU's devices
    monkeypatch.setattr(runner, "visible_gpus", lambda: ["0", "1"])
    words = [*tiny_run, "--max_steps", "4", "--variants", "gpt2", "--seeds", "1", "--gpus_per_run", "2"]
    assert main(["compare", *words, "--output_dir", str(tmp_path / "x")]) == 0
    assert json.loads((tmp_path / "x/runs/gpt2/seed-42/run.json").read_text())["plan"]["world_size"] == 2


@pytest.mark.slow
def test_two_real_variants_twice_give_the_same_numbers(tiny_run, tmp_path):
    pages = []
    for place in ("a", "b"):
        words = [*tiny_run, "--max_steps", "6", "--variants", "gpt2", "parallel", "--seeds", "2", "--jobs", "2"]
        assert main(["compare", *words, "--output_dir", str(tmp_path / place)]) == 0
        losses = {}
        for path in sorted((tmp_path / place / "runs").rglob("metrics.jsonl")):
            records = [json.loads(line) for line in path.read_text().splitlines()]
            losses[str(path.relative_to(tmp_path / place))] = [r.get("loss", r.get("eval_loss")) for r in records]
        pages.append(losses)
    assert pages[0] == pages[1]
    assert len(pages[0]) == 4
