"""What all tests share: no network, no W&B, small thread pools, tiny models."""

import os

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
os.environ.pop("WANDB_API_KEY", None)

from pathlib import Path

import pytest
import torch

from gpt2_variants import VARIANTS

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden"


def tiny(variant: str, seed: int = 0, attn_implementation: str = "sdpa", **fields):
    """A small model of `variant` in eval mode: 2 layers, width 32, 4 heads, 48 positions, 67 entries."""
    values = {"n_layer": 2, "n_embd": 32, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0, **fields}
    config = VARIANTS[variant].make_config("nano", 67, **{"n_positions": 48, **values})
    torch.manual_seed(seed)
    return VARIANTS[variant].model_class._from_config(config, attn_implementation=attn_implementation).eval()


@pytest.fixture(params=sorted(VARIANTS))
def variant(request) -> str:
    """Every variant's name, one after the other."""
    return request.param


def random_ids(batch: int = 2, tokens: int = 24, seed: int = 1) -> torch.Tensor:
    """(batch, tokens) ids below 67, without the mask entry."""
    return torch.randint(0, 67, (batch, tokens), generator=torch.Generator().manual_seed(seed))
