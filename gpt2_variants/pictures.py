"""What a variant learned, drawn from an exported model: what it adds to GPT-2, layer by layer.

A picture is of what the model computes with, read off its own modules. A plain GPT-2 has none, nor has a variant that
no function here knows.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import drawing
from .data import DataError, load_tokens
from .faults import UsageError
from .inference import SavedModel

PASSAGE = 256  # tokens of the held-out text that a parallel model's pairs are looked at on, at most
VISIBLE = 6  # tokens that duo-predict's pattern is drawn for


@dataclass(frozen=True)
class Picture:
    """One figure.

    Attributes:
        name: of letters and dashes; no two pictures of a model have the same.
        title: a few words.
        caption: what it shows, how it was computed, and what it is to be held against.
        draw: makes the matplotlib figure, under `drawing.look()`.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[], Any]


def pictures_of(model_folder: Path) -> list[Picture]:
    """The pictures of the model in a folder: an export, or a checkpoint of a variant with its tokenizer.

    Raises:
        UsageError: there is no model, it cannot be loaded, or the text that it is looked at on cannot be had.
    """
    saved = SavedModel(model_folder)
    # Beside a training that has just ended the GPU may be full; the pictures need little.
    saved.device = "cpu"
    return MAKERS.get(saved.config.model_type, _learned)(saved)


def save_png(model_folder: Path, into: Path) -> list[tuple[str, str]]:
    """Save the pictures of a model as PNGs in the folder `into`, which is made if need be.

    Returns:
        (file name, caption) of each; none for a GPT-2.

    Raises:
        UsageError: as `pictures_of`; or matplotlib is missing.
    """
    drawing.need_matplotlib()
    pictures = pictures_of(model_folder)
    into.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        with drawing.look():
            figure = picture.draw()
        drawing.png(figure, into / f"{picture.name}.png")
    return [(f"{picture.name}.png", picture.caption) for picture in pictures]


# --- the numbers ------------------------------------------------------------------------------------------------------


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


def frequencies(model: Any) -> Any:
    """The frequencies that a rotating-head model uses, (L, H, D/2), in radians per position; after its norm, if any."""
    import torch

    one = torch.ones(1)  # the angle at position 1
    with torch.no_grad():
        return torch.stack([block.attn.rope(one)[:, 0] for block in model.transformer.h])


def pair_similarity(model: Any, ids: Any) -> tuple[Any, Any]:
    """How alike the two blocks of each pair of a parallel model are on ids (1, S).

    With h what both read and L and R what they give, each with its residual connection, the updates are L - h and
    R - h, (S, E).

    Returns:
        cosine: (pairs,), of the angle between the updates, mean over the tokens.
        ratio: (pairs,), |R - h| / |L - h|, mean over the tokens.
    """
    import torch
    from torch.nn import functional

    updates = []
    blocks = list(model.transformer.h)
    hooks = [
        block.register_forward_hook(lambda _, inputs, output: updates.append((output - inputs[0])[0].float()))
        for block in blocks
    ]
    try:
        with torch.no_grad():
            model.transformer(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    left, right = torch.stack(updates[::2]), torch.stack(updates[1::2])  # (pairs, S, E)
    cosine = functional.cosine_similarity(left, right, dim=-1).mean(1)
    return cosine, (right.norm(dim=-1) / left.norm(dim=-1)).mean(1)


def visibility(num_tokens: int, neighbour: bool) -> Any:
    """What each position of duo-predict's two streams attends to, bool (2S-1, 2S-1) over t_1..t_S m_1..m_{S-1}."""
    import torch

    from .models.modeling_duo_predict import infill_visibility

    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    tokens = torch.cat([causal, torch.zeros(num_tokens, num_tokens - 1, dtype=torch.bool)], dim=1)
    return torch.cat([tokens, infill_visibility(num_tokens, neighbour)])


# --- the pictures of each kind of model -------------------------------------------------------------------------------


def _learned(saved: SavedModel) -> list[Picture]:
    """A heat map of each of the tensors (L, columns) that a user's own variant says it learned."""
    return [
        Picture(
            name=f"learned-{number}",
            title=title,
            caption=f"{title}, by layer, as the model's `learned` gives it.",
            draw=functools.partial(_heatmap, values.detach().float(), title),
        )
        for number, (title, values) in enumerate(saved.model.learned().items(), start=1)
    ]


def _drift_diffusion(saved: SavedModel) -> list[Picture]:
    import torch

    pictures = []
    normal = torch.distributions.Normal(0.0, 1.0)
    x = torch.linspace(0.002, 0.998, 200)
    logit = torch.log(x / (1 - x))
    gate_start = normal.log_prob(logit).exp() / (x * (1 - x))
    if (gates := drift_gates(saved.model)) is not None:
        mean, sd = _mean_and_sd(gates)
        formula, origin = "a + sigmoid(d) (a - b)", "the baseline b"
        if not saved.config.baseline_each_head:
            formula, origin = "a + sigmoid(d) a", "zero"
        pictures += [
            Picture(
                "drift-gates",
                "Drift gates by layer and head",
                f"The gate sigmoid(d) of {formula}, mean over the channels of each head. 0: the head's output a is "
                f"left as it is; 1: it is pushed as far again from {origin}. d starts as N(0, 1): a mean of 0.5.",
                lambda: _heatmap(gates.mean(-1), "mean gate"),
            ),
            Picture(
                "drift-gates-all",
                "All drift gates, and their start",
                f"The gates of all layers, heads and channels: mean {mean:.3f}, standard deviation {sd:.3f}. The line "
                "is their distribution before training, of sigmoid(d) with d from N(0, 1): mean 0.500, standard "
                "deviation 0.208. The closer the two, the less the training has moved them.",
                lambda: _histogram(gates, "sigmoid(d)", (x, gate_start), (0, 1)),
            ),
        ]
    if (scales := diffusion_scales(saved.model)) is not None:
        mean, sd = _mean_and_sd(scales)
        most = float(max(4.0, scales.max()))
        grid = torch.linspace(0, most, 200)
        pictures += [
            Picture(
                "diffusion-scales",
                "Diffusion scales by layer and head",
                "The scale |g| of the noise in a + g eps, eps from N(0, 1), in training only; mean over the "
                "channels of each head. g starts as N(0, 1), which gives a mean |g| of 0.798; 0 is no noise.",
                lambda: _heatmap(scales.mean(-1), "mean |g|"),
            ),
            Picture(
                "diffusion-scales-all",
                "All diffusion scales, and their start",
                f"The scales |g| of all layers, heads and channels: mean {mean:.3f}, standard deviation {sd:.3f}. The "
                "line is their distribution before training, of |g| with g from N(0, 1): mean 0.798, standard "
                "deviation 0.603. Left of it: the training has turned the noise down.",
                lambda: _histogram(scales, "|g|", (grid, 2 * normal.log_prob(grid).exp()), (0, most)),
            ),
        ]
    return pictures


def _rotating_head(saved: SavedModel) -> list[Picture]:
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
            lambda: _frequency_map(found.abs().sort(-1).values),
        )
    ]
    if not (learned or normed):
        return pictures
    mean, sd = _mean_and_sd(found)
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
            lambda: _histogram(found, "f, radians per position", line, (-most, most)),
        )
    )
    return pictures


def _duo_predict(saved: SavedModel) -> list[Picture]:
    layers = saved.config.n_layer
    what = (
        "Each row attends to the filled columns; t_k is token k, m_k the mask slot that predicts token k from its past "
        "and its right neighbour (the one in another colour). This is the model's pattern, for 6 tokens; it is not "
        "learned. "
    )
    if not saved.config.leak_free or layers == 1:
        leak = (
            "The slots see their right neighbours in every layer, as published. From the second layer on a neighbour's "
            "state holds the very token that the slot is to predict: a leak."
            if layers > 1
            else "It has one layer."
        )
        name = "all layers" if layers > 1 else "the one layer"
        return [Picture("visibility", f"Who sees whom, {name}", what + leak, lambda: _pattern(True))]
    later = "in layer 2" if layers == 2 else f"in layers 2 to {layers}"
    return [
        Picture(
            "visibility-first-layer",
            "Who sees whom, in the first layer",
            what + "In the first layer a neighbour's state is its embedding and holds nothing of token k.",
            lambda: _pattern(True),
        ),
        Picture(
            "visibility-later-layers",
            f"Who sees whom, {later}",
            "As in the first layer, but a slot no longer sees its right neighbour, whose state holds token k by then; "
            "what the slot read of it in the first layer it keeps in its own state.",
            lambda: _pattern(False),
        ),
    ]


def _parallel(saved: SavedModel) -> list[Picture]:
    import torch

    try:
        tokens = load_tokens("builtin", saved.tokenizer_name, saved.block_size, "validation")
    except DataError as err:
        raise UsageError(str(err).splitlines()) from err
    tokens = tokens[: min(PASSAGE, saved.config.n_positions)]
    saved.check_ids(int(tokens.max()))
    cosine, ratio = pair_similarity(saved.model, torch.as_tensor(tokens.astype("int64"))[None])
    on = (
        f"on the first {len(tokens)} tokens of the built-in corpus's held-out topics, in the model's own tokens, "
        "without dropout. Both blocks of a pair read the same h; their updates of it are L - h and R - h."
    )
    return [
        Picture(
            "pair-cosine",
            "How alike the two blocks of a pair are",
            "The cosine of the angle between the updates of a pair's two blocks, mean over the tokens, "
            + on
            + " 1: both "
            "do the same and one would do; 0: they have nothing in common; below 0: one undoes the other in part.",
            lambda: _bars(cosine, "cosine of the two updates", 0.0),
        ),
        Picture(
            "pair-ratio",
            "How much the two blocks of a pair change",
            "The length of the second block's update over the first's, |R - h| / |L - h|, mean over the tokens, " + on,
            lambda: _bars(ratio, "|R - h| / |L - h|", 1.0),
        ),
    ]


MAKERS: dict[str, Callable[[SavedModel], list[Picture]]] = {
    "dd-gpt2": _drift_diffusion,
    "rotating-head-gpt2": _rotating_head,
    "duo-predict-gpt2": _duo_predict,
    "parallel-gpt2": _parallel,
}


def _mean_and_sd(values: Any) -> tuple[float, float]:
    return float(values.mean()), float(values.std(correction=0))


# --- how they are drawn -----------------------------------------------------------------------------------------------


def _heatmap(values: Any, label: str) -> Any:
    """`values` (L, H) as coloured cells, with their numbers where there is room."""
    figure, axes = drawing.new_axes(fitted=True)
    layers, heads = values.shape
    image = axes.imshow(values.numpy(), cmap="cividis", aspect="auto", interpolation="none")
    bar = figure.colorbar(image, ax=axes, label=label)
    bar.outline.set_visible(False)
    _count_from_1(axes.xaxis, heads, "head")
    _count_from_1(axes.yaxis, layers, "layer")
    axes.spines[:].set_visible(False)
    if layers <= 12 and heads <= 8:
        for layer in range(layers):
            for head in range(heads):
                value = float(values[layer, head])
                pale = image.norm(value) > 0.55
                colour = "black" if pale else "white"
                axes.text(head, layer, f"{value:.2f}", ha="center", va="center", size=10, color=colour)
    return figure


def _count_from_1(axis: Any, count: int, label: str) -> None:
    every = max(1, -(-count // 8))
    ticks = [*range(0, count, every)]
    axis.set_ticks(ticks, [str(tick + 1) for tick in ticks])
    axis.set_tick_params(length=0)
    axis.set_label_text(label)


def _histogram(values: Any, label: str, start: tuple[Any, Any], span: tuple[float, float]) -> Any:
    """The density of all `values`, and the line `start` (x, y) of their density before training."""
    figure, axes = drawing.new_axes()
    axes.hist(values.flatten().numpy(), bins=40, range=span, density=True, color=drawing.PALETTE[0], label="trained")
    axes.plot(*(part.numpy() for part in start), color=drawing.INK, linewidth=1.6, label="at the start")
    axes.set(xlabel=label, ylabel="density", xlim=span, ylim=(0, axes.get_ylim()[1] * 1.22))
    axes.legend(frameon=False, fontsize=11, ncols=2, loc="upper left")
    return figure


def _frequency_map(values: Any) -> Any:
    """`values` (L, H, D/2) as coloured cells, a row for each head, a line between layers."""
    from matplotlib.colors import LogNorm

    figure, axes = drawing.new_axes(fitted=True)
    layers, heads, pairs = values.shape
    # a frequency this low turns a pair by less than a degree over any sequence
    norm = LogNorm(vmin=max(float(values.min()), 1e-5), vmax=float(values.max()), clip=True)
    rows = values.reshape(layers * heads, pairs).clamp(min=1e-5).numpy()
    image = axes.imshow(rows, cmap="cividis", norm=norm, aspect="auto", interpolation="none")
    bar = figure.colorbar(image, ax=axes, label="|f|, radians per position")
    bar.outline.set_visible(False)
    _count_from_1(axes.xaxis, pairs, "pair of channels, from slow to fast")
    every = max(1, -(-layers // 8))
    ticks = [(layer + 0.5) * heads - 0.5 for layer in range(0, layers, every)]
    axes.yaxis.set_ticks(ticks, [str(layer + 1) for layer in range(0, layers, every)])
    axes.yaxis.set_tick_params(length=0)
    axes.set_ylabel("layer, and in it the heads")
    axes.spines[:].set_visible(False)
    for layer in range(1, layers):
        axes.axhline(layer * heads - 0.5, color="white", linewidth=min(1.2, 8 / layers))
    return figure


def _pattern(neighbour: bool) -> Any:
    from matplotlib.patches import Rectangle

    figure, axes = drawing.new_axes((5.2, 4.6))
    figure.subplots_adjust(left=0.13, right=0.985, bottom=0.02, top=0.87)
    seen = visibility(VISIBLE, neighbour)
    size = len(seen)
    for row, column in seen.nonzero().tolist():
        # of slot m_k, row S + k, the right neighbour t_{k+1} is column k + 1
        to_the_right = row >= VISIBLE and column == row - VISIBLE + 1
        colour = drawing.PALETTE[1] if to_the_right else drawing.PALETTE[0]
        axes.add_patch(Rectangle((column - 0.44, row - 0.44), 0.88, 0.88, color=colour, linewidth=0))
    names = [*(f"t{k + 1}" for k in range(VISIBLE)), *(f"m{k + 1}" for k in range(VISIBLE - 1))]
    names = [name.translate(str.maketrans("123456", "₁₂₃₄₅₆")) for name in names]
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), ylabel="this position", xlabel="attends to")
    axes.set_xticks(range(size), names)
    axes.set_yticks(range(size), names)
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for edge in range(size + 1):
        width = 1.6 if edge == VISIBLE else 0.5
        colour = drawing.MUTED if edge == VISIBLE else drawing.FAINT
        axes.axhline(edge - 0.5, color=colour, linewidth=width, zorder=0.5)
        axes.axvline(edge - 0.5, color=colour, linewidth=width, zorder=0.5)
    return figure


def _bars(values: Any, label: str, level: float) -> Any:
    """A bar for each pair, from `level`, with its number where there is room."""
    figure, axes = drawing.new_axes()
    numbers = values.tolist()
    places = range(len(numbers))
    axes.bar(places, [value - level for value in numbers], bottom=level, color=drawing.PALETTE[2], width=0.6)
    axes.axhline(level, color=drawing.MUTED, linewidth=1)
    few = len(numbers) <= 6
    if few:
        for place, value in zip(places, numbers, strict=True):
            up = value >= level
            axes.annotate(
                f"{value:.2f}",
                (place, value),
                xytext=(0, 3 if up else -3),
                textcoords="offset points",
                ha="center",
                va="bottom" if up else "top",
                size=11,
            )
    axes.margins(y=0.18)
    names = [f"{2 * n + 1}, {2 * n + 2}" if few else str(2 * n + 1) for n in places]
    axes.set_xticks(places, names)
    axes.tick_params(axis="x", length=0)
    axes.set(xlabel="pair of layers" if few else "first layer of the pair", ylabel=label)
    return figure
