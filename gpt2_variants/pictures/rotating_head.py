"""What rotating heads add: the frequencies that queries and keys are rotated by."""

from typing import Any

from ..inference import SavedModel
from .kinds import Picture, frequency_map, histogram, mean_and_sd


def frequencies(model: Any) -> Any:
    """Return the frequencies that a rotating-head model uses, (L, H, D/2), in radians a position, after any norm."""
    import torch

    one = torch.ones(1)  # the angle at position 1
    with torch.no_grad():
        return torch.stack([block.attn.rope(one)[:, 0] for block in model.transformer.h])


def pictures(saved: SavedModel) -> list[Picture]:
    """Return the frequencies of a rotating-head model, and where they are not fixed their start."""
    import torch
    from torch.nn import functional

    found = frequencies(saved.model)
    learned, normed = saved.config.rotatinghead == "lr", saved.config.use_norm
    through = ", after the LayerNorm that they pass through" if normed else ""
    origin = "learned" if learned else "fixed in geometric progression"
    pictures = [
        Picture(
            "frequencies",
            "Frequencies by layer and head",
            f"The frequencies |f| that queries and keys are rotated by, in radians per position, as used: {origin}"
            f"{through}. A row is a head; its pairs of channels stand from slow to fast. A pair that turns by little "
            "tells distant positions apart, one that turns by much near ones.",
            lambda: frequency_map(found.abs().sort(-1).values),
        )
    ]
    if not (learned or normed):
        return pictures
    mean, sd = mean_and_sd(found)
    if learned:
        start = "N(0, 1), passed through a LayerNorm without learned scale and shift" if normed else "N(0, 1)"
        most = float(max(4.0, found.abs().max()))
        grid = torch.linspace(-most, most, 400)
        line = (grid, torch.distributions.Normal(0.0, 1.0).log_prob(grid).exp())
        drawn = "The line is the density of N(0, 1)"
        if normed:
            drawn += ", which a norm over many channels leaves nearly as it is"
    else:
        attention: Any = saved.model.transformer.h[0].attn
        rope = attention.rope
        before = functional.layer_norm(rope.frequencies, rope.frequencies.shape[-1:], eps=rope.layer_norm.eps)
        start = "the fixed progression, passed through a LayerNorm without learned scale and shift"
        most = float(max(found.abs().max(), before.abs().max()))
        density, edges = torch.histogram(before.flatten(), bins=40, range=(-most, most), density=True)
        line = ((edges[1:] + edges[:-1]) / 2, density)
        drawn = "The line is their distribution then"
    caption = (
        f"The frequencies of all layers, heads and pairs, as used{through}: mean {mean:.3f}, standard deviation "
        f"{sd:.3f}. Before training: {start}. {drawn}. The closer the two, the less the training has moved them."
    )
    pictures.append(
        Picture(
            "frequencies-all",
            "All frequencies, and their start",
            caption,
            lambda: histogram(found, "f, radians per position", line, (-most, most)),
        )
    )
    return pictures
