"""GPT-2 variants beside the GPT-2 baseline: built from Hugging Face's blocks, trained by DeepSpeed, measured alike.

Importing the package registers the variants with transformers' Auto classes; it needs neither deepspeed nor wandb.
"""

from .registry import VARIANTS

__version__ = "0.1.0"
__all__ = ["VARIANTS", "__version__"]

for _variant in VARIANTS.values():
    _variant.register()
