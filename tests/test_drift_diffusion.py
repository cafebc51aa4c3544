"""Drift and diffusion against the formula, head by head and channel by channel, and the noise's promises."""

import math

import pytest
import torch
from conftest import random_ids, tiny

from gpt2_variants.memory import kept_bytes
from gpt2_variants.models.modeling_drift_diffusion import DDGPT2Config

PARTS = {"drift": (True, False), "diffusion": (False, True), "drift_diffusion": (True, True)}
STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def attention_output(attention, hidden):
    """What reaches c_proj, as (B, S, H, D)."""
    seen = []
    hook = attention.c_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        attention(hidden)
    hook.remove()
    return seen[0].view(*hidden.shape[:2], attention.num_heads, attention.head_dim)


@pytest.mark.parametrize("baseline_each_head", [True, False])
@pytest.mark.parametrize("variant", ["drift", "drift_diffusion"])
def test_drift_is_the_formula(variant, baseline_each_head):
    drifted = tiny(variant, baseline_each_head=baseline_each_head).double().transformer.h[0].attn
    plain = tiny("gpt2").double().transformer.h[0].attn
    plain.load_state_dict(drifted.state_dict(), strict=False)
    assert (drifted.baseline is None) == (not baseline_each_head)
    hidden = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, out = attention_output(plain, hidden), attention_output(drifted, hidden)
    for head in range(4):
        for channel in range(8):
            gate = 1 / (1 + math.exp(-drifted.drift_param[head, channel].item()))
            base = drifted.baseline[head, channel].item() if baseline_each_head else 0.0
            x = a[:, :, head, channel]
            torch.testing.assert_close(out[:, :, head, channel], x + gate * (x - base), atol=1e-12, rtol=0)


def test_for_the_backward_pass_the_drift_keeps_what_c_proj_reads_and_diffusion_its_noise():
    """GPT-2's c_proj reads the attention's output itself, which the attention keeps for its own backward pass."""
    kept = {variant: kept_bytes(tiny(variant), 48, False) for variant in ("gpt2", *PARTS)}
    activation = 2 * 48 * 32 * 2  # layers, tokens, width, bytes in bf16
    assert kept["drift"] == kept["gpt2"] + activation
    assert kept["diffusion"] == kept["drift_diffusion"] == kept["gpt2"] + 2 * activation


@pytest.mark.parametrize("variant", ["diffusion", "drift_diffusion"])
def test_noise_has_the_learned_scale_per_head_and_channel(variant):
    attention = tiny(variant, n_positions=2048).double().transformer.h[0].attn
    hidden = torch.randn(4, 1000, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    still = attention_output(attention, hidden)
    attention.train()
    attention.attn_dropout.p = attention.resid_dropout.p = 0.0
    torch.manual_seed(0)
    noise = attention_output(attention, hidden) - still
    scale = attention.diffusion_param.abs()
    torch.testing.assert_close(noise.std(dim=(0, 1)) / scale, torch.ones_like(scale), atol=0.06, rtol=0)
    assert (noise.mean(dim=(0, 1)) / scale).abs().max() < 0.08  # 5 standard errors of 4,000 draws
    assert not torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("variant", ["diffusion", "drift_diffusion"])
def test_noise_in_training_only_fresh_each_call_the_same_with_the_same_seed(variant):
    model, ids = tiny(variant, **STILL), random_ids()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        torch.manual_seed(1)
        first, second = model(ids).logits, model(ids).logits
        torch.manual_seed(1)
        again = model(ids).logits
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


@pytest.mark.parametrize("variant", ["diffusion", "drift_diffusion"])
def test_every_backend_draws_the_same_noise(variant):
    outs = []
    for backend in ("sdpa", "eager"):
        model = tiny(variant, attn_implementation=backend, **STILL).train()
        torch.manual_seed(1)
        outs.append(model(random_ids()).logits)
    torch.testing.assert_close(*outs, atol=1e-5, rtol=0)


def test_initial_parameters():
    attention = tiny("drift_diffusion", n_embd=256).transformer.h[1].attn
    for parameter, std in ((attention.drift_param, 1), (attention.diffusion_param, 1), (attention.baseline, 1e-3)):
        assert parameter.shape == (4, 64)
        assert parameter.std().item() == pytest.approx(std, rel=0.2)


def test_parameters_are_those_of_the_parts():
    for variant, (drift, diffusion) in PARTS.items():
        attention = tiny(variant).transformer.h[0].attn
        assert (attention.drift_param is not None) == (attention.baseline is not None) == drift
        assert (attention.diffusion_param is not None) == diffusion


def test_a_part_that_is_not_a_bool_is_an_error():
    with pytest.raises(ValueError, match="apply_drift='yes': true or false is allowed"):
        DDGPT2Config(apply_drift="yes")
