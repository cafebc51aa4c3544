"""The wheel: what is in it, and a run from it where there is no checkout. No network: it is built by what is there."""

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: pip leaves a build folder where it builds."""
    pytest.importorskip("setuptools", minversion="70.1")  # before, a wheel took a package of its own
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("gpt2_variants", "ds_configs"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignored)
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source"))
    (built,) = folder.glob("*.whl")
    return built


def pip(command: str, *words: str) -> None:
    command = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", "--no-index", *words]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_what_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        scripts = configparser.ConfigParser()
        scripts.read_string(archive.read(entry_points).decode())
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "gpt2_variants").rglob("*") if p.is_file()}
    package = {name for name in package if "__pycache__" not in name}
    assert names == package | {f"gpt2_variants/ds_configs/{p.name}" for p in (ROOT / "ds_configs").glob("*.json")}
    assert dict(scripts["console_scripts"]) == {"gpt2-variants": "gpt2_variants.__main__:script"}


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory):
    """Call `gpt2-variants` as the wheel installs it, from an empty folder; its output."""
    site, empty = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("empty")
    pip("install", "--target", str(site), str(wheel))

    def call(*words: str) -> subprocess.CompletedProcess:
        env = {**os.environ, "PYTHONPATH": str(site)}  # before an installed checkout
        command = [sys.executable, str(site / "bin" / "gpt2-variants"), *words]
        return subprocess.run(command, env=env, cwd=empty, capture_output=True, text=True)

    return call


def test_it_finds_its_deepspeed_configs(elsewhere):
    """A name that is none of them is answered with theirs."""
    words = ["--variant", "gpt2", "--preset", "demo", "--report_to", "none", "--deepspeed_config", "zero9.json"]
    out = elsewhere("train", *words)
    assert out.returncode == 2
    (line,) = out.stderr.splitlines()
    assert line.endswith("ds_configs/: " + ", ".join(sorted(p.name for p in (ROOT / "ds_configs").glob("*.json"))))


@pytest.mark.slow
def test_it_lists_and_trains(elsewhere, tiny_run, tmp_path):
    listed = elsewhere("list")
    assert listed.returncode == 0, listed.stderr
    assert "rotating_head_gp_norm" in listed.stdout
    for config in ([], ["--deepspeed_config", "zero2.json"]):
        folder = tmp_path / f"run{len(config)}"
        words = ["--variant", "gpt2", *tiny_run, "--max_steps", "3", "--output_dir", str(folder), *config]
        out = elsewhere("train", *words)
        assert out.returncode == 0, out.stderr
        assert (folder / "model" / "model.safetensors").is_file()
        assert '"git_commit": null' in (folder / "run.json").read_text()
        stage = '"stage": 2' if config else '"stage": 1'
        assert stage in (folder / "ds_config.json").read_text()
