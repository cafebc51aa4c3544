"""Parallel pairs against a plain loop over the blocks."""

import pytest
import torch
from conftest import random_ids, tiny

from gpt2_variants.models.modeling_parallel import ParallelGPT2Config

MERGES = {
    "parallel": lambda _, left, right: (left + right) / 2,
    "parallel_add": lambda _, left, right: left + right,
    "parallel_concat": lambda m, left, right: torch.cat([left, right], -1) @ m.bottleneck.weight.T + m.bottleneck.bias,
}


@pytest.mark.parametrize("variant", MERGES)
def test_both_blocks_of_a_pair_read_the_same_input(variant):
    model, ids = tiny(variant, n_layer=6).double(), random_ids(2, 9)
    inner = model.transformer
    blocks = list(inner.h.children())
    with torch.no_grad():
        hidden = inner.wte(ids) + inner.wpe(torch.arange(9))
        for i in (0, 2, 4):
            hidden = MERGES[variant](inner, blocks[i](hidden), blocks[i + 1](hidden))
        expected = inner.ln_f(hidden) @ inner.wte.weight.T
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-12, rtol=0)


def test_the_names_are_gpt2s_and_one_bottleneck():
    names = [n for n, _ in tiny("parallel_concat", n_layer=4).named_parameters()]
    stock = [n for n, _ in tiny("gpt2", n_layer=4).named_parameters()]
    assert set(names) - set(stock) == {"transformer.bottleneck.weight", "transformer.bottleneck.bias"}
    assert set(stock) <= set(names)


def test_an_odd_number_of_layers_and_an_unknown_method_are_errors():
    with pytest.raises(ValueError, match="n_layer=3: layers are taken in pairs; an even number is needed"):
        ParallelGPT2Config(n_layer=3)
    with pytest.raises(ValueError, match="bottleneck_method='sum': one of mean, add, concat is allowed"):
        ParallelGPT2Config(bottleneck_method="sum")
