"""What a variant learned, drawn from an exported model: what it adds to GPT-2, layer by layer.

A picture is of what the model computes with, read off its own modules. A plain GPT-2 has none, nor has a variant that
no function here knows.
"""

from .album import pictures_of, save_png
from .kinds import Picture

__all__ = ["Picture", "pictures_of", "save_png"]
