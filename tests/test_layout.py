"""The house: who may import whom, and what stands where."""

import ast
import re
import runpy
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "gpt2_variants"
MAY_IMPORT = {
    "__init__": {"registry"},
    "__main__": {"registry", "run", "data", "evaluation", "inference", "hub", "prepared_data", "report"},
    "registry": {"models"},  # for their types only: `import gpt2_variants` needs no torch of it
    "data": {"network"},
    "publishing": {"network"},
    "prepared_data": {"data", "network", "publishing", "run"},
    "warm_start": {"registry", "network"},
    "run": {"registry", "data", "warm_start", "nodes", "publishing", "metrics"},
    "training": {"registry", "data", "evaluation", "checkpoint", "metrics", "models", "nodes", "run"}
    | {"warm_start", "publishing"},
    "hub": {"registry", "data", "checkpoint", "run", "model_card", "network", "publishing", "pictures", "report"},
    "model_card": {"registry", "data"},
    "inference": {"registry", "data", "evaluation", "run", "models"},
    "comparison": {"registry", "run", "metrics"},
    "drawing": {"run"},
    "pictures": {"data", "drawing", "inference", "models", "run"},
    "report": {"run", "evaluation", "inference", "comparison", "drawing", "pictures"},
    "dry_run": {"registry", "run", "metrics", "models"},
    "metrics": {"network"},
    **{alone: set() for alone in ("network", "nodes", "evaluation", "checkpoint")},
}


def siblings(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("*.py")), ids=lambda p: p.stem)
def test_arrows(file):
    assert siblings(file) <= MAY_IMPORT[file.stem]


def test_models_are_flat_and_import_the_base_and_ops_only():
    """So that an export carries its code: `from .sibling import X` alone survives the Hub."""
    names = {p.stem for p in (PACKAGE / "models").glob("*.py")}
    for file in (PACKAGE / "models").glob("*.py"):
        imported = siblings(file)
        assert imported <= names - {"__init__"}
        assert not {m for m in imported if m.startswith("modeling_")} - {"modeling_base"}
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1
                assert node.module, f"{file.name}: `from . import x` does not survive an export"
                assert not node.module.startswith("gpt2_variants")
    assert not [p for p in (PACKAGE / "models").iterdir() if p.is_dir() and p.name != "__pycache__"]


DEEPSPEED_MODULES = {
    "checkpoint": {  # its files read and converted, and the classes that they may hold
        *("deepspeed.utils.zero_to_fp32", "deepspeed.checkpoint.ds_to_universal"),
        *("deepspeed.runtime.fp16.loss_scaler", "deepspeed.runtime.zero.config", "deepspeed.utils.tensor_fragment"),
    },
    "run": {"deepspeed.runtime.config"},  # its config classes, to check a JSON by
    "dry_run": {"deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2"},  # its memory estimators
}


def test_only_training_calls_the_engine():
    for file in PACKAGE.rglob("*.py"):
        if file.stem != "training":
            imports = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
            names = {a.name for n in imports if isinstance(n, ast.Import) for a in n.names}
            names |= {n.module for n in imports if isinstance(n, ast.ImportFrom) and not n.level}
            found = {name for name in names if name.split(".")[0] == "deepspeed"}
            assert found <= DEEPSPEED_MODULES.get(file.stem, set()), file


def test_the_visible_top_level():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    visible = {line.split("/")[0] for line in tracked.stdout.splitlines() if not line.startswith(".")}
    allowed = {"setup.py", "ds_configs", "gpt2_variants", "train_ds.py", "tests", "benchmarks", "README.md"}
    assert visible <= allowed | {"Makefile", "LICENSE"}
    assert not list(PACKAGE.rglob("utils.py")) + list(PACKAGE.rglob("common.py"))


def test_the_command_is_a_command():
    assert len((ROOT / "train_ds.py").read_text().splitlines()) < 80


def test_the_version_stands_in_one_place(monkeypatch):
    """In `gpt2_variants/__init__.py`, which setup.py reads; beside it in headings of the changelog only."""
    (line,) = (PACKAGE / "__init__.py").read_text().split("__version__ = ")[1:]
    version = line.split('"')[1]
    given = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    assert given["version"] == version
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.json", ".*"], cwd=ROOT, capture_output=True, text=True
    )
    if tracked.returncode:
        pytest.skip("not a git checkout")
    stated = [rf"version\W{{0,8}}{re.escape(version)}\b", rf"gpt2[_-]variants\W{{1,4}}{re.escape(version)}\b"]
    for name in set(tracked.stdout.split()) - {"gpt2_variants/__init__.py", ".github/CHANGELOG.md"}:
        text = (ROOT / name).read_text()
        assert not any(re.search(pattern, text, flags=re.IGNORECASE) for pattern in stated), name
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / ".github/CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert {version, "Unreleased"} & set(headings)
