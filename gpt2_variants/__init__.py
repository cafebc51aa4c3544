"""GPT-2 variants beside the GPT-2 baseline: built from Hugging Face's blocks, trained by DeepSpeed, measured alike.

Importing the package registers the variants with transformers' Auto classes; it needs neither deepspeed nor wandb.
"""

import sys
from pathlib import Path

from .registry import VARIANTS

__version__ = "0.1.0"
__all__ = ["VARIANTS", "__version__"]


def _prints_help() -> bool:
    """Whether this process is a command of the package that will print its help, which needs no Auto classes."""
    words = sys.orig_argv[1:]
    own = any(word == __name__ or Path(word).name == "train_ds.py" for word in words)
    return own and not {"-h", "--help"}.isdisjoint(words)


if not _prints_help():  # it takes torch and transformers, some seconds
    for _variant in VARIANTS.values():
        _variant.register()
