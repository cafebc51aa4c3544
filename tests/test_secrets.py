"""No token or key that a run is given stands in anything it leaves or says, and no checkpoint runs code."""

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from conftest import launch, output_of, train, zero

from gpt2_variants import __main__
from gpt2_variants.folders import checksum_of
from gpt2_variants.training import checkpoint

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
    said = "".join(output_of(process, 180))
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


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_checkpoint_that_would_run_code_is_refused_unread(stage, tiny_run, ds_json, tmp_path, capfd, in_process):
    """Its manifest fits: whoever put the code there made that too."""
    options = [*tiny_run, "--deepspeed_config", ds_json(zero_optimization=zero(stage)), "--max_steps", "2"]
    folder = train(options, tmp_path / "run", variant="gpt2")
    whole = folder / "checkpoints/step-00000002"
    for file in whole.glob("*.pt"):
        states = torch.load(file, weights_only=False)
        torch.save({**states, "more": Trap(tmp_path / "ran")}, file)
        manifest = json.loads((whole / "manifest.json").read_text())
        facts = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        manifest["files"][file.name] = facts
        manifest["sha256"] = checksum_of({name: fact for name, fact in manifest.items() if name != "sha256"})
        (whole / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.fault_of(whole) is None
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        train([*options[:-1], "4", "--resume_from_checkpoint", "auto"], folder, variant="gpt2")
    assert __main__.main(["export", "--checkpoint", str(whole), "--output_dir", str(tmp_path / "exported")]) == 2
    assert "would run code on being read" in capfd.readouterr().err
    assert not (tmp_path / "ran").exists()
