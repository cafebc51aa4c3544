"""Parallel pairs against a plain loop over the blocks."""

import copy

import pytest
import torch
from conftest import random_ids, tiny
from transformers import StaticCache

from gpt2_variants.models.modeling_base import CACHE_NAME
from gpt2_variants.models.modeling_parallel import ParallelGPT2Config
from gpt2_variants.models.wide_pair import WidePair, can_be_wide

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


GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
GREEDY |= {"return_dict_in_generate": True, "output_logits": True}
PADDED = torch.ones(2, 6, dtype=torch.long).index_fill(1, torch.arange(2), 0)
PADDED[1] = 1


@pytest.fixture
def wide_steps(monkeypatch):
    """The pairs that were run as one computation, in order."""
    steps, run = [], WidePair.__call__
    monkeypatch.setattr(WidePair, "__call__", lambda pair, *a, **k: steps.append(pair) or run(pair, *a, **k))
    return steps


def random_model(variant: str, **fields):
    """With norms and biases that are not 1 and 0."""
    model = tiny(variant, **{"n_layer": 4, **fields})
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def generate(model, **kwargs):
    """Tokens (2, 14) and logits (8, 2, V), of a batch whose first row is padded on the left."""
    out = model.generate(random_ids(2, 6), attention_mask=PADDED, **{**GREEDY, **kwargs})
    return out.sequences, torch.stack(out.logits)


def assert_generates_what_it_does_uncached(model, atol=1e-5, **kwargs):
    """Without the cache each step takes the whole sequence, and the pairs' blocks run one after the other."""
    for cached, uncached in zip(generate(model, **kwargs), generate(model, use_cache=False), strict=True):
        torch.testing.assert_close(cached, uncached, atol=atol, rtol=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("variant", MERGES)
def test_generated_tokens_are_computed_by_wide_pairs_with_the_same_logits(variant, dtype, atol, attention, wide_steps):
    model = random_model(variant, attn_implementation=attention).to(dtype)
    assert_generates_what_it_does_uncached(model, atol)
    assert len(wide_steps) == 2 * 7, "two pairs, and 8 tokens of which the prompt gives the first"
    assert_generates_what_it_does_uncached(model, atol, cache_implementation="static")
    assert len(wide_steps) == 2 * 14


@pytest.mark.parametrize("static", [False, True])
def test_a_cache_does_not_tell_whether_pairs_were_wide(static, wide_steps):
    model, ids = random_model("parallel").double(), random_ids()
    new_cache = lambda: StaticCache(config=model.config, max_cache_len=24) if static else None
    with torch.no_grad():
        caches = [model(ids[:, :20], use_cache=True, cache=new_cache())[CACHE_NAME] for _ in range(2)]
        model(ids[:, 20:21], cache=caches[0])
        with model.transformer.h.widened():
            model(ids[:, 20:21], cache=caches[1])
        assert len(wide_steps) == 2
        for plain, wide in zip(caches[0].layers, caches[1].layers, strict=True):
            torch.testing.assert_close(wide.keys, plain.keys, atol=1e-12, rtol=0)
            torch.testing.assert_close(wide.values, plain.values, atol=1e-12, rtol=0)
        last = model(ids[:, 21:], cache=caches[1]).logits
        torch.testing.assert_close(last, model(ids).logits[:, 21:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("how", ["in place", "behind autograd's back", "loaded", "another dtype"])
def test_generation_follows_the_weights(how, wide_steps):
    model = random_model("parallel_concat")
    before = generate(model)[1]
    weight = model.transformer.h[2].mlp.c_fc.weight
    if how == "in place":
        torch.nn.init.normal_(weight)
    elif how == "behind autograd's back":  # as DeepSpeed writes them
        weight.data.copy_(torch.randn_like(weight))
    elif how == "loaded":
        model.load_state_dict({k: 1.5 * v for k, v in model.state_dict().items()})
    else:
        model.double()
    assert_generates_what_it_does_uncached(model)
    assert how == "another dtype" or (generate(model)[1] - before).abs().max() > 0.01
    assert wide_steps


def test_generation_leaves_nothing_behind(tmp_path):
    model = random_model("parallel")
    names, attributes = set(model.state_dict()), set(vars(model.transformer.h))
    generate(model)
    assert not model.transformer.h._wide
    with pytest.raises(ValueError, match="no_such_argument"):
        model.generate(random_ids(), no_such_argument=1)
    assert not model.transformer.h._wide
    assert set(model.state_dict()) == names
    assert set(vars(model.transformer.h)) == attributes
    model.save_pretrained(tmp_path)
    for other in (copy.deepcopy(model), type(model).from_pretrained(tmp_path)):
        assert set(other.state_dict()) == names
        assert torch.equal(generate(other)[1], generate(model)[1])


def test_hidden_states_are_those_of_every_block(wide_steps):
    model = random_model("parallel")
    states = [
        model.generate(random_ids(2, 6), **GREEDY, output_hidden_states=True, use_cache=use_cache).hidden_states
        for use_cache in (True, False)
    ]
    assert not wide_steps
    for cached, uncached in zip(*states, strict=True):
        assert len(cached) == len(uncached) == 5
        for a, b in zip(cached, uncached, strict=True):
            torch.testing.assert_close(a[:, -1], b[:, -1], atol=1e-5, rtol=0)


def test_blocks_that_are_not_plain_run_one_after_the_other():
    left, right = (tiny("parallel").transformer.h[i] for i in (0, 1))
    assert can_be_wide(left, right)
    altered = [copy.deepcopy(left) for _ in range(6)]
    altered[0].train()
    altered[1].attn.c_proj.weight.ds_id = 1  # partitioned by ZeRO stage 3
    altered[2].double()
    altered[3].to("meta")
    altered[4].mlp.c_fc = torch.nn.Linear(32, 128)  # quantised layers and adapters are of other classes
    altered[5].attn.c_attn.forward = lambda x: x  # accelerate's offloading
    assert not [i for i, other in enumerate(altered) if can_be_wide(left, other) or can_be_wide(other, right)]
    model = random_model("parallel")
    model.transformer.h[0].mlp.c_fc = torch.nn.Linear(32, 128)
    assert_generates_what_it_does_uncached(model)


def test_hooks_in_the_blocks_are_called(wide_steps):
    model, calls = random_model("parallel"), []
    model.transformer.h[0].mlp.register_forward_hook(lambda *_: calls.append(0))
    generate(model)
    assert len(calls) == 8
    assert len(wide_steps) == 7, "the other pair is not concerned"


def test_decoding_is_one_graph_for_torch_compile():
    model, ids = random_model("parallel_concat"), random_ids()
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad(), model.transformer.h.widened():
        cache = StaticCache(config=model.config, max_cache_len=24)
        model(ids[:, :-1], cache=cache)
        last = step(ids[:, -1:], cache=cache).logits
        torch.testing.assert_close(last, model(ids).logits[:, -1:], atol=1e-5, rtol=0)
