"""Variants in other people's tools: transformers' Trainer and Auto classes, PEFT, pickling, ways of loading."""

import copy
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT, VARIANTS, of_each_family, random_ids, tiny
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_arguments import MODELS, close, make, same_loss, ways
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.initialization import no_init_weights

from gpt2_variants.hub import export
from gpt2_variants.models.task_heads import HEADS

OWN = sorted({VARIANTS[name].family: name for name in VARIANTS if name != "gpt2"}.values())


def arguments(folder, **options) -> TrainingArguments:
    return TrainingArguments(
        str(folder), report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1, **options
    )


def examples(num: int = 8) -> list[dict]:
    """Of one length; the first label is not scored, which transformers' Trainer counts for GPT-2 all the same."""
    ids = random_ids(num, 12)
    return [{"input_ids": row, "labels": row.index_fill(0, torch.tensor([0]), -100)} for row in ids]


@pytest.mark.parametrize("name", of_each_family(MODELS))
def test_trainers_loss_is_the_models_mean_with_accumulation_or_without(name, tmp_path):
    rows = examples()
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    found = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = make(name, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        for key, p in model.named_parameters():
            if key.endswith("diffusion_param"):  # its noise differs from batch to batch
                p.requires_grad_(False).zero_()
        wanted = model(**batch).loss.item()
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        trainer = Trainer(
            model, arguments(tmp_path, learning_rate=0.5, **options), train_dataset=rows, eval_dataset=rows
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(wanted, abs=1e-5)
        trainer.train()
        assert trainer.state.log_history[-2]["loss"] == pytest.approx(wanted, abs=1e-4)
        found.append([p.detach().clone() for p in model.parameters()])
    for whole, parts in zip(*found, strict=True):  # after a step
        torch.testing.assert_close(whole, parts, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_trainer_hands_next_token_logits_to_compute_metrics(name, tmp_path):
    model, rows, seen = make(name), examples(), []

    def metrics(prediction):
        seen.append(prediction.predictions.shape)
        return {"accuracy": float((prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]).mean())}

    trainer = Trainer(model, arguments(tmp_path), eval_dataset=rows, compute_metrics=metrics)
    vocabulary = model.config.vocab_size
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    predicted = trainer.predict(rows).predictions
    assert seen == [(8, 12, vocabulary)] * 2
    ids = torch.stack([row["input_ids"] for row in rows])
    np.testing.assert_allclose(predicted, model(ids).logits.detach().numpy(), atol=1e-10)


def lora(**options) -> LoraConfig:
    """As the page on models says it: the modules that PEFT takes for GPT-2 by default."""
    return LoraConfig(**{"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM", **options})


ADAPTERS = {
    "attention": lora(),
    "head": lora(target_modules=["lm_head"], fan_in_fan_out=False),
    "head, with dropout": lora(target_modules=["lm_head"], fan_in_fan_out=False, lora_dropout=0.3),
    "everything": lora(target_modules="all-linear"),
    "whole head": lora(modules_to_save=["lm_head"]),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", MODELS)
def test_one_step_of_peft_has_the_same_loss_and_gradients_in_every_way(name, adapter):
    model, ids = make(name, tie_word_embeddings=adapter not in ("whole head", "everything")).float(), random_ids(2, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, copy.deepcopy(ADAPTERS[adapter]))
    generator = torch.Generator().manual_seed(4)
    for key, p in tuned.named_parameters():
        if "lora_B" in key:
            p.data = 0.3 * torch.randn(p.shape, generator=generator)
    tuned.train(adapter == "head, with dropout")
    wanted = None
    for way in ways(name):
        tuned.zero_grad()
        torch.manual_seed(5)
        loss = tuned(input_ids=ids, labels=ids, **way).loss
        loss.backward()
        trained = {key: p for key, p in tuned.named_parameters() if p.requires_grad}
        assert trained.keys()
        if adapter == "head, with dropout":  # the masks of another way are others; in each the gradients are finite
            assert all(torch.isfinite(p.grad).all() for p in trained.values())
            continue
        found = {"loss": loss.detach(), **{key: p.grad.clone() for key, p in trained.items()}}
        wanted = wanted or found
        for key in wanted:
            same_loss(found[key], wanted[key])
    torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1).step()
    if adapter != "head, with dropout":
        assert tuned(input_ids=ids, labels=ids).loss < wanted["loss"]


def test_the_pages_lines_for_peft(exports):
    page = (ROOT / ".github/USE_A_MODEL.md").read_text()
    (code,) = re.findall(r"```python\n(from peft import .*?)```", page, flags=re.DOTALL)
    code = code.replace("runs/duo_predict/model", str(exports / "duo_predict"))
    found: dict = {}
    exec(code, found)
    trained = {key.split(".lora_")[0] for key, p in found["model"].named_parameters() if p.requires_grad}
    assert len(trained) == 2
    assert all(key.endswith("attn.c_attn") for key in trained)
    ids = random_ids(2, 12)
    found["model"](input_ids=ids, labels=ids).loss.backward()


@pytest.mark.usefixtures("poisoned")
def test_each_parameter_that_a_checkpoint_lacks_is_initialised(variant, tmp_path):
    """As a new model's are: the same mean and spread, and the others as they were saved."""
    from safetensors.torch import load_file, save_file

    model = tiny(variant, n_embd=64)
    model.save_pretrained(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    fresh = tiny(variant, n_embd=64, seed=7).state_dict()
    for missing in whole:
        if ".h.1." in missing:
            continue  # as those of layer 0
        save_file({k: v for k, v in whole.items() if k != missing}, tmp_path / "model.safetensors", {"format": "pt"})
        loaded = type(model).from_pretrained(tmp_path).state_dict()
        for key, value in whole.items():
            if key != missing:
                assert torch.equal(loaded[key], value), f"without {missing}: {key}"
        found, wanted = loaded[missing], fresh[missing]
        assert found.isfinite().all(), missing
        spread = max(wanted.std().item(), 1e-6)
        assert found.std().item() == pytest.approx(wanted.std().item(), rel=0.5, abs=1e-6), missing
        assert (found.mean() - wanted.mean()).abs() < spread, missing


def by_to_empty(model):
    with torch.device("meta"):
        new = type(model)(model.config)
    new.to_empty(device="cpu").load_state_dict(model.state_dict())
    return new


def by_assignment(model):
    with torch.device("meta"):
        new = type(model)(model.config)
    new.load_state_dict(model.state_dict(), assign=True)
    new.tie_weights()
    return new


def by_accelerate(model):
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=True):
        new = type(model)(model.config)
    new.load_state_dict(model.state_dict(), assign=True)
    new.tie_weights()
    return new


def without_initialisation(model):
    with no_init_weights():
        new = type(model)(model.config)
    new.load_state_dict(model.state_dict())
    return new


def by_pickle(model):
    import io

    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS_TO_LOAD = (by_to_empty, by_assignment, by_accelerate, without_initialisation, by_pickle, copy.deepcopy)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("how", WAYS_TO_LOAD, ids=lambda how: how.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_is_all_there_is_to_a_model(name, how):
    model, ids = make(name).float(), random_ids()
    assert torch.equal(how(model).eval()(ids).logits, model(ids).logits)


def test_a_compiled_model_can_be_copied_and_pickled(variant):
    model, ids = tiny(variant), random_ids()
    model.compile_parts()
    for how in (by_pickle, copy.deepcopy):
        with torch.no_grad():
            torch.testing.assert_close(how(model)(ids, labels=ids).loss, tiny(variant)(ids, labels=ids).loss)


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_between_dtypes_gives_a_model_of_one_dtype(name):
    model, ids = make(name).float(), random_ids()
    logits = model(ids).logits
    assert torch.equal(model.double().float()(ids).logits, logits)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# --- exports in a process that cannot see the package -----------------------------------------------------------------


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """An export of one variant of each family, and of the baseline."""
    vocabulary = {str(n): n for n in range(67)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="0", unk_token="0")
    root = tmp_path_factory.mktemp("exports")
    for name in ("gpt2", *OWN):
        model = tiny(name)
        weights = {key: value for key, value in model.state_dict().items() if key != "lm_head.weight"}
        export(VARIANTS[name], model.config, weights, tokenizer, 32, root / name)
    return root


SCRIPT = """
import io, sys
import torch, transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
ids = torch.arange(1, 13).view(2, 6)
for name in sys.argv[2:]:
    folder = f"{sys.argv[1]}/{name}"
    first, second = (AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True) for _ in range(2))
    assert type(first) is type(second), name
    buffer = io.BytesIO()
    torch.save(first, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(ids).logits, first(ids).logits), name
    final = first(ids, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state, final), name
    for auto in HEADS:
        head = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True, num_labels=2, pad_token_id=0)
        assert torch.equal(head.transformer(ids).last_hidden_state, final), (name, auto)
        head.train()(ids).to_tuple()[0].sum().backward()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    features = pipeline("feature-extraction", model=folder, tokenizer=tokenizer, trust_remote_code=True)("1 2 3 4 5 6")
    torch.testing.assert_close(torch.tensor(features)[0], final[0], atol=1e-5, rtol=0)
    assert first.generate(ids, max_new_tokens=3, pad_token_id=0).shape == (2, 9)
assert "gpt2_variants" not in sys.modules
print("all")
"""


def test_exports_in_a_clean_process(exports, tmp_path):
    """Also pickled, one class at every load, as a bare transformer, and under GPT-2's other heads; stock among them."""
    script = SCRIPT.replace("HEADS", repr(list(HEADS)))
    command = [sys.executable, "-I", "-c", script, str(exports), "gpt2", *OWN]
    out = subprocess.run(command, capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
    assert out.stdout.strip().endswith("all"), out.stderr[-3000:]


@pytest.mark.parametrize("name", ["gpt2", *OWN])
@pytest.mark.parametrize("auto", HEADS)
def test_task_heads_with_the_package_are_gpt2s(exports, name, auto):
    """The classes say what they are over; names and shapes beside the transformer's are stock's; a checkpoint loads."""
    import transformers

    head = getattr(transformers, auto).from_pretrained(exports / name, num_labels=3, pad_token_id=0).eval()
    stock = HEADS[auto](AutoConfig.from_pretrained(exports / "gpt2", num_labels=3))
    assert isinstance(head, HEADS[auto])
    beside = lambda m: {k: v.shape for k, v in m.state_dict().items() if not k.startswith("transformer.")}
    assert beside(head) == beside(stock)
    base = transformers.AutoModel.from_pretrained(exports / name).eval()
    ids = random_ids(2, 8)
    close(head.transformer(ids).last_hidden_state, base(ids).last_hidden_state, atol=0)
    if name != "gpt2":
        assert type(head).__module__ == type(base).__module__
        assert type(head).__name__ in vars(sys.modules[type(head).__module__])
    by_pickle(head)
