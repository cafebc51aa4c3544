"""The figures and their trackers."""

import json
import math
import time

import pytest
import torch
from conftest import of_each_family
from torch.utils.flop_counter import FlopCounterMode

from gpt2_variants import measuring
from gpt2_variants.evaluation import evaluate
from gpt2_variants.models.loss_head import TokenScores
from gpt2_variants.registry import VARIANTS
from gpt2_variants.trackers.jsonl import JsonlTracker, read_metrics

aten = torch.ops.aten


def test_flops_per_token_by_hand():
    # 10 parameters, 2 layers, width 4, 8 tokens: 6 * 10 + 12 * 2 * 4 * 8 per position
    assert measuring.flops_per_token(10, 2, 4, 8, positions=8) == 60 + 768
    assert measuring.flops_per_token(10, 2, 4, 8, positions=15) == (60 + 768) * 15 / 8
    # the baseline at the recipe: 2.13 + 0.30 GFLOPs
    assert measuring.flops_per_token(354_823_168, 24, 1024, 1024, 1024) == pytest.approx(2.431e9, rel=1e-3)


@pytest.mark.parametrize("name", of_each_family(VARIANTS))
def test_flops_are_those_of_the_products_that_a_training_step_computes(name):
    """At GPT-2 Medium's shape, by PyTorch's counter over one forward and backward pass on the meta device.

    Of the formula those parameters are left out that are not multiplied with: positions, biases, norms, gates.
    Attention is not counted, since its kernels count their products in different ways.
    """
    variant, tokens = VARIANTS[name], 128
    model = variant.on_meta(variant.make_config("gpt2-medium", 50_257, tokens))
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    shape = {"duo_predict": {}}.get(name, {"attention_mask": torch.ones(1, 1, tokens, tokens, device="meta").bool()})
    with FlopCounterMode(display=False) as counter:
        outputs = model.encode(input_ids=ids, use_cache=False, **shape)
        hidden = outputs.last_hidden_state
        if name == "duo_predict":
            hidden = torch.cat([hidden, outputs.infill_hidden_state], dim=1)
        model.lm_head(hidden).sum().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if op in (aten.mm, aten.addmm))
    applied = measuring.applied_parameters(model)
    looked_up = sum(p.numel() for p in model.parameters() if p.ndim < 2) + model.transformer.wpe.weight.numel()
    if name == "duo_predict":
        assert model.positions(tokens) == 2 * tokens - 1
    assert counted == pytest.approx(6 * (applied - looked_up) * model.positions(tokens), rel=2e-3)


def test_a_matrix_that_all_pairs_share_counts_for_each_of_them():
    def flops(name):
        variant = VARIANTS[name]
        model = variant.on_meta(variant.make_config("gpt2-medium", 50_257, 1024))
        return measuring.flops_per_token(measuring.applied_parameters(model), 24, 1024, 1024, 1024)

    # 12 pairs, a matrix of 2 x 1024 by 1024 with its bias: 12 x 2,098,176 parameters beside GPT-2's
    by_hand = 6 * (354_823_168 + 12 * 2_098_176) + 12 * 24 * 1024 * 1024
    assert flops("parallel_concat") == by_hand
    assert flops("parallel_concat") / flops("gpt2") == pytest.approx(1.062, abs=5e-4)


def test_peak_flops_by_device_name():
    assert measuring.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert measuring.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert measuring.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert measuring.peak_flops("Some Other Card") is None


def test_the_stopwatch_counts_what_is_between_start_and_stop():
    watch = measuring.Stopwatch(elapsed=100.0)
    time.sleep(0.02)
    assert watch.elapsed == 100.0
    watch.start()
    time.sleep(0.02)
    watch.stop()
    once = watch.elapsed
    assert once >= 100.02
    time.sleep(0.02)
    assert watch.elapsed == once


def test_jsonl_goes_on_after_a_kill_with_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonlTracker(path, resume_step=0)
    for step in range(1, 6):
        tracker.log({"step": step, "loss": step / 2})
    tracker.close()
    path.write_text(path.read_text() + '{"step": 6, "lo')
    tracker = JsonlTracker(path, resume_step=3)
    tracker.log({"step": 4, "loss": 9.0})
    tracker.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 9.0)]


def test_evaluation_is_a_mean_over_predictions_not_over_batches():
    def score(ids, labels):
        valid = labels != -100
        nll = torch.where(valid, ids.float(), 0.0)
        return {"next_token": TokenScores(nll, ids == 1, valid), "infill": TokenScores(nll * 2, ids == 3, valid)}

    ids = torch.tensor([[1, 2, 3], [1, 1, 5]])
    batches = [
        {"input_ids": ids, "labels": torch.tensor([[1, 2, 3], [-100, -100, -100]])},
        {"input_ids": ids[1:], "labels": torch.tensor([[1, -100, 5]])},
    ]
    figures = evaluate(score, batches, "cpu")
    losses = [1, 2, 3, 1, 5]
    assert figures["eval_loss"] == pytest.approx(sum(losses) / 5)
    assert figures["eval_perplexity"] == pytest.approx(math.exp(sum(losses) / 5))
    assert figures["eval_accuracy"] == pytest.approx(2 / 5)
    assert figures["eval_infill_loss"] == pytest.approx(2 * sum(losses) / 5)
    assert figures["eval_infill_accuracy"] == pytest.approx(1 / 5)
    assert json.dumps(figures)
