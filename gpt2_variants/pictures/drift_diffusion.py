"""What drift and diffusion add: the gates of the drift and the scales of the noise."""

from collections.abc import Callable
from typing import Any

from ..inference import SavedModel
from .kinds import Picture, heatmap, histogram, mean_and_sd


def drift_gates(model: Any) -> Any:
    """sigmoid(d) of a drift-diffusion model, (L, H, D) in 0 to 1; None without drift."""
    return _stacked(model, lambda attention: attention.drift_param, lambda d: d.sigmoid())


def diffusion_scales(model: Any) -> Any:
    """|g| of a drift-diffusion model, (L, H, D); None without diffusion."""
    return _stacked(model, lambda attention: attention.diffusion_param, lambda g: g.abs())


def _stacked(model: Any, parameter: Callable, transform: Callable) -> Any:
    import torch

    found = [parameter(block.attn) for block in model.transformer.h]
    if any(p is None for p in found):
        return None
    return torch.stack([transform(p.detach().float()) for p in found])


def pictures(saved: SavedModel) -> list[Picture]:
    """Return the drift gates and the diffusion scales of a model, as far as it has them."""
    import torch

    pictures = []
    normal = torch.distributions.Normal(0.0, 1.0)
    x = torch.linspace(0.002, 0.998, 200)
    logit = torch.log(x / (1 - x))
    gate_start = normal.log_prob(logit).exp() / (x * (1 - x))
    if (gates := drift_gates(saved.model)) is not None:
        mean, sd = mean_and_sd(gates)
        formula, origin = "a + sigmoid(d) (a - b)", "the baseline b"
        if not saved.config.baseline_each_head:
            formula, origin = "a + sigmoid(d) a", "zero"
        pictures += [
            Picture(
                "drift-gates",
                "Drift gates by layer and head",
                f"The gate sigmoid(d) of {formula}, mean over the channels of each head. 0: the head's output a is "
                f"left as it is; 1: it is pushed as far again from {origin}. d starts as N(0, 1): a mean of 0.5.",
                lambda: heatmap(gates.mean(-1), "mean gate"),
            ),
            Picture(
                "drift-gates-all",
                "All drift gates, and their start",
                f"The gates of all layers, heads and channels: mean {mean:.3f}, standard deviation {sd:.3f}. The line "
                "is their distribution before training, of sigmoid(d) with d from N(0, 1): mean 0.500, standard "
                "deviation 0.208. The closer the two, the less the training has moved them.",
                lambda: histogram(gates, "sigmoid(d)", (x, gate_start), (0, 1)),
            ),
        ]
    if (scales := diffusion_scales(saved.model)) is not None:
        mean, sd = mean_and_sd(scales)
        most = float(max(4.0, scales.max()))
        grid = torch.linspace(0, most, 200)
        pictures += [
            Picture(
                "diffusion-scales",
                "Diffusion scales by layer and head",
                "The scale |g| of the noise in a + g eps, eps from N(0, 1), in training only; mean over the "
                "channels of each head. g starts as N(0, 1), which gives a mean |g| of 0.798; 0 is no noise.",
                lambda: heatmap(scales.mean(-1), "mean |g|"),
            ),
            Picture(
                "diffusion-scales-all",
                "All diffusion scales, and their start",
                f"The scales |g| of all layers, heads and channels: mean {mean:.3f}, standard deviation {sd:.3f}. The "
                "line is their distribution before training, of |g| with g from N(0, 1): mean 0.798, standard "
                "deviation 0.603. Left of it: the training has turned the noise down.",
                lambda: histogram(scales, "|g|", (grid, 2 * normal.log_prob(grid).exp()), (0, most)),
            ),
        ]
    return pictures
