"""A variant from a user's own file: the same run as of the package, kept with the run, handed on with the model."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import variant_examples
from conftest import ROOT, metrics, python_program, train
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import train_ds
from gpt2_variants import variant_code
from gpt2_variants.__main__ import main
from gpt2_variants.contract import PROMISES, Subject, ask
from gpt2_variants.inference import SavedModel
from gpt2_variants.model_card import write_card
from gpt2_variants.report import summary
from gpt2_variants.report import write as write_report
from gpt2_variants.variant_code import VariantError, find

RECORD = """

VARIANT = Variant(
    name="own_drift", family="own", summary="drift, from a file", model=DDGPT2LMHeadModel,
    overrides={"apply_drift": True, "apply_diffusion": True},
)
"""


def drift_file(folder: Path) -> Path:
    """The package's drift-diffusion as a user would have written it: another model_type, and a record."""
    text = (ROOT / "gpt2_variants/models/modeling_drift_diffusion.py").read_text()
    text = re.sub(r"^from \.(\w+) import", r"from gpt2_variants.models.\1 import", text, flags=re.MULTILINE)
    text = text.replace('model_type = "dd-gpt2"', 'model_type = "own-drift-gpt2"')
    text = text.replace("import torch\n", "import torch\nfrom gpt2_variants.registry import Variant\n", 1)
    path = folder / "own_drift.py"
    path.write_text(text + RECORD)
    return path


@pytest.fixture
def idea(tmp_path) -> Path:
    """The page's first example as a file."""
    return variant_examples.write(tmp_path, "idea")


@pytest.mark.slow
def test_a_run_of_a_file_is_bit_for_bit_that_of_the_package(in_process, tiny_run, tmp_path):
    train(tiny_run, tmp_path / "package", "--max_steps", "10", variant="drift_diffusion")
    train(tiny_run, tmp_path / "file", "--max_steps", "10", variant=str(drift_file(tmp_path)))
    assert metrics(tmp_path / "file") == metrics(tmp_path / "package")
    ours, theirs = (load_file(tmp_path / name / "model/model.safetensors") for name in ("file", "package"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    asked = json.loads((tmp_path / "file/run.json").read_text())["variant_check"]
    assert asked["no-leak-by-gradient"] == "kept"
    assert asked.keys() == PROMISES.keys()
    config = json.loads((tmp_path / "file/model/config.json").read_text())
    assert {"AutoConfig", "AutoModelForSequenceClassification"} < config["auto_map"].keys()


def test_the_run_keeps_the_file_and_goes_on_with_it(in_process, tiny_run, tmp_path, idea, capsys):
    run = train(tiny_run, tmp_path / "run", "--max_steps", "5", "--no-check", variant=str(idea))
    facts = json.loads((run / "run.json").read_text())
    plan = facts["plan"]
    assert facts["variant_check"] == {"asked": "nothing, by --no-check"}
    assert (plan["variant"], plan["variant_file"]) == ("idea", "idea.py")
    assert (run / "code/idea.py").read_bytes() == idea.read_bytes()
    assert plan["variant_code"] == find(str(idea)).code.digest
    changed = idea.with_name("elsewhere") / "idea.py"
    changed.parent.mkdir()
    changed.write_text(idea.read_text().replace("self.log_scale.exp()", "(2 * self.log_scale).exp()"))
    asked = ["--output_dir", str(run), "--resume_from_checkpoint", "auto", "--max_steps", "10"]
    assert train_ds.main(["--variant", str(changed), *asked]) == 2
    assert "was made with another content of it" in capsys.readouterr().err
    idea.unlink()
    assert train_ds.main(asked) == 0
    whole = train(tiny_run, tmp_path / "whole", "--max_steps", "10", "--no-check", variant=str(run / "code/idea.py"))
    assert json.loads((whole / "run.json").read_text())["plan"]["variant_code"] == plan["variant_code"]
    assert [r["step"] for r in metrics(run) if "loss" in r] == list(range(1, 11))


def test_a_changed_copy_is_refused(in_process, tiny_run, tmp_path, idea):
    run = train(tiny_run, tmp_path / "run", "--max_steps", "5", "--no-check", variant=str(idea))
    copy = run / "code/idea.py"
    copy.write_text(copy.read_text() + "\n# edited\n")
    code = (
        "from pathlib import Path; from gpt2_variants.inference import SavedModel; import sys; "
        "from gpt2_variants.faults import UsageError\n"
        "try: SavedModel(Path(sys.argv[1]))\nexcept UsageError as err: print(err)"
    )
    out = python_program("-c", code, run / "model")
    assert "was changed since the run was trained" in out.stdout, out.stderr


def test_what_is_done_with_a_run_of_a_file(in_process, tiny_run, tmp_path, idea, capsys):
    """Two seeds are one recipe beside the baseline; generate, evaluate, export; a warm start from it."""
    for seed in (1, 2):
        for name, variant in (("gpt2", "gpt2"), ("idea", str(idea))):
            more = ["--no-check"] if name == "idea" else []
            train(
                tiny_run, tmp_path / f"{name}-{seed}", "--max_steps", "5", "--seed", str(seed), *more, variant=variant
            )
    runs = [tmp_path / f"{name}-{seed}" for name in ("gpt2", "idea") for seed in (1, 2)]
    text = write_report(runs, tmp_path / "report").text
    assert "| idea | 2 |" in text, text
    assert "Settings differ" not in text
    model = str(tmp_path / "idea-1/model")
    assert main(["generate", "--model", model, "--prompt", "The time", "--max_new_tokens", "3"]) == 0
    moved = tmp_path / "moved"
    (tmp_path / "idea-1/model").rename(moved)
    capsys.readouterr()
    assert main(["generate", "--model", str(moved), "--prompt", "The time"]) == 2
    assert (
        "give --variant with the file that it was trained from, or --trust_remote_code to run the"
        in capsys.readouterr().err
    )
    of_file = SavedModel(moved, variant=str(idea)).surprise(torch.tensor([[5, 6, 7]]))
    of_folder = SavedModel(moved, trust_remote_code=True).surprise(torch.tensor([[5, 6, 7]]))
    assert of_file["given its past"][1:] == of_folder["given its past"][1:]
    export = ["export", "--checkpoint", str(tmp_path / "idea-2"), "--output_dir", str(tmp_path / "exported")]
    assert main(export) == 0
    ours, theirs = (
        load_file(tmp_path / "exported/model.safetensors"),
        load_file(tmp_path / "idea-2/model/model.safetensors"),
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    more = ("--init_from", str(moved), "--max_steps", "2", "--no-check")
    without_shape = tiny_run[: tiny_run.index("--model_args")]
    train(without_shape, tmp_path / "warm", *more, variant=str(idea))
    from_gpt2 = ("--init_from", str(tmp_path / "gpt2-1/model"), "--max_steps", "2", "--no-check")
    train(without_shape, tmp_path / "warm2", *from_gpt2, variant=str(idea))
    assert "log_scale" in json.loads((tmp_path / "warm2/run.json").read_text())["warm_start"]


def test_its_export_computes_what_the_page_says_without_the_package(in_process, tiny_run, tmp_path, idea):
    """Stock GPT-2 whose queries, by the weights that make them, are scaled by exp(t)."""
    run = train(tiny_run, tmp_path / "run", "--max_steps", "3", "--no-check", variant=str(idea))
    exported = (run / "model/idea.py").read_text()
    assert "gpt2_variants" not in exported
    assert '"""Head temperature' in exported
    assert "VARIANT" not in exported
    code = """if True:
        import sys, torch, importlib.util
        assert importlib.util.find_spec("gpt2_variants") is None
        from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
        model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
        assert all(block.attn.log_scale.ne(0).all() for block in model.transformer.h), "trained"
        fields = {name: value for name, value in model.config.to_dict().items() if name != "model_type"}
        stock = GPT2LMHeadModel(GPT2Config(**fields)).eval()
        missing, unexpected = stock.load_state_dict(model.state_dict(), strict=False)
        assert not missing and all(name.endswith(".log_scale") for name in unexpected)
        ids = torch.tensor([[5, 6, 7, 8, 9]])
        with torch.no_grad():
            for block, plain in zip(model.transformer.h, stock.transformer.h, strict=True):
                t, attention = block.attn.log_scale.normal_(), plain.attn
                factor = t.exp().repeat_interleave(attention.head_dim)
                attention.c_attn.weight[:, : attention.embed_dim] *= factor
                attention.c_attn.bias[: attention.embed_dim] *= factor
            torch.testing.assert_close(model(ids).logits, stock(ids).logits, atol=1e-5, rtol=0)
        print(type(model).__module__)
    """
    site = Path(torch.__file__).parent.parent
    env = {**os.environ, "PYTHONPATH": str(site), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-S", "-c", code, str(run / "model")]
    out = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("transformers_modules")


def test_a_leak_is_refused_before_training(in_process, tiny_run, tmp_path, idea, capsys):
    leak = tmp_path / "leak.py"
    part = "return query * self.log_scale.exp()[:, None, None] + 0.1 * query.mean(2, keepdim=True), key"
    leak.write_text(idea.read_text().replace("return query * self.log_scale.exp()[:, None, None], key", part))
    train(tiny_run, tmp_path / "run", "--max_steps", "3", variant=str(leak), code=2)
    error = capsys.readouterr().err
    assert re.search(r"error: --variant .*leak.py: broken: .*the prediction of token \d+ depends on token \d+", error)
    assert not (tmp_path / "run").exists()


def test_a_module_and_a_choice_among_several(tmp_path, idea, monkeypatch):
    package = tmp_path / "thoughts"
    package.mkdir()
    (package / "__init__.py").write_text("")
    several = "\n\nVARIANTS = (VARIANT, dataclasses.replace(VARIANT, name='other', block_size=64))\n"
    text = idea.read_text().replace("import torch\n", "import dataclasses\n\nimport torch\n", 1)
    (package / "thought.py").write_text(text + several)
    monkeypatch.chdir(tmp_path)
    assert find("thoughts.thought:other").block_size == 64
    assert find("thoughts/thought.py:idea").block_size == 1024
    with pytest.raises(VariantError, match=r"several variants; say which: .*thought:idea, .*thought:other"):
        find("thoughts.thought")
    with pytest.raises(VariantError, match="has no variant nothing; it has idea, other"):
        find("thoughts.thought:nothing")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["my-idea.py", "modeling_base.py", "3.py"])
def test_any_file_name_will_do(name, in_process, tiny_run, tmp_path, idea):
    path = idea.rename(tmp_path / name)
    run = train(tiny_run, tmp_path / "run", "--max_steps", "2", "--no-check", variant=str(path))
    (answer,) = ask(Subject(find(str(path))), [PROMISES["export"]])
    assert answer.state == "kept", answer.finding
    SavedModel(run / "model")
    SavedModel(run / "model", trust_remote_code=True)


@pytest.mark.slow
@pytest.mark.parametrize("left_out", ["config", "of the transformer", "the transformer"])
def test_a_config_class_that_is_left_out_is_made(left_out, in_process, tiny_run, tmp_path, idea):
    """So that the model has a type of its own: by gpt2's, transformers would load a stock GPT-2."""
    text = idea.read_text()
    if left_out == "config":
        text = re.sub(r"class IdeaConfig.*?\n\n\n", "", text, flags=re.DOTALL).replace(
            "config_class = IdeaConfig", "pass"
        )
    elif left_out == "of the transformer":
        text = text.replace("config_class = IdeaConfig", "pass", 1)
    else:
        text = re.sub(r"class IdeaModel.*?\n\n\n", "", text, flags=re.DOTALL)
        text = text.replace("    transformer_class = IdeaModel\n", "").replace("config_class = IdeaConfig", "pass")
    idea.write_text(text)
    (answer,) = ask(Subject(find(str(idea))), [PROMISES["export"]])
    assert answer.state == "kept", answer.finding
    run = train(tiny_run, tmp_path / "run", "--max_steps", "2", "--no-check", variant=str(idea))
    assert json.loads((run / "model/config.json").read_text())["model_type"] == "idea-gpt2"
    assert (run / "code/idea.py").read_text() == text
    saved = SavedModel(run / "model")
    assert torch.isfinite(torch.tensor(saved.surprise(torch.tensor([[5, 6, 7]]))["given its past"][1:])).all()


def test_files_beside_it_travel(in_process, tiny_run, tmp_path, idea):
    (tmp_path / "helpers.py").write_text("def scaled(x, t):\n    return x * t.exp()[:, None, None]\n")
    text = idea.read_text().replace("query * self.log_scale.exp()[:, None, None]", "scaled(query, self.log_scale)")
    idea.write_text(
        text.replace("from gpt2_variants.registry", "from .helpers import scaled\nfrom gpt2_variants.registry")
    )
    before = find(str(idea)).code.digest
    run = train(tiny_run, tmp_path / "run", "--max_steps", "2", "--no-check", variant=str(idea))
    assert (run / "code/helpers.py").exists()
    assert (run / "model/helpers.py").exists()
    (tmp_path / "helpers.py").write_text("def scaled(x, t):\n    return x * (2 * t).exp()[:, None, None]\n")
    assert find(str(idea)).code.digest != before


FAULTS = {
    "not Python": (("class IdeaConfig", "class class IdeaConfig"), r"idea.py is not Python: line \d+"),
    "no record": (("VARIANT = Variant", "OTHER = Variant"), "does not travel"),
    "an error": (("import torch\n", "import torch\n1 / 0\n"), r"line \d+: ZeroDivisionError: division by zero"),
    "a name of the package": (('name="idea"', 'name="gpt2"'), "name='gpt2': small letters, digits and _ are allowed"),
    "a config without a type": (('    model_type = "idea-gpt2"', "    more: int = 1"), "model_type 'gpt2' says"),
    "a part of the package as if beside it": (
        ("from gpt2_variants.models.modeling_base", "from .modeling_base"),
        "write from gpt2_variants.models.modeling_base import",
    ),
    "a type that is taken": (('"idea-gpt2"', '"llama"'), "model_type 'llama' says"),
    "another config": (
        (
            "    config_class = IdeaConfig\n    attention_class",
            "    config_class = type('O', (GPT2Config,), {})\n    attention_class",
        ),
        "has another config_class",
    ),
    "no model": (("model=IdeaLMHeadModel", "model=IdeaModel"), "a subclass of VariantLMHeadModel is needed"),
    "an unknown field": (('family="idea"', 'family="idea", overrides={"nothing": 1}'), "has no such field"),
    "an argument": (('family="idea"', 'familiy="idea"'), "unexpected keyword argument 'familiy'"),
    "another part of the package": (
        ("import torch\n", "import torch\nfrom gpt2_variants.data import load\n"),
        "files of gpt2_variants.models and the Variant of its registry can be imported",
    ),
    "the package itself": (
        ("import torch\n", "import torch\nimport gpt2_variants\n"),
        "write from gpt2_variants.models",
    ),
    "a file beside it": (
        ("import torch\n", "import torch\nimport beside\n"),
        r"travels with the model as from \.beside",
    ),
    "a block size": (('family="idea"', 'family="idea", block_size=1'), "block_size=1: a whole number from 2"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_that_cannot_be_used_is_told_in_one_line(name, idea, capsys):
    (before, after), wanted = FAULTS[name]
    idea.with_name("beside.py").write_text("")
    text = idea.read_text()
    assert before in text
    idea.write_text(text.replace(before, after))
    assert train_ds.main(["--variant", str(idea), "--dry_run", "--report_to", "none"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: --variant {idea}: ")
    assert re.search(wanted, line), line


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ("nothing.py", "cannot be read: No such file"),
        ("no.such.module", "nor a module that Python finds"),
        ("duo-predict", r"did you mean duo_predict\?"),
    ],
)
def test_a_name_that_cannot_be_used(asked, wanted, idea, monkeypatch):
    monkeypatch.chdir(idea.parent)
    with pytest.raises(VariantError, match=wanted):
        find(asked)


def test_the_file_that_was_read_is_the_file_that_is_exported(in_process, tiny_run, tmp_path, idea, monkeypatch):
    """Edited while the run trains: what is handed on is what was trained."""
    text = idea.read_text()
    known = variant_code.known

    def edited(*args):
        idea.write_text("raise SystemExit\n")
        return known(*args)

    monkeypatch.setattr("gpt2_variants.config.plan.known", edited)
    run = train(tiny_run, tmp_path / "run", "--max_steps", "2", "--no-check", variant=str(idea), code=0)
    assert (run / "code/idea.py").read_text() == text
    assert "Head temperature" in (run / "model/idea.py").read_text()


def test_pictures(in_process, tiny_run, tmp_path):
    from gpt2_variants.pictures import save_png

    drawn = variant_examples.write(tmp_path, "pictures")
    run = train(tiny_run, tmp_path / "drawn", "--max_steps", "3", "--no-check", variant=str(drawn))
    assert [name for name, _ in save_png(run / "model", tmp_path / "png")] == ["learned-1.png"]


def test_a_second_stream_is_told_by_its_own_title_and_caveat(in_process, tiny_run, tmp_path, capsys):
    """In metrics.jsonl, run.json, model card, report, what the run says at its end, `evaluate` and `generate`."""
    caveat = "Each token given its past but for the last token of it: not comparable with the next-token figures."
    twice = variant_examples.write(tmp_path, "second_stream")
    run = train(tiny_run, tmp_path / "twice", "--max_steps", "5", "--no-check", variant=str(twice))
    (evaluated,) = (record for record in metrics(run) if "eval_loss" in record)
    figures = {name: evaluated[f"eval_second_next_{name}"] for name in ("loss", "perplexity", "accuracy")}
    assert all("second_next_loss" in record for record in metrics(run) if "loss" in record)
    recorded = json.loads((run / "run.json").read_text())["streams"]
    title = "The token after the next"
    assert recorded == [{"name": "second_next", "title": title, "caveat": caveat, "sees_ahead": 0}]

    card = write_card(run, "team/twice", [])
    cells = f"{figures['perplexity']:.2f} | {figures['loss']:.4f} | {figures['accuracy']:.4f}"
    assert f"| {title} | {cells} |" in card
    assert f"{title}: {caveat}" in card
    told = {(r.task_type, r.task_name, r.metric_name): r.metric_value for r in ModelCard(card).data.eval_results}
    assert told["other", title, "validation loss, second_next"] == pytest.approx(figures["loss"], abs=1e-6)
    assert f'print(model.score(inputs["input_ids"])["second_next"].nll)  # -log p: {title}' in card

    written = write_report([run])
    assert f"## {title}" in written.text
    assert caveat in written.text
    assert f"{figures['loss']:.4f}" in written.text
    page = written.page.read_text()
    assert page.count(title) >= 2  # of its table and of its chart
    assert caveat in page

    words = f"perplexity {figures['perplexity']:.2f}, loss {figures['loss']:.4f}, accuracy {figures['accuracy']:.3f}"
    assert summary(run).splitlines()[-1] == f"second_next  {words}. {caveat}"
    capsys.readouterr()
    data = tiny_run[tiny_run.index("--dataset") + 1]
    command = ["evaluate", "--model", str(run / "model"), "--dataset", data, "--split", "validation"]
    assert main([*command, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    again = {name: again[f"eval_second_next_{name}"] for name in figures}
    assert again == pytest.approx(figures, rel=1e-3)
    assert main(command) == 0
    *_, second = capsys.readouterr().out.splitlines()
    words = f"perplexity {again['perplexity']:.2f}, loss {again['loss']:.4f}, accuracy {again['accuracy']:.3f}"
    assert second == f"second_next  {words}. {caveat}"
    saved = SavedModel(run / "model")
    ids = torch.tensor([[5, 6, 7, 8]])
    columns = saved.surprise(ids)
    assert list(columns) == ["given its past", title]
    with torch.no_grad():
        hidden = saved.model.transformer(ids).last_hidden_state
        log_p = saved.model.lm_head(saved.model.further(hidden)).log_softmax(-1)
    wanted = [math.nan, math.nan, -log_p[0, 0, 7].item(), -log_p[0, 1, 8].item()]
    assert columns[title] == pytest.approx(wanted, abs=1e-5, nan_ok=True)
    SavedModel(run / "model", trust_remote_code=True)


@pytest.mark.parametrize(
    ("stream", "wanted"),
    [
        ('name="Second", title="x", caveat="y"', "name='Second': small letters, digits and _ are allowed"),
        ('name="eval_x", title="x", caveat="y"', "other figures have that name"),
        ('name="next_token", title="x", caveat="y"', "other figures have that name"),
        ('name="a", title="x", caveat=" "', "has no caveat"),
        ('name="a", title="x", caveat="y", sees_ahead=-1', "sees_ahead=-1: a whole number from 0"),
        ('name="a", title="x", caveat="y"), Stream(name="a", title="x", caveat="y"', "two streams have it"),
    ],
)
def test_a_declaration_that_cannot_be_shown_is_told_in_one_line(stream, wanted, tmp_path):
    path = variant_examples.write(tmp_path, "second_stream")
    text, count = re.subn(r"Stream\(\n.*?\n        \)", f"Stream({stream})", path.read_text(), flags=re.DOTALL)
    assert count == 1
    path.write_text(text)
    with pytest.raises(VariantError, match=rf"second_stream.py: line \d+: ValueError: Twice.streams: .*{wanted}"):
        find(str(path))


@pytest.mark.slow
def test_it_is_benchmarked(tmp_path, idea):
    command = [sys.executable, "benchmarks/throughput.py", "--preset", "demo", "--variants", str(idea), "--steps", "1"]
    command += ["--warmup_steps", "1", "--rounds", "1", "--block_size", "32", "--output_dir", str(tmp_path / "out")]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    (row,) = json.loads((tmp_path / "out/throughput.json").read_text())["tables"]["Variants"]
    assert row["case"] == "idea"
