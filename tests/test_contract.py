"""What the package's own variants promise beside the contract (test_check.py): GPT-2's start, counts, golden logits."""

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import GOLDEN, of_each_family, random_ids, tiny
from transformers import AutoModelForCausalLM

from gpt2_variants import VARIANTS
from gpt2_variants.models.modeling_base import CACHE_NAME
from gpt2_variants.training.engine import allow_recompilations


def stream_log_probs(model, ids):
    """Stream -> ((B, N, V) log-probabilities, (B, N) the position each predicts, (B, N) what it may not see after)."""
    streams = model.prediction_streams(ids, torch.arange(ids.shape[1]).expand_as(ids))
    return {name: (model.lm_head(hidden).log_softmax(-1), positions) for name, (hidden, positions) in streams.items()}


def may_see(stream: str, target: int, num_tokens: int) -> set[int]:
    """The token positions a prediction of position `target` may depend on."""
    past = set(range(target))
    return past if stream == "next_token" else past | ({target + 1} & set(range(num_tokens)))


def test_no_prediction_depends_on_what_it_may_not_see_by_gradient(variant):
    model = tiny(variant, n_layer=4).double()
    ids = random_ids(1, 10)
    embedded = []
    hook = model.transformer.wte.register_forward_hook(
        lambda _, args, out: embedded.append(out.requires_grad_()) or out if args[0].shape == ids.shape else None
    )
    model.requires_grad_(False)
    log_probs = stream_log_probs(model, ids)
    hook.remove()
    for stream, (values, positions) in log_probs.items():
        for n in range(values.shape[1]):
            target = int(positions[0, n])
            (gradient,) = torch.autograd.grad(values[0, n].square().sum(), embedded[-1], retain_graph=True)
            depends = set(gradient[0].abs().sum(-1).nonzero().flatten().tolist())
            allowed = may_see(stream, target, ids.shape[1])
            assert depends == allowed, f"{stream} of token {target}: depends on {depends}, may see {allowed}"


def test_it_prints_its_blocks(variant):
    assert "(c_attn): Conv1D" in repr(tiny(variant))


def test_initialisation_is_gpt2s(variant):
    model = tiny(variant, n_layer=4, n_embd=128)
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(2 * 4), rel=0.05), name
        elif name.endswith(("wte.weight", "wpe.weight", "c_attn.weight", "c_fc.weight")):
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        elif ".ln_" in name and name.endswith("weight"):
            assert (p == 1).all(), name
        elif name.endswith(("c_attn.bias", "c_proj.bias", "c_fc.bias")):
            assert (p == 0).all(), name


@pytest.mark.usefixtures("poisoned")
def test_save_and_load_gives_the_same_logits_in_poisoned_memory(variant, tmp_path):
    model, ids = tiny(variant), random_ids()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


# as published, or by the formulae of gpt2_variants/models/MATHEMATICS.md
PARAMETERS = {
    "gpt2": 354_823_168,
    "drift": 354_872_320,
    "diffusion": 354_847_744,
    "drift_diffusion": 354_896_896,
    "parallel": 354_823_168,
    "parallel_add": 354_823_168,
    "parallel_concat": 356_921_344,
    "duo_predict": 354_299_904,
    "rotating_head": 354_835_456,  # the formula's; the published one is that of rotating_head_norm
    "rotating_head_norm": 354_836_992,
    "rotating_head_gp": 354_823_168,
    "rotating_head_gp_norm": 354_824_704,
}
# beside GPT-2's: d and b, g, all three, each (H, D) a layer; the bottleneck's matrix and bias; the frequencies (H, D/2)
# and the weight and bias (D/2) of their norm
OWN_PARAMETERS = {
    "drift": 24 * 2 * 1024,
    "diffusion": 24 * 1024,
    "drift_diffusion": 24 * 3 * 1024,
    "parallel_concat": 2 * 1024 * 1024 + 1024,
    "rotating_head": 24 * 512,
    "rotating_head_norm": 24 * (512 + 64),
    "rotating_head_gp_norm": 24 * 64,
}


def test_parameter_count_equals_the_published_one_and_the_formula(variant):
    record = VARIANTS[variant]
    with torch.device("meta"):
        model = record.model_class(record.make_config("gpt2-medium", 50257, record.block_size))
    v, s, e, layers = 50257 + record.extra_vocabulary, record.block_size, 1024, 24
    gpt2 = (v + s) * e + layers * (12 * e * e + 13 * e) + 2 * e
    assert model.num_parameters() == gpt2 + OWN_PARAMETERS.get(variant, 0), "tell its own parameters in OWN_PARAMETERS"
    if variant in PARAMETERS:
        assert model.num_parameters() == PARAMETERS[variant]
    assert VARIANTS[variant].medium_parameters in (None, VARIANTS[variant].num_parameters())


def test_sdpa_and_eager_agree(variant):
    ids = random_ids()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for attention_mask in (None, mask):
        with torch.no_grad():
            outs = [
                tiny(variant, attn_implementation=a)(ids, attention_mask=attention_mask, labels=ids)
                for a in ("sdpa", "eager")
            ]
        seen = slice(None) if attention_mask is None else mask.bool()
        torch.testing.assert_close(outs[0].logits[seen], outs[1].logits[seen], atol=1e-5, rtol=0)


def test_skip_logits_gives_the_loss_and_gradients_of_the_plain_head(variant):
    model, ids = tiny(variant), random_ids()
    labels = ids.clone()
    labels[0, 3:9] = -100
    grads = []
    for skip in (False, True):
        model.zero_grad()
        loss = model(ids, labels=labels, skip_logits=skip).loss
        loss.backward()
        grads.append((loss, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(grads[0][0], grads[1][0], atol=1e-6, rtol=0)
    for name, gradient in grads[0][1].items():
        torch.testing.assert_close(gradient, grads[1][1][name], atol=1e-6, rtol=1e-5, msg=name)


def test_token_scores_are_those_of_the_logits(variant):
    model, ids = tiny(variant), random_ids()
    labels = ids.clone()
    labels[1, 7] = -100
    with torch.no_grad():
        scores = model.score(ids, labels)["next_token"]
        log_probs = model(ids).logits.double().log_softmax(-1)
    for b in range(2):
        for k in range(1, ids.shape[1]):
            ignored = bool(labels[b, k] == -100)
            assert bool(scores.valid[b, k - 1]) != ignored
            expected = 0.0 if ignored else -log_probs[b, k - 1, labels[b, k]].item()
            assert scores.nll[b, k - 1].item() == pytest.approx(expected, abs=1e-5)
            assert bool(scores.correct[b, k - 1]) == (log_probs[b, k - 1].argmax().item() == labels[b, k].item())


def test_generation_forms_the_logits_of_the_last_token_only(variant):
    model, shapes = tiny(variant), []
    model.lm_head.register_forward_hook(lambda module, args, out: shapes.append(tuple(out.shape)))
    model.generate(random_ids(2, 9), max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert shapes == [(2, 1, model.config.vocab_size)] * 3


@pytest.mark.parametrize("name", ["cache", "past_key_values", None])
def test_a_cache_is_taken_by_its_new_and_its_older_name_and_in_its_place(variant, name):
    """transformers 5.24 renamed it; both names work here whatever the version, without a warning."""
    model, ids = tiny(variant), random_ids(2, 12)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = model(ids).logits
        cache = model(ids[:, :9], use_cache=True)[CACHE_NAME]
        rest = model(ids[:, 9:], cache) if name is None else model(ids[:, 9:], **{name: cache})
    torch.testing.assert_close(rest.logits, whole[:, 9:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("folder", sorted(p.name for p in GOLDEN.iterdir()))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_golden_checkpoints_give_the_published_logits(folder, attention):
    unrecorded = {"use_norm": True} if folder.endswith("_norm") else {}  # the published config does not say
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / folder, attn_implementation=attention, **unrecorded).eval()
    io = np.load(GOLDEN / folder / "io.npz")
    with torch.no_grad():
        logits = model(torch.tensor(io["input_ids"])).logits
    np.testing.assert_allclose(logits.numpy(), io["logits"], atol=1e-5, rtol=0)


def test_import_needs_neither_deepspeed_nor_wandb():
    code = "import gpt2_variants, sys; print(sorted({'deepspeed', 'wandb'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.slow
def test_48_layers_of_which_each_scales_its_attention_compile_within_the_limit(monkeypatch):
    compile_function, graphs = torch.compile, []
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, options=None, **others: compile_function(
            f, **others, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True
        ),
    )
    limits = ("recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit")
    # monkeypatch would delete them at its end: they are no attributes of the module itself
    with torch._dynamo.config.patch({name: getattr(torch._dynamo.config, name) for name in limits}):
        torch._dynamo.reset()
        model = tiny("gpt2", n_layer=48, scale_attn_by_inverse_layer_idx=True)
        allow_recompilations(48)
        model.compile_parts(together=1)  # as under gradient checkpointing
        for batch in (2, 1):  # full, and short
            ids = random_ids(batch, 24)
            model(ids, labels=ids, skip_logits=True)
    assert len(graphs) > 64


@pytest.mark.parametrize("variant", of_each_family(VARIANTS))
def test_compiled_blocks_have_no_graph_breaks_and_give_the_same_gradients(variant, monkeypatch):
    """By `aot_eager`, which traces as inductor does and needs no compiler: blocks and loss, as training does it."""
    compile_function, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, options=None, **others: compile_function(f, **others, backend=backend, fullgraph=True),
    )
    torch._dynamo.reset()
    model, ids = tiny(variant, n_layer=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train(), random_ids(2, 24)

    def loss_and_gradients():
        torch.manual_seed(0)
        model.zero_grad()
        loss = model(ids, labels=ids, skip_logits=True).loss
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    wanted, gradients = loss_and_gradients()
    model.compile_parts()
    loss, compiled = loss_and_gradients()
    noisy = getattr(model.config, "apply_diffusion", False)  # a compiled graph draws other noise
    torch.testing.assert_close(loss, wanted, atol=0.05 if noisy else 1e-5, rtol=0)
    for name, gradient in gradients.items():
        assert compiled[name].isfinite().all()
        if not noisy:
            torch.testing.assert_close(compiled[name], gradient, atol=1e-5, rtol=1e-4)
    first_layer_differs = variant == "duo_predict"  # its leak-free pattern
    assert len(graphs) <= 2 + first_layer_differs
    assert list(model.state_dict()) == list(tiny(variant, n_layer=4).state_dict())
