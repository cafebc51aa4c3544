"""Where figures go: the names that are known, TensorBoard's files read back, and each stream's loss by hand."""

import importlib.util
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import finish, launch, metrics, train, zero
from transformers import AutoModelForCausalLM

from gpt2_variants.data import load
from gpt2_variants.trackers import registry
from gpt2_variants.trackers.jsonl import read_metrics
from gpt2_variants.trackers.registry import TRACKERS, TrackerKind, parse_names
from gpt2_variants.trackers.tensorboard import TensorBoardTracker


@pytest.fixture
def installed(monkeypatch):
    """Say which packages there are."""
    found = importlib.util.find_spec("json")
    return lambda *names: monkeypatch.setattr(registry, "find_spec", lambda name: found if name in names else None)


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("wandb", ("wandb",)),
        ("tensorboard", ("tensorboard",)),
        ("tensorboard wandb", ("wandb", "tensorboard")),
        ("tensorboard,wandb, tensorboard", ("wandb", "tensorboard")),
        (["tensorboard", "wandb"], ("wandb", "tensorboard")),
        (["tensorboard,wandb", "wandb"], ("wandb", "tensorboard")),
        (("wandb",), ("wandb",)),
        ("none", ()),
        (["none"], ()),
        ((), ()),
        ("all", ("wandb",)),
        ("all tensorboard", ("wandb", "tensorboard")),
    ],
)
def test_names(given, names, installed):
    installed("wandb")
    assert parse_names(given) == names
    assert parse_names(parse_names(given)) == names


def test_all_are_those_that_are_installed(installed):
    for packages in itertools.chain.from_iterable(
        itertools.combinations(TRACKERS, n) for n in range(len(TRACKERS) + 1)
    ):
        installed(*packages)
        assert parse_names("all") == packages


KNOWN = "any of wandb, tensorboard, or all, or none"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("tensorbord", f"tensorbord: not known (did you mean tensorboard?); {KNOWN}"),
        ("WandB", f"WandB: not known (did you mean wandb?); {KNOWN}"),
        ("wandb,mlflow", f"mlflow: not known; {KNOWN}"),
        (["tensorbord", "wandbb", "x"], f"tensorbord wandbb x: not known (did you mean tensorboard, wandb?); {KNOWN}"),
        ("none,wandb", "none wandb: none means no tracker; leave it out, or give it alone"),
        ("all none", "all none: none means no tracker; leave it out, or give it alone"),
        ("", f"is empty: {KNOWN}"),
        (" , ", f"is empty: {KNOWN}"),
    ],
)
def test_names_that_are_not_known_are_one_line(given, line):
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        parse_names(given)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_package_that_is_not_installed_is_a_fault_with_its_cure(name, installed):
    installed()
    assert TRACKERS[name].missing() == TRACKERS[name].fault() == f"{name} is not installed; pip install {name}"
    installed(name)
    assert TRACKERS[name].missing() is None


def test_what_wandb_says_of_its_mode_is_a_fault(monkeypatch, installed):
    installed("wandb", "tensorboard")
    monkeypatch.setenv("WANDB_MODE", "of line")
    assert TRACKERS["wandb"].fault() == "WANDB_MODE=of line: one of online, offline, disabled, shared is allowed"
    assert TRACKERS["wandb"].missing() is None
    assert TRACKERS["tensorboard"].fault() is None


def test_a_folder_of_the_packages_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "tracker_of_ours").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    kind = TrackerKind(name="ours", summary="", package="tracker_of_ours", open=lambda run: None)
    assert kind.missing() == "tracker_of_ours is not installed; pip install tracker_of_ours"
    (tmp_path / "tracker_of_ours/__init__.py").touch()
    assert kind.missing() is None


def test_asking_for_faults_imports_nothing_of_the_trackers():
    code = "import sys; from gpt2_variants.trackers.registry import TRACKERS, parse_names; parse_names('all'); "
    code += "[kind.fault() for kind in TRACKERS.values()]; print({'wandb', 'tensorboard', 'torch'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def read(folder: Path, purge: bool = True) -> tuple[dict[str, list[tuple[int, float]]], list[str]]:
    """(tag -> (step, value) in order, the texts) of all files in `folder`, by TensorBoard's own reader."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    everything = {"scalars": 0, "tensors": 0}
    events = accumulator.EventAccumulator(str(folder), size_guidance=everything, purge_orphaned_data=purge).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    texts = [e.tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"] for e in events.Tensors(tag)]
    return scalars, texts


def as_curves(records: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard is to have of these records: each tag's first value of a step, in float32, without None."""
    curves: dict[str, dict[int, float]] = {}
    for record in records:
        for key, value in record.items():
            tag = f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
            if key != "step" and value is not None:
                curves.setdefault(tag, {}).setdefault(record["step"], float(np.float32(value)))
    return {tag: list(curve.items()) for tag, curve in curves.items()}


def test_tensorboard_has_what_was_logged(tmp_path):
    records = [
        {"step": 10, "elapsed_seconds": 1.5, "loss": 2.125, "mfu": None, "tokens": 320},
        {"step": 10, "elapsed_seconds": 1.5, "eval_loss": 2.0, "eval_infill_perplexity": 7.25},
        {"step": 20, "elapsed_seconds": 3.0, "loss": math.inf, "mfu": 0.25, "tokens": 640},
    ]
    tracker = TensorBoardTracker(tmp_path, {"variant": "gpt2", "options": {"seed": 42}}, resume_step=0)
    for record in records:
        tracker.log(record)
    before, _ = read(tmp_path / "tensorboard")  # a killed process has lost nothing
    tracker.log({"step": 30, "loss": math.nan})
    tracker.close()
    scalars, (text,) = read(tmp_path / "tensorboard")
    assert scalars["train/loss"][:2] == [(10, 2.125), (20, math.inf)]
    step, value = scalars["train/loss"].pop()
    assert step == 30
    assert math.isnan(value)
    assert scalars == before == as_curves(records)
    assert scalars["train/mfu"] == [(20, 0.25)]
    assert scalars["eval/infill_perplexity"] == [(10, 7.25)]
    assert scalars["train/elapsed_seconds"] == [(10, 1.5), (20, 3.0)]
    assert json.loads(text) == {"variant": "gpt2", "options": {"seed": 42}}


@pytest.mark.parametrize("at", [0, 2])
def test_tensorboard_goes_on_with_no_step_twice(at, tmp_path):
    """After a crash: the later steps of the first start are gone, also where it left no checkpoint; one config."""
    for resume_step, value in ((0, 1.0), (at, 2.0)):
        tracker = TensorBoardTracker(tmp_path, {"value": value}, resume_step)
        for step in range(resume_step + 1, 5):
            tracker.log({"step": step, "loss": value})
        tracker.close()
    scalars, (text,) = read(tmp_path / "tensorboard")
    assert scalars["train/loss"] == [(step, 1.0 if step <= at else 2.0) for step in range(1, 5)]
    assert len(read(tmp_path / "tensorboard", purge=False)[0]["train/loss"]) == 8 - at
    assert json.loads(text) == {"value": 1.0}


@pytest.mark.usefixtures("in_process")
def test_a_run_and_its_resumption_are_in_tensorboard_as_in_metrics_jsonl(tiny_run, tmp_path):
    """Stopped at step 7, gone on with from the checkpoint of step 5."""
    options = [*tiny_run, "--report_to", "tensorboard"]
    folder = train(options, tmp_path / "run", "--max_steps", "7")
    middle = ["--resume_from_checkpoint", str(folder / "checkpoints/step-00000005")]
    train(options, folder, "--max_steps", "9", *middle)
    scalars, (text,) = read(folder / "tensorboard")
    assert scalars == as_curves(read_metrics(folder / "metrics.jsonl"))
    assert [step for step, _ in scalars["train/infill_loss"]] == list(range(1, 10))
    assert [step for step, _ in scalars["eval/perplexity"]] == [5, 9]
    facts = json.loads((folder / "run.json").read_text())
    assert json.loads(text).items() >= {name: facts[name] for name in ("variant", "num_parameters")}.items()


FLOAT32 = {"bf16": {"enabled": False}}
NO_DROPOUT = ("resid_pdrop=0", "embd_pdrop=0", "attn_pdrop=0")


def losses_by_hand(model, blocks: list[torch.Tensor]) -> dict[str, float]:
    """The mean of each stream over its predictions in `blocks`, one block after the other, from logits in float64."""
    nll = {"next_token_loss": [], "infill_loss": []}
    for ids in blocks:
        with torch.no_grad():
            out = model(ids[None], labels=ids[None])
        for k in range(len(ids) - 1):
            nll["next_token_loss"].append(-float(out.logits[0, k].log_softmax(-1)[ids[k + 1]]))
            nll["infill_loss"].append(-float(out.infill_logits[0, k].log_softmax(-1)[ids[k]]))
    return {name: float(np.mean(values)) for name, values in nll.items()}


@pytest.fixture(scope="module")
def learned(tiny_run, tmp_path_factory):
    """Options of two steps at a learning rate of 0, an epoch, of a model whose streams differ; what they are to log.

    The second step is short: with micro-batches of 64 one of them has 4 blocks and the next none.
    """
    folder = tmp_path_factory.mktemp("learned") / "run"
    (result,) = finish(
        launch(1, ["--variant", "duo_predict", *tiny_run, "--max_steps", "40", "--output_dir", str(folder)])
    )
    assert result[0] == 0, result
    options = [*tiny_run, *NO_DROPOUT, "--train_batch_size", "512", "--num_train_epochs", "1", "--learning_rate", "0"]
    data = load(tiny_run[tiny_run.index("--dataset") + 1], "builtin", 32)
    assert 512 < len(data.train) < 1024
    assert (len(data.train) - 512) % 64 > 0
    order = np.random.default_rng([42, 0]).permutation(len(data.train))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64).eval()
    expected = []
    for part in (order[:512], order[512:]):
        expected.append(losses_by_hand(model, list(data.train.__getitems__(part.tolist())["input_ids"])))
    return [*options, "--init_from", str(folder / "model")], expected


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("ranks", "micro_batch"), [pytest.param(1, 512, marks=pytest.mark.slow), (1, 64), (2, 64)])
def test_each_streams_loss_is_the_mean_over_its_predictions(ranks, micro_batch, learned, ds_json, tmp_path):
    """Of the whole global batch, on any number of ranks and of micro-batches."""
    options, expected = learned
    options = [*options, "--deepspeed_config", ds_json(**FLOAT32), "--per_device_train_batch_size", str(micro_batch)]
    if ranks == 1:
        train(options, tmp_path / "run")
    else:
        results = finish(launch(2, ["--variant", "duo_predict", *options, "--output_dir", str(tmp_path / "run")]))
        assert [code for code, _ in results] == [0, 0], results
    logged = [r for r in metrics(tmp_path / "run") if "loss" in r]
    assert len(logged) == 2
    for record, by_hand in zip(logged, expected, strict=True):
        assert abs(by_hand["next_token_loss"] - by_hand["infill_loss"]) > 0.01
        for name, value in by_hand.items():
            assert record[name] == pytest.approx(value, rel=2e-6), name
        assert record["loss"] == pytest.approx(sum(by_hand.values()) / 2, rel=2e-6)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_loss_is_the_mean_of_the_streams_in_bf16_at_every_zero_stage(stage, tiny_run, ds_json, tmp_path):
    options = [*tiny_run, "--deepspeed_config", ds_json(zero_optimization=zero(stage)), "--max_steps", "6"]
    folder = train(options, tmp_path / "run", "--per_device_train_batch_size", "2")
    for record in [r for r in metrics(folder) if "loss" in r]:
        assert record["next_token_loss"] != record["infill_loss"]
        assert record["loss"] == pytest.approx((record["next_token_loss"] + record["infill_loss"]) / 2, rel=1e-6)


@pytest.mark.usefixtures("in_process")
def test_with_one_stream_the_loss_is_that_of_the_next_token(tiny_run, tmp_path):
    folder = train(tiny_run, tmp_path / "run", "--max_steps", "3", "--per_device_train_batch_size", "4", variant="gpt2")
    logged = [r for r in metrics(folder) if "loss" in r]
    assert [r["next_token_loss"] for r in logged] == [r["loss"] for r in logged]
    assert not any("infill_loss" in r for r in logged)
