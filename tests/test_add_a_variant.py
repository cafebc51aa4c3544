"""The README's "Add a variant", done as it says in a copy of the package."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import ROOT

SECTION = re.search(r"^## Add a variant\n(.*?)^##", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)[1]
FILE, RECORD = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
PLACE = re.search(r"`(gpt2_variants/models/modeling_\w+\.py)`, the whole file", SECTION)[1]
OWN = re.search(r'`("\w+": .+?,)` here', SECTION)[1]
NAME = re.search(r'name="(\w+)"', RECORD)[1]
COMMANDS = re.search(r"```sh\n(.*?)```", SECTION, flags=re.DOTALL)[1].splitlines()


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the package, its tests and its command, with the variant in it."""
    root = tmp_path_factory.mktemp("copy")
    for name in ("gpt2_variants", "tests", "ds_configs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train_ds.py", ".pytest.ini"):
        shutil.copy(ROOT / name, root)
    assert not (root / PLACE).exists()
    (root / PLACE).write_text(FILE)
    insert(root / "gpt2_variants/registry.py", "    )\n}\n", before=textwrap.indent(RECORD.rstrip() + ",\n", " " * 8))
    insert(root / "tests/test_contract.py", "OWN_PARAMETERS = {\n", after=f"    {OWN}\n")
    return root


def insert(file: Path, mark: str, before: str = "", after: str = "") -> None:
    text = file.read_text()
    assert text.count(mark) == 1, f"{file}: {mark!r} stands there {text.count(mark)} times"
    file.write_text(text.replace(mark, before + mark + after))


def run(copy: Path, program: str, *more: str) -> str:
    """The README's command for `program`, with `more` options, in the copy; its output."""
    (line,) = (c for c in COMMANDS if program in c)
    words = shlex.split(line, comments=True)
    interpreter = [sys.executable] if words[0] == "python" else [sys.executable, "-m"]
    command = [*interpreter, *(words[1:] if words[0] == "python" else words), *more]
    env = {**os.environ, "PYTHONPATH": str(copy)}
    out = subprocess.run(command, env=env, cwd=copy, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    return out.stdout


def test_it_is_listed(copy):
    (line,) = (line for line in run(copy, "gpt2_variants list").splitlines() if line.startswith(f"{NAME} "))
    assert f"{354_823_168 + 24 * 16:,}" in line


def test_it_keeps_the_contract(copy):
    passed = re.search(r"^(\d+) passed, \d+ deselected", run(copy, "test_contract.py"), flags=re.MULTILINE)
    suite = (ROOT / "tests/test_contract.py").read_text()
    assert int(passed[1]) >= len(re.findall(r"^def test_\w+\(variant", suite, flags=re.MULTILINE))


def test_it_trains_and_its_export_computes_what_the_readme_says(copy, tiny_run, tmp_path):
    """Loaded without the package: stock GPT-2 whose queries, by the weights that make them, are scaled by exp(t)."""
    run(copy, "train_ds.py", *tiny_run, "--max_steps", "3", "--output_dir", str(tmp_path / "run"))
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
    command = [sys.executable, "-S", "-c", code, str(tmp_path / "run/model")]
    out = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("transformers_modules")
