"""GPT-2's activation, in training as one fused kernel."""

import torch
import torch.nn.functional as F
from transformers.activations import NewGELUActivation


class TrainedNewGELU(NewGELUActivation):
    """The tanh approximation of GELU: in evaluation by the formula of transformers, to the bit, in training by torch's.

    They are the same function but for rounding. Outside of `torch.compile` the formula makes eight tensors and keeps
    most of them for the backward pass; torch's kernel keeps its input alone, and rounds once.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(...) -> (...), element by element."""
        return F.gelu(input, approximate="tanh") if self.training else super().forward(input)
