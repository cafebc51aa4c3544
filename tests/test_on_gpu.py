"""The day on a GPU, rehearsed on the CPU: what its items find, and how it goes on; never how fast anything is."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, from_benchmarks, patience, wait_until

TINY = ["--scale", "tiny"]


on_gpu, gpu_items, gpu_process = from_benchmarks("on_gpu"), from_benchmarks("gpu_items"), from_benchmarks("gpu_process")
gpu_models, gpu_kernels, gpu_runs = (from_benchmarks(f"gpu_{name}") for name in ("models", "kernels", "runs"))
gpu_speed = from_benchmarks("gpu_speed")


@pytest.fixture
def day(gpu_items):
    return gpu_items.Day("tiny")


def test_faults_are_told_at_once_a_line_each(on_gpu, capsys, tmp_path):
    (tmp_path / "file").touch()
    inside = ROOT / "benchmarks" / "results" / "nvidia-h100"
    for arguments, said in (
        (
            ["--stages", "speed", "--minutes", "x", "--redo", "some"],
            ["stages speed", "redo some", "scale full", "minutes"],
        ),
        (TINY, ["scale tiny: give --output_dir"]),
        ([*TINY, "--output_dir", str(inside)], ["scale tiny: give --output_dir, a folder outside"]),
        ([*TINY, "--output_dir", str(tmp_path / "file")], [f"output_dir {tmp_path / 'file'}: is a file"]),
    ):
        assert on_gpu.main(arguments) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == len(said)
        for line, start in zip(lines, said, strict=True):
            assert line.startswith(f"error: --{start}")


@pytest.mark.parametrize("variant", ["drift_diffusion", "rotating_head_norm"])
def test_a_gradient_that_is_off_shows(gpu_models, day, variant, monkeypatch):
    rows = gpu_models.against_float64(variant, False, day)
    assert [(row["dtype"], row["ok"]) for row in rows] == [("float32", True), ("bfloat16", True)]
    exact = {"a": torch.tensor([3.0, 4.0]).double(), "b": torch.zeros(2).double()}
    found = {"a": torch.tensor([3.0, 4.5]).double(), "b": torch.tensor([0.0, 0.01]).double()}
    off = gpu_models.errors((1.5, found), (1.25, exact))
    assert off == {  # by hand; the gradient that is 0 is set against a hundredth of all, 0.05
        "loss_error": 0.25,
        "grad_error": pytest.approx((0.5**2 + 0.01**2) ** 0.5 / 5),
        "worst_error": pytest.approx(0.2),
        "worst": "b",
    }
    own, none = {"loss_error": 1e-3, "grad_error": 5e-5, "worst_error": 1e-4}, dict.fromkeys(off, 0.0)
    for cpu, ok in ((own, True), (none, False)):
        assert gpu_models.within({}, own, cpu, torch.float32)["ok"] is ok
    assert not gpu_models.within({}, own | {"grad_error": float("nan")}, own, torch.float32)["ok"]


@pytest.mark.parametrize("variant", ["gpt2", "duo_predict"])
def test_the_slope_tells_whether_both_passes_drop_the_same(gpu_models, day, variant):
    model, ids = (
        gpu_models.make_model(variant, day.scale.model, torch.float32, 0.5),
        gpu_models.token_ids(day.scale.model),
    )
    assert gpu_models.slope(model, ids, 0.02) == pytest.approx(1, abs=0.002)
    assert gpu_models.slope(model, ids, 0.02, seed=1) < 0.5  # other masks than the gradient's


def test_duo_attention_is_set_against_what_its_kernel_dropped(gpu_kernels, day, monkeypatch):
    rows = gpu_kernels.duo_attention_dropped("flash", day)
    assert [row["ok"] for row in rows] == [True] * 4
    used = gpu_kernels.weights_used
    monkeypatch.setattr(gpu_kernels, "weights_used", lambda *args, seed: used(*args, seed=seed + 1))
    assert [row["ok"] for row in gpu_kernels.duo_attention_dropped("flash", day)] == [
        False
    ] * 4  # masks of another seed


def test_weights_are_read_off_an_attention(gpu_kernels):
    q, k = torch.randn(2, 1, 2, 5, 3, generator=torch.Generator().manual_seed(0))
    attend = lambda q, k, v: (q @ k.mT).softmax(-1) @ v
    found = gpu_kernels.weights_used(attend, q, k, seed=0)
    torch.testing.assert_close(found, (q @ k.mT).softmax(-1).double())


def test_an_angle_in_bf16_shows(gpu_kernels, day, monkeypatch):
    from gpt2_variants.models import modeling_rotating_head as rotating

    monkeypatch.setattr(torch, "compile", lambda call: call)
    rows = gpu_kernels.rotation(day)
    assert len(rows) == 2 * 4
    assert all(row["ok"] for row in rows)
    exact = rotating.HeadwiseRotation.forward

    def rounded(self, positions):
        angles = exact(self, positions)
        return angles if angles.dtype == torch.float64 else angles.bfloat16().float()

    monkeypatch.setattr(rotating.HeadwiseRotation, "forward", rounded)
    assert not any(row["ok"] for row in gpu_kernels.rotation(day))


def test_generation_is_checked_against_no_cache(gpu_kernels, day, monkeypatch):
    (row,) = gpu_kernels.saved_and_generating("rotating_head_norm", day)
    assert row["ok"]
    from gpt2_variants.models.variant_attention import VariantAttention

    place = VariantAttention.remember  # a cache that forgets the first key
    monkeypatch.setattr(
        VariantAttention, "remember", lambda *args, **kw: tuple(x[:, :, 1:] for x in place(*args, **kw))
    )
    assert not gpu_kernels.saved_and_generating("rotating_head_norm", day)[0]["ok"]


def test_runs_are_compared_bit_for_bit(gpu_runs, tmp_path):
    from safetensors.torch import save_file

    def run(name, losses, weight):
        folder = tmp_path / name
        (folder / "model").mkdir(parents=True)
        lines = [{"step": step, "loss": loss} for step, loss in losses.items()] + [{"step": 9, "eval_loss": 1.0}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        save_file({"w": torch.tensor([weight])}, folder / "model" / "model.safetensors")
        return folder

    first = run("first", {1: 3.0, 2: 2.5, 3: 2.0}, 1.0)
    later = run("later", {2: 2.5, 3: 2.0}, 1.0)  # what goes on has no losses of before
    off = run("off", {1: 3.0, 2: 2.5, 3: 2.0000002}, 1.0)
    other = run("other", {1: 3.0}, 1.0000001)
    assert gpu_runs.compared("x", later, first)["ok"]
    row = gpu_runs.compared("x", off, first)
    assert (row["ok"], row["steps"], row["equal_losses"], row["first_difference"]) == (False, 3, 2, 3)
    assert gpu_runs.compared("x", other, first)["equal_weights"] is False
    assert gpu_runs.losses(first) == {1: 3.0, 2: 2.5, 3: 2.0}


def test_rounds_become_the_rows_of_throughput(gpu_speed, day):
    plan = gpu_speed.references_plan(day)
    facts = {"positions_per_step": 100, "tokens_per_step": 50, "sequences": 2, "block_size": 16, "flops_per_token": 1.0}

    def row(name, number, seconds, peak):
        own = {**facts, "peak_memory_bytes": peak, "first_step_seconds": 7.0 - number}
        return {"case": name, "round": number, "seconds": seconds, "facts": own}

    rows = [row("gpt2", 0, [1.0, 1.0], 5), row("gpt2", 1, [2.0, 2.0], 6), row("duo_predict", 1, [4.0, 4.0], 8)]
    rows.insert(0, row("duo_predict", 0, [4.0, 4.0], 9))
    gpt2, duo = gpu_speed.throughput_rows(plan, {str(number): [own] for number, own in enumerate(rows)})
    assert (gpt2["seconds_per_step"], gpt2["first_step_seconds"], gpt2["relative_speed"]) == (1.5, 7.0, None)
    assert duo["relative_speed_rounds"] == [0.25, 0.5]
    assert duo["tokens_per_second"] == 50 / 4


class Scripted:
    """In the place of a stage's process: what it answers by an item's name."""

    answers: dict = {}
    asked: list = []

    def __init__(self, stage, day, log):
        self.stage = stage

    def ask(self, name, seconds):
        self.asked.append(name)
        return dict(self.answers.get(name, {"status": "done", "rows": [{"what": name, "loss": 1.5}]}))

    def close(self):
        pass


@pytest.fixture
def scripted(on_gpu, gpu_items, monkeypatch, tmp_path):
    """The command over a stage of three items, whose answers are given; what each call asked for, and its exit code."""

    def call(*arguments, answers=(), seconds=1):
        items = [gpu_items.Item(name, None, seconds=seconds) for name in ("a", "b", "c")]
        table = gpu_items.one_table("Losses", [gpu_items.Column("what", "what"), gpu_items.Column("loss", "loss")])
        stage = gpu_items.Stage("curve", "three items", lambda day: items, table)
        monkeypatch.setattr(on_gpu, "stages", lambda day: {"curve": stage})
        monkeypatch.setattr(on_gpu, "StageProcess", Scripted)
        Scripted.answers, Scripted.asked = dict(answers), []
        code = on_gpu.main([*TINY, "--output_dir", str(tmp_path), "--stages", "curve", *arguments])
        return code, Scripted.asked

    before = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, before)


def test_a_failure_is_told_and_stops_nothing_and_what_is_done_stays(scripted, tmp_path, capsys):
    bad = {
        "a": {"status": "failed", "why": "boom", "rows": []},
        "b": {"status": "skipped", "why": "no room", "rows": []},
    }
    assert scripted(answers=bad) == (1, ["a", "b", "c"])
    out = capsys.readouterr().out
    assert "failed: curve: a: boom" in out
    assert "skipped: curve: b: no room" in out
    page = (tmp_path / "on_gpu.md").read_text()
    for said in (
        "A rehearsal at toy size",
        "| curve | three items | 1 | 1 | 1 | 0 |",
        "| curve | a | failed | boom |",
        "| c | 1.5 |",
    ):
        assert said in page
    assert scripted() == (1, [])  # nothing is left to do
    assert scripted("--redo", "failed") == (0, ["a"])
    assert scripted("--redo", "skipped") == (0, ["b"])
    assert scripted("--redo") == (0, ["a", "b", "c"])
    assert set(json.loads((tmp_path / "on_gpu.json").read_text())["stages"]["curve"]) == {"a", "b", "c"}


def test_a_call_whose_time_is_up_is_gone_on_with(scripted, capsys):
    assert scripted("--minutes", "1", seconds=100) == (3, ["a"])  # the first may always begin
    assert "the same command goes on" in capsys.readouterr().out
    assert scripted("--minutes", "1", seconds=100) == (3, ["b"])
    late = {"c": {"status": "failed", "why": "no answer", "rows": [], "timed_out": True}}
    assert scripted("--minutes", "1", answers=late) == (1, ["c"])  # it had all of a call


def test_a_record_of_another_scale_or_device_is_not_gone_on_with(scripted, tmp_path, capsys):
    assert scripted() == (0, ["a", "b", "c"])
    path = tmp_path / "on_gpu.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "NVIDIA H100"}))
    assert scripted() == (2, [])
    assert "is of the device NVIDIA H100" in capsys.readouterr().err
    path.write_text("{")
    assert scripted() == (2, [])
    assert "cannot be read" in capsys.readouterr().err


def test_an_item_that_hangs_or_dies_takes_its_process_only(gpu_process, day, tmp_path, monkeypatch):
    program = tmp_path / "stage.py"
    program.write_text(
        "import json, os, subprocess, sys, time\n"
        "for line in sys.stdin:\n"
        "    name = json.loads(line)\n"
        "    if name == 'hangs':\n"
        "        print(subprocess.Popen(['sleep', '100']).pid, file=sys.stderr, flush=True)\n"
        "        time.sleep(100)\n"
        "    if name == 'dies':\n"
        "        os.kill(os.getpid(), 11)\n"
        "    print(json.dumps({'status': 'done', 'rows': [name]}), flush=True)\n"
    )
    monkeypatch.setattr(gpu_process.StageProcess, "program", str(program))

    def process():
        return gpu_process.StageProcess("curve", day, tmp_path / "log")

    one = process()
    assert one.ask("a", patience(20)) == {"status": "done", "rows": ["a"]}
    assert one.ask("b", patience(20))["rows"] == ["b"]
    died = one.ask("dies", patience(20))
    assert (died["status"], died["why"]) == ("failed", "killed by SIGSEGV")
    two = process()
    hung = two.ask("hangs", 1)
    assert (hung["why"], hung["timed_out"]) == ("no answer within 1 s", True)
    child = int((tmp_path / "log").read_text())
    state = ["ps", "-o", "stat=", "-p", str(child)]  # its own child has gone with it
    wait_until(lambda: subprocess.run(state, capture_output=True, text=True).stdout[:1] in ("", "Z"))


def test_answers_say_what_came_of_an_item(gpu_process, gpu_items, day, monkeypatch):
    def raises(error):
        def run(day):
            raise error

        return run

    items = [
        gpu_items.Item("right", lambda day: [{"what": "x", "ok": True}, {"what": "y"}]),
        gpu_items.Item("wrong", lambda day: [{"what": "x", "ok": False}, {"what": "y", "ok": True}]),
        gpu_items.Item("not here", raises(gpu_items.Skipped("no such kernel"))),
        gpu_items.Item("broken", raises(ValueError("first\nsecond"))),
    ]
    stage = gpu_items.Stage("s", "", lambda day: items, lambda rows: [])
    monkeypatch.setattr("gpu_stages.stages", lambda day: {"s": stage})
    right, wrong, skipped, broken = (gpu_process.answer_to("s", day, item.name) for item in items)
    assert right["status"] == "done"
    assert (wrong["status"], wrong["why"], len(wrong["rows"])) == ("failed", "not as it should be: x", 2)
    assert (skipped["status"], skipped["why"]) == ("skipped", "no such kernel")
    assert (broken["status"], broken["why"]) == ("failed", "ValueError: first")
    assert broken["trace"][-1] == "second"


def test_the_names_on_the_command_line_are_the_stages(on_gpu, day):
    every = on_gpu.stages(day)
    assert tuple(every) == on_gpu.NAMES
    for stage in every.values():
        names = [item.name for item in stage.items(day)]
        assert len(names) == len(set(names)) > 0
        assert all(item.seconds <= item.limit <= 540 for item in stage.items(day))


@pytest.mark.slow
def test_the_whole_day_at_toy_size(on_gpu, tmp_path):
    """Every item of every stage is done or says why it is left out, in one call; a second one has nothing to do."""
    command = [sys.executable, str(ROOT / "benchmarks" / "on_gpu.py"), *TINY, "--output_dir", str(tmp_path)]
    for _ in range(2):
        done = subprocess.run([*command, "--minutes", "0"], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "on_gpu.json").read_text())
    assert tuple(record["stages"]) == on_gpu.NAMES
    left_out = {(s, n) for s, own in record["stages"].items() for n, one in own.items() if one["status"] == "skipped"}
    for stage, item in left_out:  # what is of CUDA alone
        why = record["stages"][stage][item]["why"]
        assert stage in ("attention", "correctness", "tuning")
        assert any(word in why for word in ("CUDA", "CPU", "No viable", "No available")), (item, why)
    assert not {("attention", "flash"), ("attention", "math"), ("attention", "duo: ours")} & left_out
    page = (tmp_path / "on_gpu.md").read_text()
    for title in (
        *("correctness: Loss and gradients", "correctness: Dropout in both passes", "correctness: Runs"),
        *(
            "references: References",
            "profile: A step by kernels",
            "tuning: Loss head by rows",
            "variants: Variants",
            "tuning: Blocks compiled together",
        ),
        *("decoding: Variants", "curve: Training losses"),
    ):
        assert f"## {title}\n" in page
    for name in ("throughput", "decode"):
        assert "A rehearsal at toy size" in (tmp_path / f"{name}.md").read_text()
