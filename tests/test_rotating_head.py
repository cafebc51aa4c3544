"""Rotation against complex numbers, position by position; and frequencies that bf16 must not round."""

import cmath
import copy
import json

import pytest
import torch
from conftest import finish, launch, random_ids, tiny, zero
from torch import nn
from transformers import AutoModelForCausalLM

from gpt2_variants.memory import kept_bytes
from gpt2_variants.models.modeling_rotating_head import RotatingHeadGPT2Config, rotate

VARIANTS = ("rotating_head", "rotating_head_norm", "rotating_head_gp", "rotating_head_gp_norm")


def expected_frequencies(variant, rope, head):
    """Of one head, as Python floats."""
    half = rope.frequencies.shape[1]
    f = [
        10000 ** (-2 * j / (2 * half)) * 10 ** (-head / 3) if "_gp" in variant else rope.frequencies[head, j].item()
        for j in range(half)
    ]
    if variant.endswith("_norm"):
        mean = sum(f) / half
        std = (sum((x - mean) ** 2 for x in f) / half + 1e-5) ** 0.5
        weight, bias = rope.layer_norm.weight.tolist(), rope.layer_norm.bias.tolist()
        f = [(x - mean) / std * w + b for x, w, b in zip(f, weight, bias, strict=True)]
    return f


@pytest.mark.parametrize("first_slot", [0, 17])
@pytest.mark.parametrize("variant", VARIANTS)
def test_queries_and_keys_are_rotated_by_position_times_the_heads_own_frequencies(variant, first_slot):
    attention = tiny(variant).double().transformer.h[1].attn
    if attention.rope.layer_norm is not None:
        for p in attention.rope.layer_norm.parameters():
            nn.init.normal_(p)
    x, y = torch.randn(2, 1, 4, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rotated = attention.place(x, y, first_slot)
    for before, after in zip((x, y), rotated, strict=True):
        for head in range(4):
            frequencies = expected_frequencies(variant, attention.rope, head)
            for s in range(5):
                for j, f in enumerate(frequencies):
                    pair = before[0, head, s, 2 * j : 2 * j + 2].tolist()
                    turned = complex(*pair) * cmath.exp(1j * (first_slot + s) * f)
                    # the fixed frequencies are float32: 1e-7 of an angle of up to 21
                    expected = torch.tensor([turned.real, turned.imag], dtype=torch.float64)
                    torch.testing.assert_close(after[0, head, s, 2 * j : 2 * j + 2], expected, atol=1e-5, rtol=0)


def test_scores_depend_on_distance_only():
    attention = tiny("rotating_head").double().transformer.h[0].attn
    q, k = torch.randn(2, 1, 4, 1, 8, dtype=torch.float64)
    at = lambda x, slot: attention.place(x, x, slot)[0]
    near, far = ((at(q, s + 3) * at(k, s)).sum(-1) for s in (0, 500))
    torch.testing.assert_close(near, far, atol=1e-9, rtol=0)
    other = (at(q, 4) * at(k, 0)).sum(-1)
    assert (near - other).abs().min() > 1e-4


def test_learned_frequencies_start_normal_and_differ_between_heads_and_layers():
    model = tiny("rotating_head", n_embd=512)
    first, second = (block.attn.rope.frequencies for block in model.transformer.h)
    assert first.shape == (4, 64)
    assert first.std().item() == pytest.approx(1.0, rel=0.15)
    assert abs(first.mean().item()) < 0.25
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_learned_parameters_have_the_published_names():
    own = {"transformer.h.0.attn.rope.frequencies"}
    norm = {f"transformer.h.0.attn.rope.layer_norm.{x}" for x in ("weight", "bias")}
    stock = set(tiny("gpt2", n_layer=1).state_dict())
    for variant, expected in zip(VARIANTS, (own, own | norm, set(), norm), strict=True):
        assert set(tiny(variant, n_layer=1).state_dict()) - stock == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rotatinghead": "rl"}, "rotatinghead='rl': one of lr, gp is allowed"),
        ({"use_norm": "yes"}, "use_norm='yes': true or false is allowed"),
        ({"base_frequency": 0.0}, "base_frequency=0.0: a number above 0 is needed"),
        ({"n_embd": 36, "n_head": 4}, "n_embd=36 and n_head=4: a head size of 9; .* an even head size is needed"),
    ],
)
def test_fields_that_do_not_fit_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        RotatingHeadGPT2Config(**fields)


def last_position_error(model, ids):
    """Of bf16 logits against float32 ones at the last position, in units of the float32 logits' spread."""
    with torch.no_grad():
        full = model(ids).logits[:, -1]
        half = copy.deepcopy(model).bfloat16()(ids).logits[:, -1].float()
    return ((half - full).abs().mean() / full.std()).item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_bf16_logits_at_position_1023_are_as_close_to_float32_as_the_baselines(variant):
    """Attention made sharp, so that angles matter: with rounded frequencies the error is many times the baseline's."""
    size = {"n_positions": 1024, "n_embd": 128, "initializer_range": 0.15}
    baseline, model = tiny("gpt2", **size), tiny(variant, **size)
    model.load_state_dict(baseline.state_dict(), strict=False)
    ids = random_ids(4, 1024)
    allowed = 1.5 * last_position_error(baseline, ids)
    assert last_position_error(model, ids) < allowed
    for block in model.transformer.h:  # the control: this test can fail
        for parameter in block.attn.rope.parameters():
            parameter.data += 0.3 * torch.rand_like(parameter)  # not representable in bf16, the initial norm is
    rounded = copy.deepcopy(model)
    for block in rounded.transformer.h:
        block.attn.rope.frequencies.data = block.attn.rope.frequencies.data.bfloat16().float()
        for parameter in block.attn.rope.parameters():
            parameter.data = parameter.data.bfloat16().float()
    with torch.no_grad():
        exact, off = (m(ids).logits[:, -1] for m in (model, rounded))
    assert ((exact - off).abs().mean() / exact.std()).item() > allowed
    assert last_position_error(model, ids) < allowed


@pytest.mark.parametrize("variant", VARIANTS)
def test_loading_in_bf16_leaves_the_frequencies_alone(variant, tmp_path):
    model = tiny(variant)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.transformer.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
    ropes = lambda m: [block.attn.rope for block in m.bfloat16().transformer.h]
    tensors = lambda m: {
        f"{layer}.{name}": tensor
        for layer, rope in enumerate(ropes(m))
        for name, tensor in [*rope.named_parameters(), ("frequencies", rope.frequencies)]
    }
    ours, theirs = tensors(model), tensors(loaded)
    assert ours.keys() == theirs.keys() != set()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(theirs[name], tensor), name


def test_rotation_keeps_the_dtype_and_computes_in_float32():
    x = torch.randn(1, 1, 1, 2, dtype=torch.bfloat16)
    angle = torch.tensor([[[1000.123]]])
    out, _ = rotate(x, x, angle)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, rotate(x.float(), x.float(), angle)[0].bfloat16(), atol=0, rtol=0)


def test_the_rotations_gradients_are_those_of_finite_differences():
    """Also the second ones; of views as the attention makes them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 2 * 8, dtype=torch.float64, generator=generator, requires_grad=True)
    angles = torch.randn(2, 3, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    from_views = lambda x, angles: rotate(*(t.view(2, 3, 2, 4).transpose(1, 2) for t in x.split(8, 2)), angles)
    torch.autograd.gradcheck(from_views, (x, angles))
    torch.autograd.gradgradcheck(from_views, (x, angles))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_attention_is_one_graph_with_the_same_output_and_gradients(dtype):
    attention = tiny("rotating_head").to(dtype).transformer.h[0].attn
    hidden = torch.randn(2, 9, 32, dtype=dtype, generator=torch.Generator().manual_seed(0), requires_grad=True)
    outs = []
    for run in (attention, torch.compile(attention, fullgraph=True, backend="aot_eager")):
        out = run(hidden)[0]
        inputs = (hidden, attention.rope.frequencies, attention.c_attn.weight)
        outs.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    for plain, compiled in zip(*outs, strict=True):
        torch.testing.assert_close(compiled, plain, atol=1e-6 if dtype == torch.float32 else 1e-2, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_kept_for_the_backward_pass_that_gpt2_does_not_keep(variant):
    assert kept_bytes(tiny(variant), 48, False) == kept_bytes(tiny("gpt2"), 48, False)


def test_a_master_value_is_what_counts_and_the_gradient_goes_to_the_parameter():
    rope = tiny("rotating_head").transformer.h[0].attn.rope
    exact = rope.frequencies.detach().clone()
    positions = torch.arange(9)
    with torch.no_grad():
        expected = rope(positions).cos()
    rope(positions).cos().square().sum().backward()
    gradient, rope.frequencies.grad = rope.frequencies.grad, None
    rope.frequencies.data = rope.frequencies.data.bfloat16()
    assert not torch.equal(rope(positions).cos(), expected)
    rope.set_master("frequencies", exact)
    cos = rope(positions).cos()
    assert torch.equal(cos, expected)
    cos.square().sum().backward()
    torch.testing.assert_close(rope.frequencies.grad, gradient.bfloat16(), atol=0, rtol=0)
    assert "frequencies_master" not in rope.state_dict()


ENGINE = """
import json, sys, torch
from gpt2_variants.ending import end_with
from gpt2_variants.training.engine import init_distributed, make_engine
from gpt2_variants.training.masters import float32_state_dict
from gpt2_variants.training.seeds import seed_everything
from gpt2_variants.training.session import prepare
from gpt2_variants.config.command_line import parse
from gpt2_variants.models.modeling_base import Float32Parameters
options, = sys.argv[1:]
data, plan = prepare(parse(json.loads(options)))
config = plan.model_config()
init_distributed()
seed_everything(plan.seed)
initial = plan.spec.model_class._from_config(config).state_dict()
engine, masters = make_engine(plan)

def compare(expected):
    for block in range(config.n_layer):
        for name in ("rope", "rope.layer_norm"):
            module = engine.module.get_submodule(f"transformer.h.{block}.attn.{name}")
            for p, parameter in module.named_parameters(recurse=False):
                wanted = expected[f"transformer.h.{block}.attn.{name}.{p}"].float()
                assert parameter.dtype == torch.bfloat16
                assert torch.equal(getattr(module, p + "_master"), wanted), (block, name, p)
    return wanted

compare(initial)
ids = data.train.__getitems__([0, 1])["input_ids"]
all_reduce, calls = torch.distributed.all_reduce, []
torch.distributed.all_reduce = lambda *args, **kwargs: calls.append(args) or all_reduce(*args, **kwargs)
for _ in range(3):
    loss = engine(input_ids=ids, labels=ids, skip_logits=True).loss
    engine.backward(loss)
    engine.step()
    calls.clear()
    masters.refresh()
if plan.zero_stage in (1, 2):
    assert len(calls) == 1, "the frequencies of all layers travel together"
weights = float32_state_dict(engine)
if engine.global_rank == 0:
    last = compare(weights)
    assert not torch.equal(last, last.bfloat16().float()), "three steps of Adam end between bf16 values"
    key = "transformer.h.0.attn.rope.frequencies"
    assert not torch.equal(weights[key], initial[key])
end_with(lambda: 0)
"""


@pytest.mark.parametrize(
    ("stage", "ranks"),
    [(0, 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, 1), (2, 2), (3, 2)])],
)
def test_the_engines_bf16_cast_does_not_reach_the_frequencies(stage, ranks, tiny_run, ds_json, tmp_path):
    arguments = ["--variant", "rotating_head_norm", *tiny_run, "--output_dir", str(tmp_path / "run")]
    arguments += ["--deepspeed_config", ds_json(zero_optimization=zero(stage)), "--train_batch_size", str(2 * ranks)]
    results = finish(launch(ranks, [json.dumps(arguments)], program=("-c", ENGINE)))
    assert [code for code, _ in results] == [0] * ranks, results
