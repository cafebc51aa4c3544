"""What the benchmarks compute and write; never how fast anything is."""

import ast
import importlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, random_ids, tiny

from gpt2_variants.measuring import flops_per_token

SMALL = ["--preset", "demo", "--model_args", "n_layer=2", "n_embd=32", "n_head=2"]
SMALL += ["--block_size", "16", "--per_device_train_batch_size", "2", "--warmup_steps", "1"]


@pytest.fixture(scope="module")
def benchmarks():
    """benchmarks/throughput.py; its folder is on the path as long as the tests of this module run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("throughput")


@pytest.fixture
def case(benchmarks):
    """The small baseline."""
    return benchmarks.parse([*SMALL, "--variants", "gpt2"]).cases[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset", "big"], ["--preset big: not known"]),
        (["--preset", "seed"], ["--preset seed: there is no CUDA device"]),
        (["--variants", "gpt2", "gpt3"], ["--variants gpt3: not known (did you mean gpt2?); one of gpt2, duo_predict"]),
        (["--variants", "drift", "--compare"], ["--compare: the references are those of gpt2 and duo_predict"]),
        (
            ["--steps", "0", "--rounds", "x", "--dtype", "fp8", "--size", "tiny", "--block_size", "1.5"],
            ["--dtype fp8", "--steps 0", "--rounds x", "--block_size 1.5", "--size tiny"],
        ),
        (["--deepspeed_config", "none.json"], ["--deepspeed_config none.json: no such file"]),
        (["--model_args", "n_layr=2"], ["--model_args n_layr: gpt2 has no such config field"]),
        (["--unknown"], ["unrecognized arguments: --unknown"]),
    ],
)
def test_faults_are_told_at_once_a_line_each(benchmarks, capsys, arguments, said):
    assert benchmarks.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(said)
    for line, start in zip(lines, said, strict=True):
        assert line.startswith(f"error: {start}")


@pytest.mark.slow
def test_the_presets_are_the_recipe_and_what_was_asked_for(benchmarks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("gpt2_variants.config.deepspeed_json._engine_faults", lambda config, path: [])
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    plan = benchmarks.parse(["--compare"])
    cases = {case.name: case for case in plan.cases}
    assert set(cases) >= {*benchmarks.VARIANTS, "gpt2, plain loop", "stock", "stock, compiled", "as published"}
    for name in benchmarks.VARIANTS:
        run = cases[name].run
        assert (run.preset, run.size, run.per_device_train_batch_size) == ("seed", "gpt2-medium", 64)
        assert run.block_size == (512 if name == "duo_predict" else 1024)
        assert run.model_args == {}  # dropout 0.1
        assert cases[name].dtype == "bfloat16"
        assert cases[name].plan.gradient_accumulation_steps == 1
        assert cases[name].reference == (None if name == "gpt2" else "gpt2")
    assert cases["duo_predict, dense mask"].reference == "duo_predict, plain loop"
    # stock, which has no room for as many, is measured with fewer sequences, and ours with as many beside it
    sequences = {name: case.plan.train_batch_size for name, case in cases.items() if not case.is_variant}
    assert sequences.pop("stock") == sequences.pop("gpt2, plain loop, 32 sequences") == 32
    assert set(sequences.values()) == {64}
    assert cases["stock"].reference == "gpt2, plain loop, 32 sequences"
    assert "32 sequences, as its logits and activations have no room with 64" in cases["stock"].what
    assert cases["as published"].reference == "gpt2, plain loop"
    assert cases["stock, compiled"].reference == "gpt2, plain loop"
    assert all(case.plan.gradient_accumulation_steps == 1 for case in cases.values())


def test_stock_gpt2_is_compiled_as_a_whole(benchmarks):
    from training_case import make_model

    cases = {case.name: case for case in benchmarks.parse([*SMALL, "--variants", "gpt2", "--compare"]).cases}
    stock = cases["stock, compiled"]
    model, _ = make_model(replace(stock, run=replace(stock.run, compile=False)), "cpu")
    ids = random_ids(2, 16)

    def graphs() -> tuple[int, int]:
        torch._dynamo.reset()
        found = torch._dynamo.explain(model)(input_ids=ids, labels=ids)
        return found.graph_count, found.graph_break_count

    assert graphs() == (1, 0)
    model.loss_type = None  # as transformers leaves it
    assert graphs() != (1, 0)


def test_without_deepspeed_the_plain_loop_stands_for_its_engine(tmp_path):
    """As on a machine that has PyTorch and transformers alone; in processes of its own, whose children lack it too."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['deepspeed'] = None\n")
    path = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "benchmarks")))
    code = (
        "import throughput, sys; print([(c.name, c.loop, c.reference) for c in throughput.parse(sys.argv[1:]).cases])"
    )
    env = {**os.environ, "PYTHONPATH": path}
    asked = [*SMALL, "--variants", "gpt2", "drift", "--compare"]
    found = subprocess.run([sys.executable, "-c", code, *asked], env=env, capture_output=True, text=True, check=True)
    loops = ast.literal_eval(found.stdout)
    assert loops[:2] == [("gpt2", "plain", None), ("drift", "plain", "gpt2")]
    assert {(name, of) for name, _, of in loops[2:]} == {
        (n, "gpt2") for n in ("stock", "stock, compiled", "as published")
    }
    training = [
        sys.executable,
        str(ROOT / "train_ds.py"),
        "--variant",
        "gpt2",
        "--preset",
        "demo",
        "--report_to",
        "none",
    ]
    refused = subprocess.run(training, env=env, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "error: deepspeed is not installed, and training runs on it; pip install deepspeed" in refused.stderr


@pytest.mark.parametrize("leak_free", [True, False])
def test_the_dense_mask_gives_our_duo_predict_in_float64(benchmarks, leak_free):
    from dense_duo_predict import DenseDuoPredictLMHeadModel

    ours = tiny("duo_predict", leak_free=leak_free, initializer_range=0.3).double()
    dense = DenseDuoPredictLMHeadModel._from_config(ours.config, attn_implementation="sdpa").double().eval()
    dense.load_state_dict(ours.state_dict())
    ids = random_ids(2, 9)
    losses = [model(input_ids=ids, labels=ids, skip_logits=True).loss for model in (ours, dense)]
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-12)
    for loss in losses:
        loss.backward()
    for (name, mine), other in zip(ours.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(other.grad, mine.grad, rtol=0, atol=1e-11, msg=name)


def test_the_dense_mask_by_hand(benchmarks):
    from dense_duo_predict import interleaved_mask

    published = ["10000", "01100", "10100", "10011", "10101"]  # t_1 m_1 t_2 m_2 t_3
    assert interleaved_mask(3, neighbour=True).int().tolist() == [list(map(int, row)) for row in published]
    leak_free = ["10000", "01000", "10100", "10010", "10101"]
    assert interleaved_mask(3, neighbour=False).int().tolist() == [list(map(int, row)) for row in leak_free]


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 1e-3), ("float32", 1e-5)])
def test_the_plain_loop_computes_what_the_engine_does(benchmarks, case, dtype, bound):
    """Three steps at the full rate, with dropout and two accumulated micro-batches."""
    from training_case import Trainer

    run = replace(case.run, max_steps=4, warmup_ratio=0.0, train_batch_size=4)
    run = replace(run, model_args={**run.model_args, "resid_pdrop": 0.1})
    losses = {}
    for loop in ("deepspeed", "plain"):
        trainer = Trainer(replace(case, run=run, dtype=dtype, loop=loop))
        trainer.seconds(3)
        losses[loop] = torch.stack(trainer.losses)
    assert losses["plain"][0] - losses["plain"][2] > 0.1  # it learns: an update left out would show
    torch.testing.assert_close(losses["plain"], losses["deepspeed"], rtol=0, atol=bound)


def test_mfu_by_hand(benchmarks):
    # the baseline at the recipe: 6 * 354,823,168 + 12 * 24 * 1024 * 1024 FLOPs a token, an H100's 989 TFLOP/s
    flops = flops_per_token(354_823_168, 24, 1024, 1024, 1024)
    assert flops == 2_128_939_008 + 301_989_888
    mfu = importlib.import_module("throughput_rounds").mfu
    assert mfu(240_000, flops, 989e12) == pytest.approx(0.5899, abs=1e-4)
    assert mfu(240_000, flops, None) is None


def test_a_small_run_end_to_end(benchmarks, tmp_path, capsys):
    asked = ["--variants", "duo_predict", "gpt2", "--compare", "--steps", "2", "--rounds", "2"]
    plan = benchmarks.parse([*SMALL, *asked, "--output_dir", str(tmp_path)])
    slow = "stock, compiled"
    bad = replace(plan.cases[0], name="bad", model="none such", loop="plain", reference="gpt2")
    plan = replace(plan, cases=[*(c for c in plan.cases if c.name != slow), bad])
    assert benchmarks.carry_out(plan) == 1  # for the bad one
    record = json.loads((tmp_path / "throughput.json").read_text())
    assert {"date", "command", "commit", "dirty", "device", "versions", "threads"} < record.keys()
    variants = {row["case"]: row for row in record["tables"]["Variants"]}
    compared = {row["case"]: row for row in record["tables"]["References"]}
    assert list(variants) == ["gpt2", "duo_predict"]
    assert set(compared) == {c.name for c in plan.cases} - set(variants) - {"bad"}
    gpt2, duo = variants.values()
    assert (gpt2["tokens_per_step"], gpt2["positions_per_step"]) == (2 * 16, 2 * 16)
    assert (duo["tokens_per_step"], duo["positions_per_step"]) == (2 * 16, 2 * 31)
    for name, row in {**variants, **compared}.items():
        assert row["tokens_per_second"] == pytest.approx(row["tokens_per_step"] / row["seconds_per_step"])
        assert row["mfu"] is None
        assert row["seconds_per_step_p10"] <= row["seconds_per_step"] <= row["seconds_per_step_p90"]
        assert row["first_step_seconds"] > 0
        assert 0 < row["steady_memory_bytes"] <= row["peak_memory_bytes"] * 1.01
        assert all(len(taken) == 2 for taken in row["seconds"])
        assert len(row["relative_speed_rounds"]) == (0 if name == "gpt2" else 2)
    assert compared["as published"]["gradient_checkpointing"]
    ((failed,),) = [record["tables"]["Not measured"]]
    assert (failed["case"], failed["failure"]) == ("bad", "KeyError: 'none such'")
    page = (tmp_path / "throughput.md").read_text()
    assert page in capsys.readouterr().out
    for said in (record["commit"] or "not a git checkout", record["device"], "| gpt2 | 2 x 16 |", "2 rounds of 2"):
        assert said in page
    assert (tmp_path / "throughput.png").exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_in_turn_as_on_a_gpu(benchmarks, tmp_path):
    plan = benchmarks.parse([*SMALL, "--variants", "gpt2", "drift", "--steps", "1", "--rounds", "2"])
    rounds = importlib.import_module("throughput_rounds")
    results = {case.name: rounds.Measured(case) for case in plan.cases}
    rounds._in_turn(plan, results, tmp_path)
    assert [len(r.seconds) for r in results.values()] == [2, 2]
    assert [len(r.relative) for r in results.values()] == [0, 2]
    assert [r.failure for r in results.values()] == [None, None]


def test_a_process_that_dies_is_a_failure_and_not_the_end(benchmarks, case, tmp_path):
    from training_case import CaseFailed, Worker

    worker = Worker(replace(case, loop="plain"), tmp_path)
    os.kill(worker._process.pid, signal.SIGKILL)
    with pytest.raises(CaseFailed, match=r"killed by SIGKILL|ended before"):
        worker.seconds(1)
    with pytest.raises(CaseFailed, match="ended before"):
        worker.seconds(1)
    worker.close()


def test_a_results_page_says_what_it_stands_on(benchmarks, tmp_path):
    page = sys.modules["results_page"]
    facts = {**page.facts(), "dirty": True, "commit": "abc"}
    columns = [page.Column("name", "name"), page.Column("bytes", "MiB", ".1f", 1 / 2**20)]
    table = page.Table("Memory", columns, [{"name": "a|b", "bytes": 3 * 2**19}, {"name": "c"}], "how to read it")
    page.write(tmp_path / "new", "memory", "Title", facts, [table], ["a note"])
    text = (tmp_path / "new" / "memory.md").read_text()
    for said in ("# Title", "abc with changes that are not committed (dirty)", facts["device"], "torch 2", "a note"):
        assert said in text
    assert "| name | MiB |\n| --- | ---: |\n| a\\|b | 1.5 |\n| c | - |\n\nhow to read it\n" in text
    assert json.loads((tmp_path / "new" / "memory.json").read_text())["tables"]["Memory"][0]["bytes"] == 3 * 2**19
    assert page.folder("NVIDIA H100 80GB HBM3").name == "nvidia-h100-80gb-hbm3"


def test_benchmarks_import_of_the_package_what_they_may():
    may = {"registry", "measuring", "config", "training", "data", "models", "faults", "ranks", "records"}
    may |= {"variant_code", "folders"}
    for file in (ROOT / "benchmarks").glob("*.py"):
        imports = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
        own = {node.module.split(".")[1] for node in imports if node.module.startswith("gpt2_variants.")}
        assert own <= may, file.name
