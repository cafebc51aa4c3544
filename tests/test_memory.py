"""The estimate of a step's memory, against hand calculations and dry runs of the CUDA path; what follows from it."""

import json
import re

import pytest
import torch
from conftest import metrics, tiny, train

import train_ds
from gpt2_variants import VARIANTS, memory
from gpt2_variants.config.command_line import parse
from gpt2_variants.config.plan import DataFacts, make_plan
from gpt2_variants.memory import GIB, Card, Demand, Sharding, faked_step, kept_bytes, model_states
from gpt2_variants.memory.peak import RESERVE
from gpt2_variants.training.session import prepare


def demand(*options: str, compiled: bool = False, world: int = 1) -> Demand:
    """Of a run of the recipe."""
    run = parse(["--preset", "seed", "--report_to", "none", "--dry_run", *options])
    plan = make_plan(run, DataFacts(1000, None, "", None), run.make_config(50257), world)
    return Demand(plan, plan.spec.on_meta(plan.model_config()), compiled)


def test_model_states_by_hand():
    total, largest = 1_000_000, 50_000
    beside = 64 * 1024**2  # cuBLAS's workspaces

    def states(gpus, stage, **more):
        return model_states(total, largest, Sharding(gpus, stage, **more))

    for gpus in (1, 2, 8, 64, 1024):
        # held: a weight in bf16, its float32 master and two moments; at the step its gradient in bf16 and in float32
        assert states(gpus, 0).held == 14 * total + beside
        assert states(gpus, 0).at_step == 20 * total + beside
        # by ZeRO 1 and 2 also a copy of the gradients in one piece
        assert states(gpus, 1).held == pytest.approx(2 * total + 12 * total / gpus + beside, abs=1)
        assert states(gpus, 1).at_step == pytest.approx(4 * total + 18 * total / gpus + beside, abs=1)
        assert states(gpus, 2).at_step == pytest.approx(2 * total + 20 * total / gpus + beside, abs=1)
        assert states(gpus, 3).held == pytest.approx(4 * largest + 16 * total / gpus + beside, abs=1)
        assert states(gpus, 3).at_step == pytest.approx(4 * largest + 20 * total / gpus + beside, abs=1)
        assert [states(gpus, stage).gradient_share for stage in range(4)] == [1, 1, 1 / gpus, 0]
    # float32: the weight is its own master without ZeRO, which keeps another beside it
    assert states(1, 0, weight_bytes=4).held == 12 * total + beside
    assert states(1, 1, weight_bytes=4).held == 16 * total + beside
    assert states(1, 1, bucket=1000).buffers == 2000
    assert states(1, 2, bucket=1000, overlap=True).buffers == 4000
    # offloaded: on the GPU one layer, its weights and gradients; on a node's CPU 18 bytes a parameter shared over the
    # nodes, or a float32 model for each of its 8 ranks while it is built, and half as much again
    for gpus, cpu in ((1, 27), (8, 48), (1024, 48)):
        assert (states(gpus, 3, offload=True).held, states(gpus, 3, offload=True).cpu) == (
            4 * largest + beside,
            cpu * total,
        )


def test_activations_by_hand():
    """What the operations of a stock block keep, read off its code: bytes per position in bf16."""
    fields = {"n_embd": 128, "n_head": 2}
    width, heads, tokens = 128, 2, 256  # whole units of the allocator, 512 bytes
    norm = 2 * width + 2 * 2 + 2 * width  # its input, mean and 1 / deviation; its output, which the next matrix keeps
    attention = 6 * width + 2 * width + 4 * heads  # q, k, v; what they mix to; the softmax's normaliser in float32
    gelu = 2 * 2 * 4 * width  # its input and output, each of 4 widths
    dropout = width  # a byte of each entry
    block = 2 * norm + attention + gelu + 2 * dropout
    kept = {
        (layers, checkpointing): kept_bytes(
            tiny("gpt2", n_layer=layers, n_positions=tokens, **fields), tokens, checkpointing
        )
        for layers in (2, 3)
        for checkpointing in (False, True)
    }
    assert kept[3, False] - kept[2, False] == block * tokens
    assert kept[3, True] - kept[2, True] == 2 * width * tokens  # its input alone


def test_the_loss_holds_the_logits_of_one_chunk():
    """Beside the hidden states: in float32 the chunk's probabilities, in bf16 its logits and their gradient."""
    model = tiny("gpt2", n_positions=64, vocab_size=4096)
    steps = {n: faked_step(model, n, 64) for n in (64, 128, 192)}  # a chunk is 4,096 positions
    one_more = [steps[n].peak - steps[n].kept for n in (64, 128, 192)]
    assert one_more[0] == pytest.approx(8 * 4096 * 4096, rel=0.02)
    assert one_more[1] - one_more[0] < 0.3 * one_more[0]  # from the second on a chunk's part of the head's gradient
    assert one_more[2] - one_more[1] < 0.05 * one_more[0]


def test_duo_predict_computes_twice_the_positions_and_the_diffusion_keeps_its_noise():
    kept = {v: kept_bytes(tiny(v, n_embd=128, n_head=2), 48) for v in sorted(VARIANTS)}
    per_position = kept["gpt2"] / 48
    assert kept["duo_predict"] / 95 == pytest.approx(per_position, rel=0.05)
    assert kept["diffusion"] > kept["gpt2"] + 2 * 2 * 128 * 48  # at least the bf16 noise of 2 layers


# From dry runs of the CUDA path (torch 2.11, DeepSpeed's engine; no GPU): the most GiB that torch's allocator held.
# Those of 24 layers without torch.compile are on the line through 2 and 4.
DRY_RUNS = [
    ("gpt2", False, 58.59),
    ("gpt2", True, 57.81),
    ("gpt2 --model_args n_layer=8", True, 21.11),
    ("gpt2 --gradient_checkpointing", False, 10.74),
    ("gpt2 --gradient_checkpointing --model_args n_layer=8", True, 6.41),
    ("gpt2 --per_device_train_batch_size 4", False, 9.55),
    ("gpt2 --per_device_train_batch_size 1", False, 7.33),
    ("gpt2 --deepspeed_config zero3.json --per_device_train_batch_size 16", False, 20.68),
    ("duo_predict", False, 58.62),
    ("duo_predict --model_args n_layer=8", True, 21.12),
    ("rotating_head", False, 58.64),
    ("rotating_head --model_args n_layer=8", True, 21.12),
    ("drift_diffusion", False, 64.59),
    ("drift_diffusion --model_args n_layer=8", True, 23.11),
    ("parallel_concat", False, 60.13),
    ("parallel_concat --model_args n_layer=8", True, 21.63),
]


# Of those that are compiled, which takes seconds each.
BY_DEFAULT = ("gpt2 --model_args n_layer=8", "gpt2 --gradient_checkpointing --model_args n_layer=8")


@pytest.mark.parametrize(
    ("options", "compiled", "gib"),
    [
        pytest.param(
            *run, marks=[pytest.mark.slow] if run[1] and run[0] not in BY_DEFAULT else [], id=f"{run[0]}-{run[1]}"
        )
        for run in DRY_RUNS
    ],
)
def test_a_dry_run_of_the_cuda_path_takes_as_much(options, compiled, gib):
    of_run = demand("--variant", *options.split(), compiled=compiled)
    assert of_run.peak(of_run.plan.per_device_train_batch_size) / GIB == pytest.approx(gib, rel=0.1)


def test_between_the_counted_micro_batches_lies_a_line():
    """What is not counted is as much as what is: of 16 and 32 sequences, in a plan of 64."""
    of_many = demand("--variant", "gpt2", "--model_args", "n_layer=2")
    for micro in (16, 32):
        counted = demand("--variant", "gpt2", "--model_args", "n_layer=2", "--per_device_train_batch_size", str(micro))
        assert of_many.activations(micro) == pytest.approx(counted.activations(micro), rel=0.01)


def test_compiled_models_and_later_training_are_left_alone():
    """The estimate's graphs are not taken for a model's own."""
    model = tiny("gpt2").train()
    ids = torch.arange(32).view(1, 32)
    faked_step(model, 1, 32, compiled=True)
    assert type(model(input_ids=ids, labels=ids, skip_logits=True).loss.detach()) is torch.Tensor
    assert torch.nn.functional.dropout is torch.nn.Dropout.forward.__globals__["F"].dropout
    assert torch.nn.functional.dropout.__module__ == "torch.nn.functional"


def test_a_model_that_looks_at_values_gets_no_estimate(tmp_path, capsys):
    model = tiny("gpt2")
    looks = type("Looks", (type(model),), {"forward": lambda self, input_ids, **_: int(input_ids.sum())})
    with pytest.raises(memory.NoEstimate, match="Looks does not run without data"):
        faked_step(looks(model.config), 1, 8)


def test_the_verdict_names_the_card_and_the_cure():
    run = demand("--variant", "gpt2", "--model_args", "n_layer=4")
    needs = run.peak(64)
    assert memory.verdict(run, Card("X", needs + RESERVE, True)).fits
    assert "fits X" in memory.verdict(run, Card("X", needs + RESERVE, True)).line
    short = memory.verdict(run, Card("X", needs + RESERVE - 1, True))
    assert not short.fits
    assert not short.hopeless
    assert "no" in short.line
    assert "--per_device_train_batch_size 32 " in short.line  # the largest part of 64 that takes less
    assert run.peak(32) < needs
    hopeless = memory.verdict(run, Card("X", run.states().at_step - 1, True))
    assert hopeless.hopeless
    assert "alone" in hopeless.line


SMALL = [
    *("--model_args", "n_layer=2", "n_embd=32", "n_head=2", "n_positions=32"),
    *("resid_pdrop=0", "embd_pdrop=0", "attn_pdrop=0", "--max_steps", "6", "--bf16", "false"),
]


def of_small(tiny_run, tmp_path) -> Demand:
    """What the run of `SMALL` takes."""
    _, plan = prepare(parse(["--variant", "gpt2", *tiny_run, *SMALL, "--output_dir", str(tmp_path / "other")]))
    return Demand(plan, plan.spec.on_meta(plan.model_config()), compiled=False)


def test_the_micro_batch_that_fits_gives_the_same_curve(tiny_run, tmp_path, monkeypatch, in_process, capsys):
    """On a card with room for 2 of 8 sequences: four times as many forward passes, and the losses of one."""
    whole = train([*tiny_run, *SMALL], tmp_path / "whole", variant="gpt2")
    faked = Card("a faked card", of_small(tiny_run, tmp_path).peak(2) + RESERVE, here=True)
    monkeypatch.setattr("gpt2_variants.training.session.card", lambda: faked)
    capsys.readouterr()
    shared = train([*tiny_run, *SMALL], tmp_path / "shared", "--auto_micro_batch", variant="gpt2")
    assert "--auto_micro_batch: 8 = 2 per GPU x 4 accumulated x 1 GPU;" in capsys.readouterr().err
    facts = json.loads((shared / "run.json").read_text())
    assert facts["plan"]["per_device_train_batch_size"] == 2
    assert facts["plan"]["gradient_accumulation_steps"] == 4
    assert "per_device_train_batch_size=2" in facts["plan"]["chosen"]
    losses = [[line["loss"] for line in metrics(f) if "loss" in line] for f in (whole, shared)]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_no_micro_batch_fits_or_one_is_given_already(tiny_run, tmp_path, monkeypatch, in_process, capsys):
    monkeypatch.setattr("gpt2_variants.training.session.card", lambda: Card("a faked card", RESERVE + 1, here=True))
    train([*tiny_run, *SMALL], tmp_path / "run", "--auto_micro_batch", variant="gpt2", code=2)
    assert "--auto_micro_batch: a single sequence takes" in capsys.readouterr().err
    more = ("--auto_micro_batch", "--per_device_train_batch_size", "2")
    train([*tiny_run, *SMALL], tmp_path / "run", *more, variant="gpt2", code=2)
    assert "--auto_micro_batch: --per_device_train_batch_size says it already" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", ["states", "activations", "enough"])
def test_a_run_that_will_not_fit_says_so_before_it_starts(size, tiny_run, tmp_path, monkeypatch, in_process, capsys):
    """Refused where the states alone are more than the card; else a line, since an estimate may err."""
    of_run = of_small(tiny_run, tmp_path)
    sizes = {"states": of_run.states().at_step // 2, "activations": of_run.peak(4) + RESERVE, "enough": 80 * GIB}
    monkeypatch.setattr("gpt2_variants.training.session.card", lambda: Card("a faked card", sizes[size], here=True))
    monkeypatch.setattr("gpt2_variants.training.session.has_cuda", lambda: True)
    folder = tmp_path / "run"
    train([*tiny_run, *SMALL], folder, variant="gpt2", code=2 if size == "states" else 0)
    (*lines,) = (line for line in capsys.readouterr().err.splitlines() if "memory: " in line)
    if size == "states":
        assert lines[0].startswith("error: memory: weights, gradients and optimizer states alone take")
        assert not folder.exists()
    elif size == "activations":
        (line,) = lines
        assert "fits a faked card" in line
        assert "add --per_device_train_batch_size 4 " in line
    else:
        assert not lines


@pytest.mark.slow
def test_the_table_of_a_dry_run(tiny_run, tmp_path, capsys):
    """Each figure of a row is the estimate of that number of GPUs, in GiB; the run's own stage is marked."""
    options = ["--variant", "duo_predict", *tiny_run, "--output_dir", str(tmp_path / "run"), "--dry_run"]
    options += ["--model_args", "n_positions=32", "--train_batch_size", "64"]  # and none that shrink it
    assert train_ds.main([*options, "--deepspeed_config", "zero3_offload.json", "--size", "gpt2-xl"]) == 0
    out = capsys.readouterr().out
    assert "estimate" in out
    head, *rows = re.findall(r"^ +(?:GPUs .*|[\d,]+ +\d+ +[\d.]+ .*)$", out, flags=re.MULTILINE)
    assert head.split()[:10] == "GPUs sequences activations ZeRO 1 ZeRO 2 ZeRO 3 offload*".split()
    assert [row.split()[0] for row in rows] == ["1", "2", "4", "8", "16", "64", "256", "1,024"]
    assert [row.split()[1] for row in rows] == ["64", "32", "16", "8", "4", "1", "1", "1"]
    total = int(re.search(r"parameters +([\d,]+)", out).group(1).replace(",", ""))
    for row in rows:
        gpus, _, activations, *stages, cpu = (float(x.replace(",", "")) for x in row.split())
        at_step = [(4 + 18 / gpus) * total / GIB, (2 + 20 / gpus) * total / GIB, 20 / gpus * total / GIB]
        held = [(2 + 12 / gpus) * total / GIB] * 2 + [16 / gpus * total / GIB]
        for stage, least, other in zip(stages, at_step, held, strict=False):
            assert stage >= max(least, other + activations) - 0.1
            # beside these: buffers, workspaces, the largest layer, and the gradients that are there at the peak
            assert stage <= max(least, other + activations + 2 * total / GIB) + 2
        assert gpus > 8 or stages[3] < stages[0] - 1
        assert cpu == pytest.approx(1.5 * max(4 * min(gpus, 8), 18 / -(-gpus // 8)) * total / GIB, abs=0.06)
    assert re.search(r"this run, per GPU of 1: [\d.]+ with torch.compile, [\d.]+ without", out)
    assert "fits a card of 80 GB (79.2 GiB): " in out
