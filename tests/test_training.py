"""The loop, against a plain PyTorch loop; resume, world sizes, signals, faults. In one process where it can be."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    FAMILIES,
    ROOT,
    finish,
    free_port,
    launch,
    metrics,
    python_program,
    record,
    run_to_end,
    train,
    wait_for_steps,
    wait_until,
    zero,
)
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from gpt2_variants import VARIANTS
from gpt2_variants import __main__ as small_commands
from gpt2_variants.config.command_line import parse
from gpt2_variants.data import load
from gpt2_variants.folders import FolderLock
from gpt2_variants.training import checkpoint, loading, loop, stopping

FLOAT32 = {"bf16": {"enabled": False}}


pytestmark = pytest.mark.usefixtures("in_process")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


def reference_losses(run, steps: int) -> list[float]:
    """The same training in plain PyTorch: float32, torch's AdamW, HF's schedule, one batch a step, plain loss."""
    data = load(run.dataset, run.tokenizer, run.block_size)
    config = run.make_config(data.vocab_size)
    torch.manual_seed(run.seed)
    model = VARIANTS[run.variant].model_class._from_config(config, attn_implementation="eager").train()
    torch.manual_seed(run.seed)  # rank 0's, for the noise of the diffusion variants
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}], lr=run.learning_rate
    )
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(run.warmup_ratio * run.max_steps), run.max_steps)
    per_epoch, losses = math.ceil(len(data.train) / 8), []
    for step in range(steps):
        epoch, k = divmod(step, per_epoch)
        order = np.random.default_rng([run.seed, epoch]).permutation(len(data.train))
        ids = data.train.__getitems__(order[8 * k : 8 * k + 8].tolist())["input_ids"]
        out = model(ids, labels=ids)
        sums = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        count = ids[:, 1:].numel()
        if run.variant == "duo_predict":
            sums = sums + F.cross_entropy(out.infill_logits.flatten(0, 1), ids[:, :-1].flatten(), reduction="sum")
            count *= 2
        loss = sums / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


NO_DROPOUT = ("resid_pdrop=0", "embd_pdrop=0", "attn_pdrop=0")


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_losses_equal_a_plain_pytorch_loop(variant, tiny_run, ds_json, tmp_path):
    """Data order, loss, AdamW, decay on matrices only, schedule and clipping at once, in float32."""
    options = [*tiny_run, *NO_DROPOUT, "--deepspeed_config", ds_json(**FLOAT32), "--max_steps", "20"]
    train(options, tmp_path / "run", variant=variant)
    losses = [r["loss"] for r in metrics(tmp_path / "run") if "loss" in r]
    run = parse(["--variant", variant, *options, "--output_dir", str(tmp_path / "other")])
    np.testing.assert_allclose(losses, reference_losses(run, 20), atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 7, 30])
@pytest.mark.parametrize("ratio", ["0", "0.1", "0.5"])
def test_every_steps_learning_rate_is_transformers(steps, ratio, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Loop, "_evaluate", lambda self, progress: False)
    train(tiny_run, tmp_path / "run", "--max_steps", str(steps), "--warmup_ratio", ratio, variant="gpt2")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-3)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(float(ratio) * steps), steps)
    expected = []
    for _ in range(steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [r["learning_rate"] for r in metrics(tmp_path / "run")] == expected


def test_a_run_leaves_what_the_interface_says(tiny_run, tmp_path):
    folder = train(tiny_run, tmp_path / "run", "--max_steps", "12", "--save_total_limit", "2")
    facts = record(folder)
    assert facts["status"] == "finished"
    assert facts["starts"][0]["world_size"] == 1
    assert facts["num_parameters"] == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(folder / "model").parameters()
    )
    assert "auto" not in (folder / "ds_config.json").read_text()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    training_keys = {"step", "elapsed_seconds", "loss", "learning_rate", "grad_norm", "epoch", "tokens"}
    training_keys |= {"next_token_loss", "infill_loss", "tokens_per_second", "mfu", "peak_memory_bytes"}
    eval_keys = {"step", "elapsed_seconds"}
    eval_keys |= {f"eval_{s}{f}" for s in ("", "infill_") for f in ("loss", "perplexity", "accuracy")}
    assert [set(r) for r in lines if "loss" in r] == [training_keys] * 12
    assert [(r["step"], set(r)) for r in lines if "eval_loss" in r] == [(s, eval_keys) for s in (5, 10, 12)]
    assert sorted(p.name for p in (folder / "checkpoints").glob("*step-*")) == ["step-00000010", "step-00000012"]
    assert (folder / "checkpoints" / "latest").read_text() == "step-00000012"
    assert lines[-1]["eval_loss"] < lines[5]["eval_loss"] < math.log(367)  # below the uniform distribution, and falling


def interrupt_at(monkeypatch, step: int):
    """A SIGTERM that arrives during the given step."""
    calls = []

    def agreed(self):
        calls.append(1)
        return signal.SIGTERM if len(calls) == step else 0

    monkeypatch.setattr(stopping.Stopper, "agreed", agreed)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_interrupted_run_goes_on_bit_for_bit(stage, tiny_run, ds_json, tmp_path):
    """Dropout on, bf16, in the middle of the second epoch and between two evaluations."""
    options = [*tiny_run, "--deepspeed_config", ds_json(zero_optimization=zero(stage)), "--max_steps", "13"]
    whole = train(options, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 7)
        part = train(options, tmp_path / "part", code=143)
    assert record(part)["status"] == "interrupted"
    assert "step 7 of 13" in record(part)["reason"]
    train(options, part, "--resume_from_checkpoint", "auto")
    assert metrics(part) == metrics(whole)
    assert record(part)["status"] == "finished"
    assert [s["resumed_from"] is None for s in record(part)["starts"]] == [True, False]
    a, b = weights(whole), weights(part)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_export_holds_the_float32_master_weights(tiny_run, tmp_path):
    from safetensors.torch import load_file

    exported = load_file(train(tiny_run, tmp_path / "run", "--max_steps", "6") / "model" / "model.safetensors")
    saved = torch.load(tmp_path / "run/checkpoints/step-00000006/mp_rank_00_model_states.pt", weights_only=False)[
        "module"
    ]
    assert exported.keys() == saved.keys() - {"lm_head.weight"}
    for name, weight in exported.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight.bfloat16(), saved[name]), name
    assert any(not torch.equal(w, w.bfloat16().float()) for w in exported.values())


@pytest.mark.parametrize("variants", [FAMILIES, pytest.param(sorted(VARIANTS), marks=pytest.mark.slow)])
def test_exports_load_without_the_package(variants, tiny_run, tmp_path):
    """In a clean process that cannot see gpt2_variants: same logits, cached generation, tokenizer with its mask token.

    The baseline's needs no trust_remote_code: it is stock GPT-2.
    """
    ids = torch.tensor([[5, 6, 7, 8]])
    for variant in variants:
        folder = train(tiny_run, tmp_path / variant, "--max_steps", "3", variant=variant)
        ours = AutoModelForCausalLM.from_pretrained(folder / "model")
        with torch.no_grad():
            torch.save((ids, ours(ids).logits), folder / "expected.pt")
    code = """if True:
        import sys, torch, importlib.util
        assert importlib.util.find_spec("gpt2_variants") is None
        from transformers import AutoModelForCausalLM, AutoTokenizer
        for variant in sys.argv[1:]:
            trust = {} if variant == "gpt2" else {"trust_remote_code": True}
            model = AutoModelForCausalLM.from_pretrained(f"{variant}/model", **trust)
            tokenizer = AutoTokenizer.from_pretrained(f"{variant}/model", **trust)
            ids, expected = torch.load(f"{variant}/expected.pt")
            with torch.no_grad():
                assert torch.equal(model(ids).logits, expected), variant
            if hasattr(model.config, "mask_token_id"):
                assert tokenizer.mask_token_id == model.config.mask_token_id == model.config.vocab_size - 1, variant
            prompt = tokenizer("The time", return_tensors="pt")
            out = model.generate(**prompt, max_new_tokens=5, pad_token_id=0, return_dict_in_generate=True)
            assert out.get("cache", out.get("past_key_values")) is not None, variant
            print(type(model).__module__, model.config.architectures, repr(tokenizer.decode(out.sequences[0])))
    """
    site = Path(torch.__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": str(site), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-S", "-c", code, *variants]
    out = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    for variant, line in zip(variants, out.stdout.splitlines(), strict=True):
        if variant == "gpt2":
            assert line.startswith("transformers.models.gpt2.modeling_gpt2 ['GPT2LMHeadModel'] 'The time")
        else:
            assert line.startswith("transformers_modules")
        assert "'The time" in line


def assert_exports_as_the_run_did(folder: Path, exported: Path) -> None:
    """From its last checkpoint: the same files, byte for byte."""
    assert small_commands.main(["export", "--checkpoint", str(folder), "--output_dir", str(exported)]) == 0
    files = {p.name: p.read_bytes() for p in (folder / "model").iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= files.keys()
    assert {p.name: p.read_bytes() for p in exported.iterdir()} == files


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", [{}, FLOAT32], ids=["bf16", "float32"])
def test_a_checkpoint_exports_as_the_run_did(stage, precision, tiny_run, ds_json, tmp_path):
    options = [*tiny_run, "--deepspeed_config", ds_json(zero_optimization=zero(stage), **precision), "--max_steps", "3"]
    assert_exports_as_the_run_did(train(options, tmp_path / "run"), tmp_path / "exported")


@pytest.mark.parametrize("change", ["lost", "another order"])
def test_weights_without_their_float32_masters_are_not_exported(change, tiny_run, ds_json, tmp_path):
    """At ZeRO stage 0 the masters carry no names: what does not round to the bf16 weights is refused."""
    options = [*tiny_run, "--deepspeed_config", ds_json(zero_optimization=zero(0)), "--max_steps", "2"]
    newest = train(options, tmp_path / "run") / "checkpoints/step-00000002"
    assert loading.float32_weights(newest, zero_stage=0).keys() == weights(tmp_path / "run").keys() - {"lm_head.weight"}
    file = newest / "mp_rank_00_model_states.pt"
    states = torch.load(file, weights_only=False)
    if change == "lost":
        del states["optimizer"]["fp32_groups"]
    else:
        states["optimizer"]["fp32_groups"][1].reverse()
    torch.save(states, file)
    with pytest.raises(ValueError, match="no float32 master weights that belong to its"):
        loading.float32_weights(newest, zero_stage=0)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_every_variants_checkpoint_exports_without_the_cache(variant, tiny_run, tmp_path, monkeypatch):
    """The checkpoint's folder alone is enough, moved to another place."""
    folder = train(tiny_run, tmp_path / "run", "--max_steps", "2", variant=variant)
    monkeypatch.setenv("GPT2_VARIANTS_CACHE", str(tmp_path / "none"))
    moved = (folder / "checkpoints/step-00000002").rename(tmp_path / "moved")
    exported = tmp_path / "new" / "exported"
    assert small_commands.main(["export", "--checkpoint", str(moved), "--output_dir", str(exported)]) == 0
    assert {p.name: p.read_bytes() for p in exported.iterdir()} == {
        p.name: p.read_bytes() for p in (folder / "model").iterdir()
    }


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_checkpoint_of_two_ranks_exports_as_the_run_did(stage, tiny_run, ds_json, tmp_path):
    options = [*tiny_run, "--deepspeed_config", ds_json(zero_optimization=zero(stage)), "--max_steps", "3"]
    command = ["--variant", "duo_predict", *options, "--output_dir", str(tmp_path / "run")]
    results = finish(launch(2, command))
    assert [code for code, _ in results] == [0, 0], results
    assert_exports_as_the_run_did(tmp_path / "run", tmp_path / "exported")


def test_export_refuses_what_is_not_whole_and_overwrites_nothing(tiny_run, tmp_path, capfd):
    folder = train(tiny_run, tmp_path / "run", "--max_steps", "6")
    newest = folder / "checkpoints/step-00000006"
    states = newest / "mp_rank_00_model_states.pt"
    damaged = bytearray(states.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    states.write_bytes(damaged)

    def export(source: Path, output_dir: Path) -> tuple[int, list[str]]:
        capfd.readouterr()
        arguments = ["export", "--checkpoint", str(source), "--output_dir", str(output_dir)]
        return small_commands.main(arguments), capfd.readouterr().err.splitlines()

    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    code, (line,) = export(newest, tmp_path / "out")
    assert code == 2
    assert line.startswith(f"error: --checkpoint {newest}: mp_rank_00_model_states.pt is damaged (its SHA-256 differs)")
    code, lines = export(tmp_path / "nowhere", folder / "model")
    assert code == 2
    assert [line.split(":")[1].split()[0] for line in lines] == ["--output_dir", "--checkpoint"]
    code, lines = export(folder, folder / "model")
    assert code == 2
    assert lines[-1] == f"error: --output_dir {folder / 'model'}: exists already; give a new folder"
    assert not (tmp_path / "out").exists()
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before

    code, lines = export(folder, tmp_path / "out")  # falls back to the newest whole one, and says so
    assert code == 0
    assert "step-00000006: mp_rank_00_model_states.pt is damaged" in lines[0]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    for left in (folder / "checkpoints").glob("step-*"):
        (left / "manifest.json").unlink()
    code, lines = export(folder, tmp_path / "other")
    assert code == 2
    assert lines[-1].startswith(f"error: --checkpoint {folder}: holds no whole checkpoint")


@pytest.mark.parametrize("variant", ["gpt2", "duo_predict"])
def test_evaluate_gives_the_runs_own_figures(variant, tiny_run, ds_json, tmp_path, capsys):
    """Without overlap its windows are the run's validation blocks; the block size is the run's."""
    options = [*tiny_run, "--deepspeed_config", ds_json(**FLOAT32), "--max_steps", "3", "--block_size", "16"]
    folder = train(options, tmp_path / "run", variant=variant)
    dataset = tiny_run[tiny_run.index("--dataset") + 1]
    command = ["evaluate", "--model", str(folder / "model"), "--dataset", dataset, "--split", "validation", "--json"]
    capsys.readouterr()
    assert small_commands.main(command) == 0
    facts = json.loads(capsys.readouterr().out)
    expected = record(folder)["final_eval"]
    assert {k: v for k, v in facts.items() if k.startswith("eval_")} == pytest.approx(expected, rel=1e-5)
    assert facts["window_size"] == facts["stride"] == 16
    assert facts["device"] == "cpu"


def test_a_damaged_checkpoint_is_passed_over_and_said(tiny_run, tmp_path, capfd):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 12)
        folder = train(tiny_run, tmp_path / "run", "--max_steps", "14", code=143)
    whole = train(tiny_run, tmp_path / "whole", "--max_steps", "14")
    newest = folder / "checkpoints/step-00000012"
    states = max(newest.glob("*.pt"), key=lambda p: p.stat().st_size)
    states.write_bytes(states.read_bytes()[:-100])
    (folder / "checkpoints/step-00000010/manifest.json").unlink()
    train(tiny_run, folder, "--max_steps", "14", "--resume_from_checkpoint", "auto")
    err = capfd.readouterr().err
    assert f"step-00000012: {states.name} has " in err
    assert "step-00000010: has no manifest" in err
    assert "resuming from" in err
    assert "step-00000005" in err.split("resuming from")[1].splitlines()[0]
    assert metrics(folder) == metrics(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--seed", "7"), "was made with seed 42"),
        (("--train_batch_size", "16"), "was made with train_batch_size 8"),
        (("--block_size", "16"), "was made with block_size 32"),
        (("--deepspeed_config", {"zero_optimization": {"stage": 3}}), "ZeRO stage 1, and cannot go on at stage 3"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change, message, tiny_run, ds_json, tmp_path, capfd):
    folder = train(tiny_run, tmp_path / "run", "--max_steps", "2")
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    option, value = change
    value = ds_json(**value) if isinstance(value, dict) else value
    options = [*tiny_run, "--max_steps", "4", "--resume_from_checkpoint", "auto", option, value]
    train(options, folder, code=2)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "stages",
    [pytest.param((1, 1, 1), marks=pytest.mark.slow), (1, 2, 1), pytest.param((3, 3, 3), marks=pytest.mark.slow)],
)
def test_a_run_goes_on_on_another_number_of_ranks(stages, tiny_run, ds_json, tmp_path, monkeypatch):
    """1 -> 2 -> 1 ranks, in the middle of an epoch, also from one ZeRO stage to another: float32, the curve of 1 rank.

    The decay is strong and on matrices only: a group that lost its own would show.
    """
    options = [*tiny_run, *NO_DROPOUT, "--weight_decay", "5", "--max_steps", "15"]
    config = lambda stage: ["--deepspeed_config", ds_json(zero_optimization=zero(stage), **FLOAT32)]
    whole = train([*options, *config(1)], tmp_path / "whole")
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, 4)
        train([*options, *config(stages[0])], folder, code=143)
    again = ["--variant", "duo_predict", "--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
    results = finish(launch(2, [*options, *config(stages[1]), *again, "--save_steps", "9"]))
    assert [code for code, _ in results] == [0, 0], results
    assert f"1 rank at ZeRO stage {stages[0]}; going on with 2 ranks at ZeRO stage {stages[1]}" in results[0][1]
    on_two_ranks = {r["step"]: r["loss"] for r in metrics(folder) if "loss" in r}
    middle = str(folder / "checkpoints/step-00000009")
    train([*options, *config(stages[2])], folder, "--resume_from_checkpoint", middle)
    assert [s["world_size"] for s in record(folder)["starts"]] == [1, 2, 1]
    assert not list((folder / "checkpoints").glob(".tmp*"))
    expected = {r["step"]: r["loss"] for r in metrics(whole) if "loss" in r}
    losses = {r["step"]: r["loss"] for r in metrics(folder) if "loss" in r}
    assert losses.keys() == expected.keys()
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], abs=2e-5), step
        assert on_two_ranks[step] == pytest.approx(expected[step], abs=2e-5), step
    a, b = weights(whole), weights(folder)
    for name in a:
        bounds = torch.full_like(a[name], 2e-5)
        if name.endswith("c_attn.bias"):
            # A bias of the keys adds the same to all scores of a query: its gradient is rounding, and no more than
            # that, which AdamW scales up. Queries and values differ by 4e-9, keys by 2e-5.
            bounds.view(3, -1)[1] = 1e-4
        assert ((b[name] - a[name]).abs() <= bounds).all(), name


def test_a_second_run_in_the_same_folder_is_refused(tiny_run, tmp_path, capfd):
    folder = tmp_path / "run"
    lock = FolderLock(folder)
    assert lock.acquire() is None
    child = "import sys; from gpt2_variants.folders import FolderLock; from pathlib import Path; "
    child += "print(FolderLock(Path(sys.argv[1])).acquire())"
    out = python_program("-c", child, folder)
    assert f"process {os.getpid()} on " in out.stdout
    train(tiny_run, folder, "--max_steps", "2", code=2)
    assert f"--output_dir {folder}: process {os.getpid()} on" in capfd.readouterr().err
    assert [p.name for p in folder.iterdir()] == [".lock"]
    del lock
    train(tiny_run, folder, "--max_steps", "2")
    assert record(folder)["status"] == "finished"


def test_resuming_a_finished_run_loses_nothing(tiny_run, tmp_path):
    folder = train(tiny_run, tmp_path / "run", "--max_steps", "3")
    first, weights_before = record(folder), weights(folder)
    lines = metrics(folder)
    train(tiny_run, folder, "--max_steps", "3", "--resume_from_checkpoint", "auto")
    assert record(folder)["final_eval"] == first["final_eval"]
    assert metrics(folder) == lines
    assert all(torch.equal(w, weights(folder)[k]) for k, w in weights_before.items())


def test_a_loss_that_is_not_finite_stops_the_run(tiny_run, tmp_path, monkeypatch, capfd):
    original = loop.Loop._optimizer_step

    def poisoned(self, micro_batches):
        if self.step == 7:
            with torch.no_grad():
                self.engine.module.transformer.ln_f.weight.fill_(math.nan)
        return original(self, micro_batches)

    monkeypatch.setattr(loop.Loop, "_optimizer_step", poisoned)
    folder = train(tiny_run, tmp_path / "run", "--max_steps", "12", "--logging_steps", "4", code=3)
    assert record(folder)["status"] == "failed"
    assert "the loss of step 8 (epoch 0, global batch 7) is not finite" in record(folder)["reason"]
    assert "the loss of step 8" in capfd.readouterr().err.splitlines()[-1]
    assert [p.name for p in (folder / "checkpoints").glob("step-*")] == ["step-00000005"]
    assert not (folder / "model").exists()


def test_a_short_last_batch_is_a_true_mean(tiny_run, ds_json, tmp_path, corpus):
    """Blocks that do not divide by the batch: the epoch's last step averages over the blocks there are."""
    options = [*tiny_run, *NO_DROPOUT, "--deepspeed_config", ds_json(**FLOAT32)]
    run = parse(["--variant", "gpt2", *options, "--output_dir", str(tmp_path / "x"), "--num_train_epochs", "1"])
    data = load(run.dataset, run.tokenizer, run.block_size)
    size = len(data.train) // 2 + 3  # two steps an epoch, the second one short
    folder = train(
        options,
        tmp_path / "run",
        "--train_batch_size",
        str(size),
        "--num_train_epochs",
        "1",
        "--learning_rate",
        "0",
        variant="gpt2",
    )
    first, second = (r for r in metrics(folder) if "loss" in r)
    assert second["tokens"] == len(data.train) * 32
    assert (first["epoch"], second["epoch"]) == (0.5, 1.0)
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    order = np.random.default_rng([42, 0]).permutation(len(data.train))
    for r, part in ((first, order[:size]), (second, order[size:])):
        ids = data.train.__getitems__(part.tolist())["input_ids"]
        with torch.no_grad():
            assert r["loss"] == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-5)


def test_two_ranks_give_the_losses_of_one(tiny_run, ds_json, tmp_path):
    """Float32, 1e-5 over 50 steps, 10 epochs with a short last batch each; evaluation with a short last batch too."""
    options = [*tiny_run, *NO_DROPOUT, "--deepspeed_config", ds_json(**FLOAT32), "--train_batch_size", "200"]
    options += ["--max_steps", "50", "--save_steps", "50"]
    one = train(options, tmp_path / "one")
    results = finish(launch(2, ["--variant", "duo_predict", *options, "--output_dir", str(tmp_path / "two")]))
    assert [code for code, _ in results] == [0, 0], results
    assert not [err for _, err in results if "Warning" in err]
    for a, b in zip(metrics(one), metrics(tmp_path / "two"), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert b[key] == pytest.approx(value, abs=1e-5 if "perplexity" not in key else 1e-2), key


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_go_on_bit_for_bit_with_dropout_and_noise(stage, tiny_run, ds_json, tmp_path):
    options = [*tiny_run, "--deepspeed_config", ds_json(zero_optimization=zero(stage)), "--save_steps", "7"]
    options += ["--variant", "drift_diffusion", "--max_steps", "13"]
    results = finish(launch(2, [*options, "--output_dir", str(tmp_path / "whole")]))
    assert [code for code, _ in results] == [0, 0], results
    middle = ["--resume_from_checkpoint", str(tmp_path / "whole/checkpoints/step-00000007")]
    results = finish(launch(2, [*options, *middle, "--output_dir", str(tmp_path / "part")]))
    assert [code for code, _ in results] == [0, 0], results
    assert metrics(tmp_path / "part") == [r for r in metrics(tmp_path / "whole") if r["step"] > 7]
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "part")
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_zero_stages_1_to_3_on_two_ranks_give_the_same_losses(variant, tiny_run, ds_json, tmp_path):
    """In bf16 on 2 ranks, every parameter partitioned at stage 3; and on 1 rank, but for noise that ranks draw."""
    runs = {}
    for stage in (1, 2, 3):
        options = [
            *tiny_run,
            *NO_DROPOUT,
            "--max_steps",
            "10",
            "--deepspeed_config",
            ds_json(zero_optimization=zero(stage)),
        ]
        folder = tmp_path / f"stage-{stage}"
        results = finish(launch(2, ["--variant", variant, *options, "--output_dir", str(folder)]))
        assert [code for code, _ in results] == [0, 0], results
        runs[stage] = metrics(folder)
    if "diffusion" not in variant:
        runs["one rank"] = metrics(train(options, tmp_path / "one", variant=variant))
    assert len(runs[1]) == 12
    for records in runs.values():
        for a, b in zip(runs[1], records, strict=True):
            for key in ("loss", "next_token_loss", "infill_loss", "eval_loss", "eval_infill_loss"):
                assert b.get(key) == pytest.approx(a.get(key), abs=2e-3), key
    assert runs[1][-1]["eval_loss"] < runs[1][5]["eval_loss"]


def test_sigterm_to_one_of_two_ranks_saves_and_the_run_goes_on_bit_for_bit(tiny_run, tmp_path):
    options = ["--variant", "duo_predict", *tiny_run, "--max_steps", "120", "--eval_steps", "60", "--save_steps", "60"]
    whole = finish(launch(2, [*options, "--output_dir", str(tmp_path / "whole")]))
    assert [code for code, _ in whole] == [0, 0], whole
    folder = tmp_path / "part"
    processes = launch(2, [*options, "--output_dir", str(folder)])
    wait_for_steps(processes[0], folder, 3)
    processes[1].send_signal(signal.SIGTERM)
    results = finish(processes)
    assert [code for code, _ in results] == [143, 143], results
    stopped = record(folder)
    assert stopped["status"] == "interrupted"
    assert "resume_from_checkpoint auto" in results[0][1]
    again = finish(launch(2, [*options, "--output_dir", str(folder), "--resume_from_checkpoint", "auto"]))
    assert [code for code, _ in again] == [0, 0], again
    assert metrics(folder) == metrics(tmp_path / "whole")


def two_ranks_by_the_launcher() -> list[str]:
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    return [deepspeed, "--num_gpus", "2", "--master_port", str(free_port()), str(ROOT / "train_ds.py")]


def test_the_launcher_trains_on_two_ranks(tiny_run, tmp_path):
    command = two_ranks_by_the_launcher()
    command += ["--variant", "duo_predict", *tiny_run, "--max_steps", "4", "--output_dir", str(tmp_path / "run")]
    out = run_to_end(command, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    assert record(tmp_path / "run")["status"] == "finished"
    assert record(tmp_path / "run")["starts"][0]["world_size"] == 2
    assert [r["step"] for r in metrics(tmp_path / "run") if "loss" in r] == [1, 2, 3, 4]


def end_of_a_long_run(folder, tiny_run, act):
    """Start 2 endless ranks by the launcher, do `act(runner, launcher, ranks)`; the runner's code, the ranks gone."""
    import psutil

    steps = ["--max_steps", "100000", "--eval_steps", "100000", "--save_steps", "100000"]
    command = [*two_ranks_by_the_launcher(), "--variant", "duo_predict", *tiny_run, *steps]
    runner = subprocess.Popen(
        [*command, "--output_dir", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        wait_for_steps(runner, folder, 3)
        launcher = psutil.Process(runner.pid).children()[0]
        ranks = sorted(launcher.children(), key=lambda p: p.environ()["RANK"])
        assert len(ranks) == 2
        act(runner, launcher, ranks)
        wait_until(lambda: not psutil.wait_procs(ranks, timeout=0)[1], seconds=25)
        wait_until(lambda: runner.poll() is not None, seconds=60)
        return runner.returncode
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(runner.pid, signal.SIGKILL)


ENDS = {
    "SIGTERM to deepspeed": lambda runner, launcher, ranks: runner.terminate(),
    "SIGKILL to its inner process": lambda runner, launcher, ranks: launcher.kill(),
    "Ctrl-C": lambda runner, launcher, ranks: os.killpg(runner.pid, signal.SIGINT),
    "SIGTERM to the group": lambda runner, launcher, ranks: os.killpg(runner.pid, signal.SIGTERM),
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_no_rank_trains_on_as_an_orphan(end, tiny_run, tmp_path):
    """Whatever the launcher does with the signal: the ranks save and end within 25 s."""
    end_of_a_long_run(tmp_path / "run", tiny_run, ENDS[end])
    assert record(tmp_path / "run")["status"] == "interrupted"
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 1


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others(tiny_run, tmp_path):
    code = end_of_a_long_run(tmp_path / "run", tiny_run, lambda runner, launcher, ranks: ranks[1].kill())
    assert code != 0
    assert record(tmp_path / "run")["status"] == "failed"


def test_a_signal_that_no_step_ends_for_is_said_before_the_kill(tiny_run, tmp_path, monkeypatch):
    """As on a GPU, where a rank waits for a dead one outside Python."""
    monkeypatch.setattr(stopping, "SECONDS_TO_STOP", 0.3)
    original, said = loop.Loop._optimizer_step, []

    def stuck(self, micro_batches):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: record(tmp_path / "run")["status"] == "failed")
            said.append(record(tmp_path / "run"))
        return original(self, micro_batches)

    monkeypatch.setattr(loop.Loop, "_optimizer_step", stuck)
    train(tiny_run, tmp_path / "run", "--max_steps", "5", code=143)
    assert said[0]["reason"].startswith("SIGTERM, and the step did not end")
    assert record(tmp_path / "run")["status"] == "interrupted", "it did end after all"


UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0,
    reason="needs the right to mount in a namespace of its own",
)
def test_a_full_disk_is_one_clear_error_and_older_checkpoints_are_intact(tiny_run, tmp_path):
    """A disk of 2 MB, of which a checkpoint takes 0.6."""
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    options = ["--variant", "gpt2", *tiny_run, "--save_steps", "1", "--eval_steps", "100", "--save_total_limit", "50"]
    command = [sys.executable, str(ROOT / "train_ds.py"), *options, "--max_steps", "20"]
    script = 'disk=$1 kept=$2; shift 2; mount -t tmpfs -o size=2m none "$disk" || exit 99; "$@"; code=$?; '
    script += 'cp -r "$disk" "$kept"; exit $code'
    out = subprocess.run(
        [*UNSHARE, "sh", "-c", script, "-", str(disk), str(kept), *command, "--output_dir", str(disk / "run")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT")},  # of this process
    )
    assert out.returncode == 1, out.stderr
    last = out.stderr.strip().splitlines()[-1]
    assert re.search(r"^error: the checkpoint of step \d was not written: .* MB (are|were) free", last), out.stderr
    assert "go on with --resume_from_checkpoint auto" in last
    folder = kept / "run"
    whole = list((folder / "checkpoints").glob("step-*"))
    assert len(whole) >= 2
    assert [checkpoint.fault_of(c) for c in whole] == [None] * len(whole)
    assert record(folder)["status"] == "failed"
    train([*options[2:], "--max_steps", "8"], folder, "--resume_from_checkpoint", "auto", variant="gpt2")
    assert [r["step"] for r in metrics(folder) if "loss" in r] == list(range(1, 9))


def test_a_checkpoint_that_cannot_be_written_is_one_clear_error(tiny_run, tmp_path, monkeypatch, capfd):
    """Where the disk fills up in the middle of it; torch then says nothing of a disk."""
    import deepspeed

    original = deepspeed.DeepSpeedEngine.save_checkpoint

    def full(self, root, tag, **kwargs):
        original(self, root, tag=tag, **kwargs)
        if tag.endswith("10"):
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 128 vs 22")

    monkeypatch.setattr(deepspeed.DeepSpeedEngine, "save_checkpoint", full)
    train(tiny_run, tmp_path / "run", "--max_steps", "20", code=1)
    last = capfd.readouterr().err.splitlines()[-1]
    assert re.search(r"^error: the checkpoint of step 10 was not written: .*enforce fail.* free", last)
    assert record(tmp_path / "run")["reason"] == last.removeprefix("error: ")
    monkeypatch.undo()
    train(tiny_run, tmp_path / "run", "--max_steps", "20", "--resume_from_checkpoint", "auto")
    assert "step-00000005" in capfd.readouterr().err
    assert not list((tmp_path / "run/checkpoints").glob(".tmp*"))


def test_the_time_to_the_first_step_is_reported(tiny_run, tmp_path, capfd):
    folder = train(tiny_run, tmp_path / "run", "--max_steps", "2", variant="gpt2")
    (start,) = record(folder)["starts"]
    assert 0 < start["first_step_seconds"] < start["seconds_to_first_step"]
    duration = r"(\d+\.\d s|\d+ min \d+ s)"
    sentence = (
        f"the first step is done, {duration} after the start: {duration} to get ready and {duration} for the step\n"
    )
    assert re.search(sentence, capfd.readouterr().err)


APEX = """
import torch

class FusedLayerNorm(torch.nn.Module):
    made = 0
    def __init__(self, normalized_shape, eps):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(normalized_shape))
        self.bias = torch.nn.Parameter(torch.empty(normalized_shape))
        self.shape, self.eps = normalized_shape, eps
        FusedLayerNorm.made += 1
    def forward(self, x):
        return torch.nn.functional.layer_norm(x, self.shape, self.weight, self.bias, self.eps)

class FusedAdam(torch.optim.AdamW):
    made = 0
    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode):
        assert adam_w_mode
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        FusedAdam.made += 1
"""


def test_apex_takes_the_places_it_is_asked_for(tiny_run, ds_json, tmp_path, monkeypatch):
    """With a stand-in of apex's interface, in PyTorch: the same run, by other classes. Its kernels need a GPU."""
    apex = types.ModuleType("apex")
    exec(APEX, vars(apex))
    monkeypatch.setitem(sys.modules, "apex", apex)
    monkeypatch.setitem(sys.modules, "apex.normalization", apex)
    monkeypatch.setitem(sys.modules, "apex.optimizers", apex)
    monkeypatch.setattr("gpt2_variants.config.checks._apex_fault", lambda: None)
    # DeepSpeed knows apex's own class
    options = (*tiny_run, "--max_steps", "3", "--deepspeed_config", ds_json(zero_allow_untested_optimizer=True))
    losses = {}
    for name in (None, "layer_norm", "adam", "all"):
        folder = train(options, tmp_path / str(name), *(("--apex", name) if name else ()), variant="rotating_head_norm")
        losses[name] = [r["loss"] for r in metrics(folder) if "loss" in r]
    assert losses[None] == losses["layer_norm"] == losses["adam"] == losses["all"]
    assert apex.FusedLayerNorm.made == 2 * (2 * 2 + 1)  # two of a block, and the last; not that of the frequencies
    assert apex.FusedAdam.made == 2
    assert weights(tmp_path / "all").keys() == weights(tmp_path / "None").keys()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("variant", ["gpt2", "drift", "parallel_concat", "duo_predict", "rotating_head_norm"])
def test_a_compiled_run_gives_the_same_curve(variant, stage, tiny_run, ds_json, tmp_path):
    """Evaluations and a short last batch among its steps. `diffusion` draws other noise when it is compiled."""
    config = ds_json(**FLOAT32, zero_optimization=zero(stage))
    options = [*tiny_run, *NO_DROPOUT, "--deepspeed_config", config, "--num_train_epochs", "1", "--max_steps", "60"]
    eager = metrics(train(options, tmp_path / "eager", variant=variant))
    torch._dynamo.reset()
    compiled = metrics(train(options, tmp_path / "compiled", "--compile", variant=variant))
    for name in ("loss", "next_token_loss", "eval_loss"):
        one, other = ([r[name] for r in records if name in r] for records in (eager, compiled))
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=0)
