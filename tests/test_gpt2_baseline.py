"""The baseline is stock GPT2LMHeadModel, bit for bit."""

import torch
from conftest import GOLDEN, random_ids
from transformers import GPT2Config, GPT2LMHeadModel

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


def test_logits_loss_and_gradients_are_the_same_with_dropout():
    ids, results = random_ids(), []
    for model in pair():
        model.train()
        torch.manual_seed(1)
        out = model(ids, labels=ids)
        out.loss.backward()
        results.append((out, [p.grad for p in model.parameters()]))
    (stock, stock_grads), (ours, our_grads) = results
    assert torch.equal(stock.logits, ours.logits)
    assert torch.equal(stock.loss, ours.loss)
    assert all(torch.equal(a, b) for a, b in zip(stock_grads, our_grads, strict=True))


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
