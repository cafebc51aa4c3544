"""Which torch suits NVIDIA's driver, told by a faked `nvidia-smi`; no run on the CPU beside a GPU that torch misses."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import train_ds
from gpt2_variants import nvidia

HEAD = "| NVIDIA-SMI {driver}    Driver Version: {driver}    CUDA Version: {cuda}     |"
NEWER = "| NVIDIA-SMI {driver}    KMD Version: {driver}    CUDA UMD Version: {cuda}     |"


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """Puts an `nvidia-smi` on the PATH that prints a text and ends with a code."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(text: str, code: int = 0) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    return put


@pytest.mark.parametrize(
    ("driver", "cuda", "build"),
    [
        ("525.60.13", "12.0", "cu126"),
        ("550.54.15", "12.4", "cu126"),
        ("560.35.03", "12.6", "cu126"),
        ("570.86.15", "12.8", "cu128"),
        ("575.51.03", "12.9", "cu128"),
        ("580.65.06", "13.0", "cu130"),
        ("590.44.01", "13.1", "cu130"),
    ],
)
@pytest.mark.parametrize("head", [HEAD, NEWER])
def test_the_build_fits_the_driver(head, driver, cuda, build, smi, capsys):
    smi(head.format(driver=driver, cuda=cuda))
    assert nvidia.driver().cuda == tuple(map(int, cuda.split(".")))
    assert nvidia.main() == 0
    assert capsys.readouterr().out == f"torch>=2.11 --index-url https://download.pytorch.org/whl/{build}\n"


def test_a_driver_that_is_too_old_is_told(smi, capsys):
    smi(HEAD.format(driver="470.82.01", cuda="11.4"))
    assert nvidia.main() == 1
    assert "470.82.01 (CUDA 11.4) is too old for torch 2.11; update it" in capsys.readouterr().err
    assert "update the driver to 525.60 or newer" in nvidia.unused_gpu()


def test_without_a_gpu_nothing_is_amiss(smi, monkeypatch, capsys):
    smi("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", code=9)
    assert nvidia.driver() is None
    assert nvidia.unused_gpu() is None
    assert nvidia.main() == 0
    assert capsys.readouterr().out == "torch>=2.11\n"
    smi(HEAD.format(driver="550.54.15", cuda="12.4"))
    assert nvidia.unused_gpu() is not None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # whoever hides the GPUs means the CPU
    assert nvidia.unused_gpu() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="here torch has CUDA")
def test_auto_is_not_the_toy_where_there_is_a_gpu(smi, tmp_path, tiny_run, in_process, capsys):
    smi(HEAD.format(driver="550.54.15", cuda="12.4"))
    folder = tmp_path / "run"
    assert train_ds.main(["--variant", "gpt2", "--report_to", "none", "--output_dir", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --preset auto: nvidia-smi finds a GPU (driver 550.54.15, CUDA 12.4), but torch ")
    assert "--index-url https://download.pytorch.org/whl/cu126; or say --preset demo" in line
    assert not folder.exists()
    options = ["--variant", "gpt2", *tiny_run, "--max_steps", "1", "--output_dir", str(folder)]
    assert train_ds.main(options) == 0  # --preset demo, said


def test_make_install_asks_for_that_build(smi, tmp_path):
    """With a pip that only says what it is asked for."""
    smi(HEAD.format(driver="550.54.15", cuda="12.4"))
    for name in ("Makefile", "setup.py", "gpt2_variants/nvidia.py"):
        copy = tmp_path / "checkout" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text((ROOT / name).read_text())
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
if [ "$2" = venv ]; then
    mkdir -p .venv/bin
    ln -sf {sys.executable} .venv/bin/python
    printf '#!/bin/sh\\necho pip "$@"\\n' > .venv/bin/pip
    chmod +x .venv/bin/pip
else exec {sys.executable} "$@"; fi
"""
    )
    python.chmod(0o755)
    command = ["make", "install", f"PYTHON={python}"]
    said = subprocess.run(command, cwd=tmp_path / "checkout", capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    pips = [line for line in said.stdout.splitlines() if line.startswith("pip ")]
    assert pips[0] == "pip install -q torch>=2.11 --index-url https://download.pytorch.org/whl/cu126"
    assert pips[1].startswith("pip install -q -e ")
