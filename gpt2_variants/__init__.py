"""GPT-2 variants beside the GPT-2 baseline: built from Hugging Face's blocks, trained by DeepSpeed, measured alike.

Importing the package imports neither torch nor transformers. `register()` makes transformers' Auto classes know the
variants; so does asking a record of `VARIANTS` for its classes, and importing the package after transformers.
"""

import sys

from .registry import VARIANTS, register

__version__ = "0.1.0"
__all__ = ["VARIANTS", "__version__", "register"]

if sys.modules.get("transformers") is not None:  # its price is paid, and its user may go on to the Auto classes
    register()
