"""--init_from: what is taken over, what is new, and that nothing else happens silently."""

import json
import re
import shutil

import pytest
import torch
from conftest import tiny, train
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, LlamaConfig

from gpt2_variants import VARIANTS, warm_start
from gpt2_variants.config.command_line import parse
from gpt2_variants.faults import UsageError

pytestmark = pytest.mark.usefixtures("in_process")

SHAPE = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32}


@pytest.fixture(scope="module")
def stock(tiny_run, tmp_path_factory):
    """A trained stock GPT-2 with its tokenizer: the export of a baseline run."""
    return train(tiny_run, tmp_path_factory.mktemp("stock") / "run", "--max_steps", "2", variant="gpt2") / "model"


@pytest.fixture
def warm_run(tiny_run, stock):
    """The tiny run's options without its shape, started from `stock`; the rate is 0, so that the weights stay."""
    options = tiny_run[: tiny_run.index("--model_args")]
    return [*options, "--init_from", str(stock), "--learning_rate", "0", "--max_steps", "1"]


def config_of(variant, source, **fields):
    """The config of a run of `variant` that starts from `source`."""
    record = VARIANTS[variant]
    return record.make_config(None, 0, **{**warm_start.config_fields(str(source), record), **fields})


def read(variant, source, **fields):
    return warm_start.read(str(source), VARIANTS[variant], config_of(variant, source, **fields))


def own_names(variant):
    """The parameters that stock GPT-2 does not have."""
    stock_names = {n for n, _ in GPT2LMHeadModel(tiny("gpt2").config).named_parameters()}
    return {n for n, _ in tiny(variant).named_parameters()} - stock_names


def test_exactly_the_variants_own_parameters_are_new(variant, stock):
    config = config_of(variant, stock)
    assert {name: getattr(config, name) for name in SHAPE} == SHAPE
    start = read(variant, stock)
    mask_row = {f"transformer.wte.weight[{config.vocab_size - 1}:]"} if variant == "duo_predict" else set()
    assert start.new.keys() == own_names(variant) | mask_row

    torch.manual_seed(0)
    model = VARIANTS[variant].model_class(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start.apply(model)
    trained = load_file(stock / "model.safetensors")
    for name, p in model.named_parameters():
        if name in own_names(variant):
            assert torch.equal(p, before[name]), name
        else:
            assert torch.equal(p[: len(trained[name])], trained[name]), name
            assert torch.equal(p[len(trained[name]) :], before[name][len(trained[name]) :]), name
    counts = sum(t.numel() for t in trained.values()), sum(p.numel() for p in model.parameters())
    assert f"{counts[0]:,} values taken over" in str(start)
    said = [int(n.replace(",", "")) for n in re.findall(r"\(([\d,]+) values\)", str(start))]
    assert sum(said) == counts[1] - counts[0]


@pytest.mark.parametrize("variant", ["gpt2", "duo_predict", "drift_diffusion", "parallel_concat", "rotating_head_norm"])
def test_a_run_starts_from_the_unrounded_weights_and_says_so(variant, warm_run, stock, tmp_path, capfd):
    """In bf16 at a rate of 0: the export holds the checkpoint's float32 weights bit for bit."""
    folder = train(warm_run, tmp_path / "run", variant=variant)
    exported, trained = (load_file(f / "model.safetensors") for f in (folder / "model", stock))
    assert any(not torch.equal(w, w.bfloat16().float()) for w in trained.values())
    for name, weight in trained.items():
        assert torch.equal(exported[name][: len(weight)], weight), name
    said = json.loads((folder / "run.json").read_text())["warm_start"]
    assert said in capfd.readouterr().err
    for name in own_names(variant):
        assert re.sub(r"\.h\.\d+\.", ".h.*.", name) in said
    if variant == "gpt2":
        assert said.endswith("new: none")


def test_a_variant_goes_on_from_its_own_export(tiny_run, warm_run, stock, tmp_path):
    first = train(warm_run, tmp_path / "first", variant="duo_predict") / "model"
    again = [str(first) if option == str(stock) else option for option in warm_run]
    second = train(again, tmp_path / "second", variant="duo_predict") / "model"
    a, b = (load_file(f / "model.safetensors") for f in (first, second))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_hubs_gpt2_files_have_no_prefix_and_hold_masks(stock, tmp_path):
    """`openai-community/gpt2`: `h.0...` instead of `transformer.h.0...`, with the buffers of old versions."""
    folder = shutil.copytree(stock, tmp_path / "old")
    weights = load_file(stock / "model.safetensors")
    old = {name.removeprefix("transformer."): w for name, w in weights.items()}
    old |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(2)}
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    start = read("drift", folder)
    assert start.weights.keys() == weights.keys()
    assert all(torch.equal(start.weights[name], weights[name]) for name in weights)


def test_model_args_win_over_the_checkpoint_and_the_variants_fields_over_both(stock, tiny_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # somebody may have trained in the checkout
    options = ["--preset", "seed", "--dataset", tiny_run[3], "--init_from", str(stock), "--block_size", "16"]
    run = parse(["--variant", "duo_predict", *options, "--model_args", "attn_pdrop=0.25", "--report_to", "none"])
    config = run.make_config(tokenizer_size=5)
    assert (config.attn_pdrop, config.n_layer, config.n_positions, config.leak_free) == (0.25, 2, 32, True)
    assert run.tokenizer == str(stock)


def faults_of(*arguments):
    with pytest.raises(UsageError) as caught:
        parse(["--preset", "demo", "--report_to", "none", *arguments])
    return caught.value.lines


def test_a_checkpoint_that_cannot_be_had_is_one_line(stock, tmp_path):
    def fault(source, *more):
        (line,) = faults_of("--variant", "drift", "--init_from", str(source), *more)
        assert line.startswith(("--init_from", "--size"))
        return line

    assert "neither an existing folder nor a Hub id" in fault(tmp_path / "nowhere")
    assert "cannot be reached" in fault("openai-community/gpt2")
    assert "is a file" in fault(stock / "config.json")
    assert "holds no config.json" in fault(tmp_path)
    (tmp_path / "config.json").write_text((stock / "config.json").read_text())
    assert "holds no weights (model.safetensors or pytorch_model.bin)" in fault(tmp_path)
    (tmp_path / "model.safetensors").touch()
    LlamaConfig().save_pretrained(tmp_path)
    assert "is a llama; a GPT-2 or a variant of it is needed" in fault(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/model.safetensors").touch()
    (tmp_path / "other/config.json").write_text("{")
    assert "its config cannot be read" in fault(tmp_path / "other")
    assert "leave --size out" in fault(stock, "--size", "nano")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": 4}, r"holds no transformer\.h\.2\.\S+ and \d+ more; leave the checkpoint's shape out"),
        ({"n_layer": 1}, r"holds transformer\.h\.1\.\S+ and \d+ more, for which drift with n_layer=1 has no place"),
        ({"n_embd": 64}, r"has the shape \(.*32.*\), the model's is \(.*64"),
        ({"n_positions": 64}, r"wpe\.weight has the shape \(32, 32\), the model's is \(64, 32\)"),
        ({"vocab_size": 999}, r"wte\.weight has the shape \(\d+, 32\), the model's is \(999, 32\)"),
    ],
)
def test_a_shape_that_is_not_the_checkpoints_is_a_fault(fields, message, stock):
    with pytest.raises(warm_start.WarmStartError, match=message):
        read("drift", stock, **fields)


def test_another_variants_own_weights_and_a_part_of_a_checkpoint_are_faults(stock, tmp_path):
    tiny("drift").save_pretrained(tmp_path / "drift")
    with pytest.raises(warm_start.WarmStartError, match=r"attn\.baseline and \d+ more, for which gpt2 .* has no place"):
        read("gpt2", tmp_path / "drift")

    part = shutil.copytree(stock, tmp_path / "part")
    weights = load_file(part / "model.safetensors")
    weights.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(warm_start.WarmStartError, match=r"it lacks transformer\.h\.1\.mlp\.c_fc\.weight"):
        read("gpt2", part)
    weights |= {"transformer.h.1.mlp.c_fc.weight": torch.zeros(32, 128), "transformer.h.0.attn.odd": torch.zeros(3)}
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(warm_start.WarmStartError, match=r"it also holds transformer\.h\.0\.attn\.odd"):
        read("gpt2", part)
