"""The baseline is stock GPT2LMHeadModel: bit for bit in evaluation, but for one activation's rounding in training."""

import torch
from conftest import GOLDEN, random_ids
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.activations import NewGELUActivation

from gpt2_variants.models.activation import TrainedNewGELU
from gpt2_variants.models.modeling_gpt2_baseline import GPT2BaselineLMHeadModel

CONFIG = {
    "n_layer": 3,
    "n_embd": 32,
    "n_head": 4,
    "vocab_size": 67,
    "n_positions": 48,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def pair():
    models = []
    for cls in (GPT2LMHeadModel, GPT2BaselineLMHeadModel):
        torch.manual_seed(0)
        models.append(cls(GPT2Config(**CONFIG)))
    return models


def test_initial_weights_are_the_same():
    stock, ours = pair()
    assert list(stock.state_dict()) == list(ours.state_dict())
    for name, weight in stock.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name]), name


def results(training, dtype=torch.float32):
    """Logits, loss and gradients of stock GPT-2, and of ours."""
    ids, found = random_ids(), []
    for model in pair():
        model.train(training).to(dtype)
        torch.manual_seed(1)
        out = model(ids, labels=ids)
        out.loss.backward()
        found.append([out.logits, out.loss, *(p.grad for p in model.parameters())])
    return zip(*found, strict=True)


def test_logits_loss_and_gradients_are_the_same_in_evaluation():
    assert all(torch.equal(stock, ours) for stock, ours in results(training=False))


def test_in_training_they_differ_by_rounding_alone():
    for stock, ours in results(training=True, dtype=torch.float64):  # with dropout, of the same seed
        torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-14)


def test_the_trained_activation_keeps_its_input_alone_and_rounds_once():
    exact = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    formula, trained = NewGELUActivation(), TrainedNewGELU()
    x = exact.bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = trained(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]
    of_x = x.detach().double()
    torch.testing.assert_close(y.double(), formula(of_x), rtol=2**-8, atol=4e-6)
    y.sum().backward()
    slope = torch.func.vmap(torch.func.grad(formula))(of_x)
    torch.testing.assert_close(x.grad.double(), slope, rtol=2**-8, atol=4e-6)


def test_generation_is_the_same():
    stock, ours = pair()
    for kwargs in ({"num_beams": 1}, {"num_beams": 3}):
        a, b = (m.eval().generate(random_ids(1, 5), max_new_tokens=9, do_sample=False, **kwargs) for m in (stock, ours))
        assert torch.equal(a, b)


def test_checkpoints_are_exchangeable(tmp_path):
    stock, ours = pair()
    ours.save_pretrained(tmp_path / "ours")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "ours")
    assert all(
        torch.equal(a, b) for a, b in zip(stock.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert GPT2BaselineLMHeadModel.from_pretrained(GOLDEN / "gpt2").num_parameters() > 0
