"""The precision of sums and softmaxes, whatever the dtype of the model around them."""

import torch


def float32_or_better(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in float32, or in its own dtype where that is wider."""
    return x.float() if x.dtype.itemsize < torch.float32.itemsize else x
