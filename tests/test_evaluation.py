"""Sliding windows, against one forward pass per token in plain PyTorch."""

import functools
import math

import pytest
import torch
from conftest import random_ids, tiny

from gpt2_variants.evaluation import (
    describe,
    evaluate,
    last_places,
    score_new_tokens,
    streams_in,
    window_batches,
    window_starts,
)
from gpt2_variants.models.modeling_base import VariantLMHeadModel
from gpt2_variants.models.streams import Stream

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


def by_windows(model, num_tokens: int, block_size: int):
    """What `evaluate` scores the windows by."""
    return functools.partial(score_new_tokens, model.score, last_places(model, min(num_tokens, block_size)))


class Skips(VariantLMHeadModel):
    """GPT-2 whose states also predict the token after the next."""

    streams = (Stream("skip", "Two ahead", "Given one token less."),)

    def streams_of(self, outputs, labels, attention_mask=None, shift_labels=None):
        streams = super().streams_of(outputs, labels, attention_mask, shift_labels)
        hidden, targets = streams["next_token"]
        return {**streams, "skip": (hidden[:, :-1], targets[:, 1:])}


@pytest.mark.parametrize(("num_tokens", "block_size", "stride"), TEXTS)
def test_every_token_that_a_stream_can_predict_counts_once(num_tokens, block_size, stride):
    """Of a stream that predicts the token after the next: every token with two before it in its window."""
    model = Skips(tiny("gpt2", initializer_range=0.3).config).double().eval()
    tokens = random_ids(1, num_tokens)[0]
    batches = window_batches(tokens.numpy(), block_size, stride, batch_size=3)
    figures = evaluate(by_windows(model, num_tokens, block_size), batches, "cpu")
    losses = []
    for i in range(2, num_tokens):
        start = context_start(i, num_tokens, block_size, stride)
        if i - start >= 2:
            with torch.no_grad():
                logits = model(tokens[None, start : i - 1]).logits
            losses.append(-float(logits[0, -1].log_softmax(-1)[tokens[i]]))
    assert losses or "eval_skip_loss" not in figures
    if losses:
        assert figures["eval_skip_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-10)


@pytest.mark.parametrize("name", ["gpt2", "duo_predict", "drift"])
@pytest.mark.parametrize(("num_tokens", "block_size", "stride"), TEXTS)
def test_figures_equal_one_forward_pass_per_token(name, num_tokens, block_size, stride):
    model = tiny(name, initializer_range=0.3).double()
    tokens = random_ids(1, num_tokens)[0]
    batches = window_batches(tokens.numpy(), block_size, stride, batch_size=3)
    figures = evaluate(by_windows(model, num_tokens, block_size), batches, "cpu")
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
    skip = {"eval_skip_loss": 2.0, "eval_skip_perplexity": 7.389, "eval_skip_accuracy": 0.25}
    first, second = describe({**figures, **skip}, [Stream("skip", "Two ahead", "Given one token less.")])
    assert first == "perplexity 2.72, loss 1.0000, accuracy 0.500"
    assert second == "skip        perplexity 7.39, loss 2.0000, accuracy 0.250. Given one token less."


def test_streams_are_those_that_figures_tell_of_declared_or_not():
    declared = [Stream("a", "A", "x"), Stream("b", "B", "y")]
    figures = {"eval_loss": 1.0, "eval_old_one_loss": 2.0, "eval_b_loss": 3.0, "eval_b_accuracy": 0.1, "step": 3}
    found = streams_in(figures, declared)
    assert found[0] == declared[1]
    (other,) = found[1:]
    assert (other.name, other.title) == ("old_one", "old_one")
    assert "not comparable" in other.caveat
    assert streams_in({"eval_loss": 1.0, "loss": 2.0, "next_token_loss": 2.0}, declared) == []
