"""Losses of twenty small training steps of every variant, recorded once: what was to change nothing is seen here.

`python tests/test_golden_losses.py` records them anew in `golden_losses.json`, where a change of them is
meant, or for a new variant.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import VARIANTS, random_ids, tiny

RECORDED = Path(__file__).parent / "golden_losses.json"


def losses(variant: str) -> list[float]:
    """Of 20 steps of AdamW in float32 with dropout, then the summed losses of each stream in evaluation."""
    model = tiny(variant, n_layer=4, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(11)
    found = []
    for step in range(20):
        ids = random_ids(4, 32, seed=100 + step)
        loss = model(ids, labels=ids, skip_logits=step % 2 == 0).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found + [scores.nll.double().sum().item() for scores in model.eval().score(random_ids(3, 40)).values()]


@pytest.mark.parametrize(("variant", "recorded"), json.loads(RECORDED.read_text()).items())
def test_golden_losses(variant, recorded):
    assert losses(variant) == pytest.approx(recorded, rel=1e-5)


if __name__ == "__main__":
    RECORDED.write_text(json.dumps({variant: losses(variant) for variant in sorted(VARIANTS)}, indent=1) + "\n")
