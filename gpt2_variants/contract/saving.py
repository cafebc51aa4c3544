"""What was trained is what is saved, and what is handed on loads without this package."""

import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import torch

from ..models.modeling_base import VariantLMHeadModel
from .subject import Subject

_LOAD = """
import sys, torch
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gpt2_variants":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Blocked())
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
wanted = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    found = model(wanted["ids"]).logits
print(f"{(found - wanted['logits']).abs().max().item():.3g}")
"""


def _trained(subject: Subject) -> tuple[VariantLMHeadModel, torch.Tensor]:
    """Return ids (B, S) and a model after three steps, so that all that it keeps has moved from where it began."""
    model, ids = subject.model(tokens=48).train(), subject.ids(2, 48)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval(), ids


def saved_whole(subject: Subject) -> str | None:
    """A trained model that is saved and loaded, in a process with another seed, has the same logits bit for bit."""
    model, ids = _trained(subject)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        torch.manual_seed(1234)
        both: Any = type(model).from_pretrained(folder, output_loading_info=True)
        loaded, about = both
        if missing := sorted(set(about["missing_keys"]) - {"lm_head.weight"}):
            return f"{missing[0]} is not saved"
        moved = (loaded.eval()(ids).logits - model(ids).logits).abs().max().item()
    if moved == 0:
        return None
    saved, now = dict(loaded.named_buffers()), dict(model.named_buffers())
    lost = [name for name, value in now.items() if not torch.equal(value.float(), saved[name].float())]
    of = f": the buffer {lost[0]} is not saved" if lost else ""
    return f"the logits of the saved model are others once it is loaded, by {moved:.2g}{of}"


def exports_without_package(subject: Subject) -> str | None:
    """An export loads by transformers alone, in a process without this package, and has the same logits."""
    from ..export import export
    from .tokenizer import small_tokenizer

    model, ids = _trained(subject)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = {n: p.detach() for n, p in model.state_dict().items() if n != "lm_head.weight"}
        export(subject.variant, model.config, weights, small_tokenizer(), 48, folder / "model")
        with torch.no_grad():
            torch.save({"ids": ids, "logits": model(ids).logits}, folder / "wanted.pt")
        (folder / "load.py").write_text(textwrap.dedent(_LOAD))
        env = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, str(folder / "load.py"), str(folder / "model"), str(folder / "wanted.pt")]
        ended = subprocess.run(command, env=env, capture_output=True, text=True)
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-1] if ended.stderr.strip() else f"exit code {ended.returncode}"
        return f"its export does not load without this package: {last}"
    if float(moved := ended.stdout.split()[-1]) > 1e-5:
        return f"its export has other logits without this package, by {moved}"
    return None
