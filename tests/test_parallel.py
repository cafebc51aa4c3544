"""Parallel pairs against a plain loop over the blocks."""

import pytest
import torch
from conftest import random_ids, tiny
from transformers import StaticCache

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


def test_h_is_a_list_like_any_other():
    model, ids = tiny("parallel_concat", n_layer=6), random_ids()
    blocks = model.transformer.h
    assert type(blocks) is torch.nn.ModuleList
    assert len(blocks) == len(list(blocks)) == 6
    assert [type(block).__name__ for block in blocks] == ["GPT2Block"] * 6
    assert list(blocks[:2]) == [blocks[0], blocks[1]]
    for block in blocks[:4]:
        block.requires_grad_(False)
    model(ids, labels=ids).loss.backward()
    assert {int(n.split(".")[2]) for n, p in model.named_parameters() if ".h." in n and p.grad is not None} == {4, 5}


def test_fewer_blocks_are_fewer_pairs():
    model, shorter, ids = tiny("parallel", n_layer=6), tiny("parallel", n_layer=2), random_ids()
    shorter.load_state_dict({k: v for k, v in model.state_dict().items() if k in shorter.state_dict()})
    model.transformer.h = model.transformer.h[:2]
    assert torch.equal(model(ids).logits, shorter(ids).logits)
    model.transformer.h = model.transformer.h[:1]
    with pytest.raises(ValueError, match="1 blocks in h: they are taken in pairs"):
        model(ids)


@pytest.mark.parametrize("variant", MERGES)
def test_hidden_states_are_what_each_pair_reads_and_the_final_state(variant):
    model, ids = tiny(variant, n_layer=6), random_ids(2, 9)
    read = []
    for block in model.transformer.h[::2]:
        block.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_pairs + 1 == 4
    for state, wanted in zip(out.hidden_states, read, strict=False):
        assert torch.equal(state, wanted)
    assert torch.equal(out.hidden_states[-1], model.transformer(ids).last_hidden_state)
    assert not torch.equal(out.hidden_states[1], out.hidden_states[2])


def test_a_step_with_a_static_cache_is_one_graph_for_torch_compile():
    model, ids = tiny("parallel_concat", n_layer=4), random_ids()
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=24)
        model(ids[:, :-1], cache=cache)
        last = step(ids[:, -1:], cache=cache).logits
        torch.testing.assert_close(last, model(ids).logits[:, -1:], atol=1e-5, rtol=0)
