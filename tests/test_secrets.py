"""No token or key that a run is given stands in anything it leaves or says."""

from pathlib import Path

import pytest
from conftest import launch

# of the shapes that the clients accept
SECRETS = {
    "HF_TOKEN": "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH",
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "HGFEDCBAzyxwvutsrqponmlkjihgfedcba",
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "deadbeef",
}


def test_tokens_are_in_no_file_and_no_line(tiny_run, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = tmp_path / "run"
    options = ["--variant", "duo_predict", *tiny_run, "--report_to", "wandb", "--max_steps", "5"]
    (process,) = launch(1, [*options, "--output_dir", str(folder)])
    said = "".join(process.communicate(timeout=180))
    assert process.returncode == 0, said
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for what, content in {**left, Path("what was said"): said.encode()}.items():
        for name, value in SECRETS.items():
            assert value.encode() not in content, f"{what} holds {name}"
            assert value[4:-4].encode() not in content, f"{what} holds most of {name}"
    # the search reads what W&B keeps, and the checkpoint
    (wandb_file,) = (path for path in left if path.suffix == ".wandb")
    assert b"duo_predict" in left[wandb_file]
    assert any(path.suffix == ".pt" for path in left)
