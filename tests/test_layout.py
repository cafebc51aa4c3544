"""The house: who may import whom, and what stands where."""

import ast
import re
import runpy
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "gpt2_variants"
# Room -> the rooms that its files may import from; files of one room may import one another.
MAY_IMPORT = {
    "__init__": {"registry"},
    "compare": {"registry", "variant_code", "config", "training", "report", "records", "faults", "folders", "drawing"}
    | {"ranks", "signals", "steady_output"},
    "__main__": {"commands", "config", "data", "ending", "faults", "reasons", "train_command"},
    "commands": {"registry", "config", "faults", "data", "evaluation", "inference", "hub", "prepared_data", "report"}
    | {"compare", "contract", "ranks", "variant_code"},
    "train_command": {"config", "faults", "reasons", "ranks", "dry_run", "launch", "training", "hub", "report"}
    | {"steady_output"},
    "launch": {"faults", "ranks", "signals"},
    "registry": {"models", "variant_code"},  # for their types only: `import gpt2_variants` needs no torch of it
    "data": {"network", "folders", "reasons"},
    "hub_client": {"network"},
    "prepared_data": {"data", "network", "hub_client", "faults", "folders"},
    "warm_start": {"registry", "network"},
    "variant_code": {"registry", "models", "variant_text"},
    "config": {"registry", "variant_code", "data", "warm_start", "nodes", "hub_client", "trackers"}
    | {"faults", "folders", "measuring", "nvidia", "ranks", "records"},
    "contract": {"registry", "variant_code", "models", "export", "measuring"},
    "export": {"registry", "data"},
    "training": {"config", "registry", "data", "evaluation", "trackers", "models", "nodes", "warm_start", "hub_client"}
    | {"variant_code", "contract", "faults", "folders", "measuring", "memory", "processes", "ranks", "reasons"}
    | {"records", "signals"},
    "trackers": {"network", "folders"},
    "hub": {"registry", "data", "training", "config", "model_card", "network", "hub_client", "pictures", "report"}
    | {"variant_code", "export", "faults", "folders", "reasons", "records", "signals"},
    "model_card": {"registry", "variant_code", "data", "config", "records", "evaluation"},
    "inference": {"spelling", "registry", "variant_code", "records", "data", "evaluation", "faults", "models"}
    | {"folders", "network"},
    "drawing": {"faults"},
    "pictures": {"data", "drawing", "inference", "models", "faults"},
    "report": {"registry", "config", "evaluation", "inference", "drawing", "pictures", "faults", "folders"}
    | {"reasons", "records", "trackers", "models"},
    "dry_run": {"registry", "config", "measuring", "memory", "models", "ranks"},
    "memory": {"config", "faults", "models", "ranks"},
    "models": set(),
    "ranks": {"faults"},
    "nvidia": {"ranks"},
    "measuring": {"models"},  # for its types only
    "folders": set(),
    "reasons": {"faults"},
    "records": {"folders", "models", "processes"},
    "evaluation": {"models"},
    **{
        alone: set()
        for alone in "variant_text spelling words network nodes ending faults processes signals steady_output".split()
    },
}


def room(file: Path) -> str:
    """The folder of the package that a file stands in, or the file itself."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def siblings(file: Path) -> set[str]:
    """What a file imports of its own folder, by `from .x import y` or `from . import x`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


def rooms_used(file: Path) -> set[str]:
    """The other rooms of the package that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = file.parents[node.level - 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {(*base.relative_to(PACKAGE).parts, *name.split("."))[0] for name in names}
    return found - {room(file)}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows(file):
    assert rooms_used(file) <= MAY_IMPORT[room(file)] | {"words"}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_deepspeed_is_imported_only_where_it_is_called(file):
    """Whoever imports a file has not said yet that there is no GPU, and DeepSpeed warns of that when it is imported."""
    for node in ast.parse(file.read_text()).body:
        names = [node.module] if isinstance(node, ast.ImportFrom) else [n.name for n in getattr(node, "names", ())]
        assert not [name for name in names if name and name.partition(".")[0] == "deepspeed"]


def test_no_two_rooms_import_one_another():
    used = {name: set() for name in MAY_IMPORT}
    for file in PACKAGE.rglob("*.py"):
        used[room(file)] |= rooms_used(file)
    del used["registry"]  # it imports types of the models only
    left = dict(used)
    while free := [name for name, below in left.items() if not below & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"a circle among {sorted(left)}"


@pytest.mark.parametrize(
    "folder",
    ["commands", "compare", "config", "data", "drawing", "memory", "pictures", "report", "training", "trackers"],
)
def test_no_file_is_longer_than_350_lines(folder):
    for file in (PACKAGE / folder).glob("*.py"):
        assert len(file.read_text().splitlines()) <= 350, file


def test_private_names_stay_in_their_file():
    """Nothing imports `_name` from another file, or reads it from another module."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert not [a.name for a in node.names if a.name.startswith("_")], file


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


def test_a_second_stream_is_spelled_where_its_variant_is_defined_only():
    """All other files go by what models declare in `streams`, so that the stream of any variant is shown alike."""
    for file in (*PACKAGE.rglob("*"), *(ROOT / "benchmarks").rglob("*.py")):
        if file.suffix in (".py", ".html", ".css", ".js", ".jinja", ".json") and "duo" not in file.name:
            assert "infill" not in file.read_text().lower(), file


# Outside of training/: its config classes and schedules, to check a JSON by, and its memory estimators.
DEEPSPEED_MODULES = {
    "config/deepspeed_json.py": {"deepspeed.runtime.config"},
    "config/optimizer_json.py": {"deepspeed.runtime", "deepspeed.runtime.config", "deepspeed.utils"},
    "contract/two_ranks.py": {"deepspeed"},  # small models, to set its stages side by side
    "memory/states.py": {"deepspeed.runtime.zero.stage3"},
}


def test_only_training_calls_the_engine():
    for file in PACKAGE.rglob("*.py"):
        if room(file) != "training":
            imports = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Import | ast.ImportFrom)]
            names = {a.name for n in imports if isinstance(n, ast.Import) for a in n.names}
            names |= {n.module for n in imports if isinstance(n, ast.ImportFrom) and not n.level}
            found = {name for name in names if name.split(".")[0] == "deepspeed"}
            assert found <= DEEPSPEED_MODULES.get(str(file.relative_to(PACKAGE)), set()), file


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
    """In `gpt2_variants/__init__.py`, which setup.py reads; beside it in the changelog and in results only."""
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
        if name.startswith("benchmarks/results/"):
            continue  # what was measured says by which version
        text = (ROOT / name).read_text()
        assert not any(re.search(pattern, text, flags=re.IGNORECASE) for pattern in stated), name
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / ".github/CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert {version, "Unreleased"} & set(headings)
