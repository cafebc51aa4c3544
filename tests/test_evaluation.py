"""Sliding windows, against one forward pass per token in plain PyTorch."""

import functools
import math

import pytest
import torch
from conftest import random_ids, tiny

from gpt2_variants.evaluation import describe, evaluate, score_new_tokens, window_batches, window_starts

# tokens, block size, stride: no overlap with and without a remainder, a remainder of one token, overlaps, a short text
TEXTS = [(24, 8, 8), (23, 8, 8), (17, 8, 8), (23, 8, 7), (23, 8, 3), (24, 8, 1), (5, 8, 4), (2, 8, 8)]


def context_start(token: int, num_tokens: int, block_size: int, stride: int) -> int:
    """Where the first window begins that holds `token`, the last window being moved back to the end of the text."""
    first = max(0, math.ceil((token - block_size + 1) / stride)) * stride
    return min(first, max(0, num_tokens - block_size))


def slow_figures(model, tokens: list[int], block_size: int, stride: int) -> dict[str, float]:
    """Every token by a forward pass of its own over just what it may see."""
    nll, infill_nll, correct, infill_correct = [], [], [], []
    for i in range(1, len(tokens)):
        start = context_start(i, len(tokens), block_size, stride)
        if start == i:
            continue  # the first of a window that overlaps no other has no context
        seen = torch.tensor([tokens[start : i + 1]])
        with torch.no_grad():
            out = model(seen, labels=seen)
        log_probs = out.logits[0, -2].log_softmax(-1)
        nll.append(-float(log_probs[tokens[i]]))
        correct.append(int(log_probs.argmax()) == tokens[i])
        if "infill_logits" in out:  # of token i-1, whose right neighbour is token i
            log_probs = out.infill_logits[0, -1].log_softmax(-1)
            infill_nll.append(-float(log_probs[tokens[i - 1]]))
            infill_correct.append(int(log_probs.argmax()) == tokens[i - 1])
    figures = {}
    for prefix, losses, hits in (("eval_", nll, correct), ("eval_infill_", infill_nll, infill_correct)):
        if losses:
            loss = sum(losses) / len(losses)
            figures |= {f"{prefix}loss": loss, f"{prefix}perplexity": math.exp(loss)}
            figures[f"{prefix}accuracy"] = sum(hits) / len(hits)
    return figures


@pytest.mark.parametrize("name", ["gpt2", "duo_predict", "drift"])
@pytest.mark.parametrize(("num_tokens", "block_size", "stride"), TEXTS)
def test_figures_equal_one_forward_pass_per_token(name, num_tokens, block_size, stride):
    model = tiny(name, initializer_range=0.3).double()
    tokens = random_ids(1, num_tokens)[0]
    batches = window_batches(tokens.numpy(), block_size, stride, batch_size=3)
    figures = evaluate(functools.partial(score_new_tokens, model.score), batches, "cpu")
    expected = slow_figures(model, tokens.tolist(), block_size, stride)
    assert figures == pytest.approx(expected, abs=1e-10)
    assert ("eval_infill_loss" in figures) == (name == "duo_predict")


@pytest.mark.parametrize("num_tokens", range(2, 40))
@pytest.mark.parametrize("stride", [1, 2, 5, 7, 8])
def test_every_token_is_predicted_once(num_tokens, stride):
    size = min(8, num_tokens)
    predicted = []
    for start, new in window_starts(num_tokens, 8, stride):
        assert 0 <= start <= num_tokens - size
        assert new >= 1
        predicted += range(start + new, start + size)
    unpredicted = {0} if stride < 8 else {i for i in range(0, num_tokens, 8) if i + size <= num_tokens}
    assert predicted == [i for i in range(num_tokens) if i not in unpredicted]


def test_describe_tells_the_streams_apart():
    figures = {"eval_loss": 1.0, "eval_perplexity": 2.718, "eval_accuracy": 0.5}
    assert describe(figures) == ["perplexity 2.72, loss 1.0000, accuracy 0.500"]
    infill = {"eval_infill_loss": 2.0, "eval_infill_perplexity": 7.389, "eval_infill_accuracy": 0.25}
    first, second = describe({**figures, **infill})
    assert first == "perplexity 2.72, loss 1.0000, accuracy 0.500"
    assert second.startswith("infill      perplexity 7.39, loss 2.0000, accuracy 0.250 (each token given its past and")
