"""Pictures of what a model learned: the numbers in them against slow, plain computations, and that they are drawn."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, tiny
from safetensors.torch import load_file

from gpt2_variants import VARIANTS, __main__, drawing, pictures
from gpt2_variants.data import load_tokens
from gpt2_variants.faults import UsageError
from gpt2_variants.hub import export
from gpt2_variants.inference import SavedModel
from gpt2_variants.pictures import album, drift_diffusion, duo_predict, parallel, rotating_head

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes, and the end of text: no training."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    plain = Tokenizer(models.BPE({entry: n for n, entry in enumerate(entries)}, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    """variant, config fields -> the folder of an exported tiny model, and the model."""

    def make(variant, **fields):
        model = tiny(
            variant, vocab_size=len(tokenizer) + VARIANTS[variant].extra_vocabulary, **{"n_layer": 4, **fields}
        )
        weights = {name: w for name, w in model.state_dict().items() if name != "lm_head.weight"}
        folder = tmp_path_factory.mktemp(variant) / "model"
        export(VARIANTS[variant], model.config, weights, tokenizer, 48, folder)
        return folder, model

    return make


NAMES = {
    "gpt2": [],
    "duo_predict": ["visibility-first-layer", "visibility-later-layers"],
    "drift": ["drift-gates", "drift-gates-all"],
    "diffusion": ["diffusion-scales", "diffusion-scales-all"],
    "drift_diffusion": ["drift-gates", "drift-gates-all", "diffusion-scales", "diffusion-scales-all"],
    "rotating_head_gp": ["frequencies"],
    "parallel": ["pair-cosine", "pair-ratio"],
    "parallel_add": ["pair-cosine", "pair-ratio"],
    "parallel_concat": ["pair-cosine", "pair-ratio"],
    "rotating_head": ["frequencies", "frequencies-all"],
    "rotating_head_norm": ["frequencies", "frequencies-all"],
    "rotating_head_gp_norm": ["frequencies", "frequencies-all"],
}


def test_pngs_of_every_variant(variant, exported, tmp_path):
    folder, _ = exported(variant)
    saved = pictures.save_png(folder, tmp_path / "made" / "here")
    assert [name for name, _ in saved] == [f"{name}.png" for name in NAMES[variant]]
    for name, caption in saved:
        assert (tmp_path / "made" / "here" / name).read_bytes().startswith(PNG)
        assert caption.endswith(".")
    assert {file.name for file in (tmp_path / "made" / "here").iterdir()} == {name for name, _ in saved}


def test_a_variant_that_nothing_here_knows_has_no_pictures(exported, monkeypatch):
    folder, _ = exported("drift")
    monkeypatch.setattr(album, "MAKERS", {})
    assert pictures.pictures_of(folder) == []


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_gates_and_scales_are_those_of_the_saved_weights(exported):
    folder, _ = exported("drift_diffusion")
    weights = load_file(folder / "model.safetensors")
    model = SavedModel(folder).model
    gates, scales = drift_diffusion.drift_gates(model), drift_diffusion.diffusion_scales(model)
    assert gates.shape == scales.shape == (4, 4, 8)
    for layer in range(4):
        for head in range(4):
            for channel in range(8):
                d = weights[f"transformer.h.{layer}.attn.drift_param"][head, channel].item()
                g = weights[f"transformer.h.{layer}.attn.diffusion_param"][head, channel].item()
                assert gates[layer, head, channel].item() == pytest.approx(1 / (1 + math.exp(-d)))
                assert scales[layer, head, channel].item() == pytest.approx(abs(g))
    assert drift_diffusion.diffusion_scales(exported("drift")[1]) is None
    assert drift_diffusion.drift_gates(exported("diffusion")[1]) is None


def test_the_heatmap_shows_each_heads_mean(exported):
    folder, model = exported("drift")
    by_name = {picture.name: picture for picture in pictures.pictures_of(folder)}
    with drawing.look():
        axes = by_name["drift-gates"].draw().axes[0]
    gates = torch.stack([block.attn.drift_param.sigmoid() for block in model.transformer.h])
    shown = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}
    assert shown == {(i, j): f"{gates[i, j].mean():.2f}" for i in range(4) for j in range(4)}
    assert torch.tensor(axes.images[0].get_array()).flatten().tolist() == pytest.approx(
        gates.mean(-1).flatten().tolist()
    )
    caption = by_name["drift-gates-all"].caption
    assert f"mean {gates.mean():.3f}, standard deviation {gates.std(correction=0):.3f}" in caption


def test_what_the_captions_say_of_the_start_is_so():
    draws = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    assert draws.sigmoid().std().item() == pytest.approx(0.208, abs=1e-3)
    assert (draws.abs().mean().item(), draws.abs().std().item()) == pytest.approx((0.798, 0.603), abs=2e-3)


def test_the_line_of_the_start_is_the_density_of_an_untrained_model(exported):
    folder, _ = exported("drift_diffusion")
    draws = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    starts = {"drift-gates-all": draws.sigmoid(), "diffusion-scales-all": draws.abs()}
    for picture in pictures.pictures_of(folder):
        if picture.name in starts:
            with drawing.look():
                (line,) = picture.draw().axes[0].lines
            for low, high in ((0.1, 0.3), (0.45, 0.6), (0.8, 0.95)):
                x = torch.linspace(low, high, 1000)
                share = ((starts[picture.name] >= low) & (starts[picture.name] <= high)).float().mean().item()
                assert torch.trapezoid(torch.tensor(np.interp(x, *line.get_data())), x).item() == pytest.approx(
                    share, rel=0.02
                )


@pytest.mark.parametrize("name", ["rotating_head", "rotating_head_norm", "rotating_head_gp", "rotating_head_gp_norm"])
def test_frequencies_are_those_that_the_model_turns_by(name):
    model = tiny(name)
    with torch.no_grad():
        for block in model.transformer.h:
            if block.attn.rope.layer_norm is not None:  # as if learned
                block.attn.rope.layer_norm.weight.mul_(torch.tensor([0.5, 1.0, 2.0, 3.0]))
                block.attn.rope.layer_norm.bias.add_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
    found = rotating_head.frequencies(model)
    assert found.shape == (2, 4, 4)
    for layer, block in enumerate(model.transformer.h):
        for head in range(4):
            if "gp" in name:
                raw = [10 ** (-head / 3) * 10000 ** (-2 * j / 8) for j in range(4)]
            else:
                raw = block.attn.rope.frequencies[head].tolist()
            if "norm" in name:
                mean = sum(raw) / 4
                sd = math.sqrt(sum((f - mean) ** 2 for f in raw) / 4 + 1e-5)
                scale, shift = (0.5, 1.0, 2.0, 3.0), (0.1, -0.2, 0.3, 0.0)
                raw = [(f - mean) / sd * w + b for f, w, b in zip(raw, scale, shift, strict=True)]
            assert found[layer, head].tolist() == pytest.approx(raw, rel=1e-4, abs=1e-6)


def test_the_published_frequencies_are_drawn(tokenizer, tmp_path):
    folder = shutil.copytree(GOLDEN / "rotating_head_lr", tmp_path / "model")
    tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    names = sorted(name for name in weights if name.endswith("attn.rope.frequencies"))
    assert len(names) < 10  # so that they are in the order of the layers
    learned = torch.stack([weights[name] for name in names])
    first, second = pictures.pictures_of(folder)
    with drawing.look():
        image = first.draw().axes[0].images[0].get_array()
    expected = [sorted(abs(f) for f in head) for layer in learned.tolist() for head in layer]
    assert image.tolist() == [pytest.approx(row) for row in expected]
    assert f"mean {learned.mean():.3f}, standard deviation {learned.std(correction=0):.3f}" in second.caption
    assert "N(0, 1)" in second.caption


@pytest.mark.parametrize("name", ["parallel", "parallel_add", "parallel_concat"])
def test_pairs_are_compared_token_by_token(name):
    model = tiny(name, n_layer=4)
    ids = torch.randint(0, 67, (1, 7), generator=torch.Generator().manual_seed(3))
    cosine, ratio = parallel.pair_similarity(model, ids)
    blocks = list(model.transformer.h.children())
    with torch.no_grad():
        h = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(7))
        for pair in range(2):
            left, right = blocks[2 * pair](h), blocks[2 * pair + 1](h)
            cosines, ratios = [], []
            for l, r in zip((left - h)[0].tolist(), (right - h)[0].tolist(), strict=True):  # noqa: E741
                lengths = math.sqrt(sum(x * x for x in l)), math.sqrt(sum(x * x for x in r))
                cosines.append(sum(x * y for x, y in zip(l, r, strict=True)) / lengths[0] / lengths[1])
                ratios.append(lengths[1] / lengths[0])
            assert cosine[pair].item() == pytest.approx(sum(cosines) / 7, abs=1e-5)
            assert ratio[pair].item() == pytest.approx(sum(ratios) / 7, rel=1e-4)
            h = model.transformer.merge(left, right)
    assert not any(block._forward_hooks for block in blocks)


def test_the_passage_is_of_the_held_out_topics_in_the_models_tokens(exported, monkeypatch):
    folder, _ = exported("parallel")
    seen = []
    original = parallel.pair_similarity
    monkeypatch.setattr(parallel, "pair_similarity", lambda model, ids: seen.append(ids) or original(model, ids))
    first, _ = pictures.pictures_of(folder)
    assert seen[0].tolist() == [load_tokens("builtin", str(folder), 48, "validation")[:48].tolist()]
    assert "the first 48 tokens of the built-in corpus's held-out topics" in first.caption
    with drawing.look():
        axes = first.draw().axes[0]
    cosine, _ = original(SavedModel(folder).model, seen[0])
    assert [t.get_text() for t in axes.texts] == [f"{value:.2f}" for value in cosine.tolist()]


def test_visibility_by_hand():
    rows = [  # t1 t2 t3 m1 m2
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 0, 1, 0],
        [1, 0, 1, 0, 1],
    ]
    assert duo_predict.visibility(3, neighbour=True).int().tolist() == rows
    rows[3][1] = rows[4][2] = 0
    assert duo_predict.visibility(3, neighbour=False).int().tolist() == rows


def test_the_pattern_drawn_is_the_models(exported):
    def drawn(picture):
        with drawing.look():
            patches = picture.draw().axes[0].patches
        return {(round(p.get_y() + 0.44), round(p.get_x() + 0.44)): p.get_facecolor() for p in patches}

    first, later = (drawn(picture) for picture in pictures.pictures_of(exported("duo_predict")[0]))
    assert set(first) == {tuple(cell) for cell in duo_predict.visibility(6, neighbour=True).nonzero().tolist()}
    assert set(later) == {tuple(cell) for cell in duo_predict.visibility(6, neighbour=False).nonzero().tolist()}
    gone = set(first) - set(later)
    assert gone == {(6 + k, k + 1) for k in range(5)}
    assert len({first[cell] for cell in gone}) == 1
    assert {first[cell] for cell in gone}.isdisjoint(later.values())
    (leaking,) = pictures.pictures_of(exported("duo_predict", leak_free=False)[0])
    assert drawn(leaking) == first
    assert "a leak" in leaking.caption
    (one,) = pictures.pictures_of(exported("duo_predict", n_layer=1)[0])
    assert "a leak" not in one.caption


# --- by the command ---------------------------------------------------------------------------------------------------


def test_the_command_draws_a_models_pictures(exported):
    folder, _ = exported("drift_diffusion")
    assert __main__.main(["report", str(folder)]) == 0
    page = (folder.parent / "model-report" / "report.html").read_text()
    for name in NAMES["drift_diffusion"]:
        assert f'id="model0-{name}-figure_1"' in page
    assert "Drift gates by layer and head" in page
    assert "Drift gates by layer and head" in (folder.parent / "model-report" / "report.md").read_text()
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model", "model-report"]


def test_runs_and_models_on_one_page_and_a_plain_gpt2_says_that_it_has_none(exported, tmp_path):
    for variant in ("gpt2", "parallel"):
        (tmp_path / variant).mkdir()
        shutil.copytree(exported(variant)[0], tmp_path / variant / "model")
        (tmp_path / variant / "run.json").write_text(json.dumps({"variant": variant, "status": "finished"}))
    (tmp_path / "rotating").mkdir()
    shutil.copytree(exported("rotating_head")[0], tmp_path / "rotating" / "model")
    folders = [tmp_path / "gpt2", tmp_path / "parallel", tmp_path / "rotating" / "model"]
    assert __main__.main(["report", *map(str, folders)]) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "gpt2: adds nothing to GPT-2 that could be drawn." in page
    for name in ("model1-pair-cosine", "model1-pair-ratio", "model2-frequencies", "model2-frequencies-all"):
        assert f'id="{name}-figure_1"' in page


def without_tokenizer(model: Path):
    for file in model.glob("tokenizer*"):
        file.unlink()


def without_weights(model: Path):
    (model / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [(without_tokenizer, "holds no tokenizer files"), (without_weights, "the weights cannot be loaded")],
)
def test_a_model_that_cannot_be_read_is_a_fault_and_in_a_run_a_line(damage, message, exported, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    model = shutil.copytree(exported("drift")[0], tmp_path / "run" / "model")
    damage(model)
    with pytest.raises(UsageError, match=message):
        pictures.save_png(model, tmp_path / "png")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"variant": "drift", "status": "finished"}))
    assert __main__.main(["report", str(tmp_path / "run")]) == 0
    assert message in (tmp_path / "run" / "report" / "report.html").read_text()
    capsys.readouterr()
    assert __main__.main(["report", str(model), str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
