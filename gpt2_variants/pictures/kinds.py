"""A picture, and the kinds of figures that the families draw theirs with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import drawing


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


def mean_and_sd(values: Any) -> tuple[float, float]:
    """Return the mean of all `values` and their standard deviation, of the population."""
    return float(values.mean()), float(values.std(correction=0))


def heatmap(values: Any, label: str) -> Any:
    """Draw `values` (L, H) as coloured cells, with their numbers where there is room."""
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


def histogram(values: Any, label: str, start: tuple[Any, Any], span: tuple[float, float]) -> Any:
    """Draw the density of all `values`, and the line `start` (x, y) of their density before training."""
    figure, axes = drawing.new_axes()
    axes.hist(values.flatten().numpy(), bins=40, range=span, density=True, color=drawing.PALETTE[0], label="trained")
    axes.plot(*(part.numpy() for part in start), color=drawing.INK, linewidth=1.6, label="at the start")
    axes.set(xlabel=label, ylabel="density", xlim=span, ylim=(0, axes.get_ylim()[1] * 1.22))
    axes.legend(frameon=False, fontsize=11, ncols=2, loc="upper left")
    return figure


def frequency_map(values: Any) -> Any:
    """Draw `values` (L, H, D/2) as coloured cells, a row for each head, a line between layers."""
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


def bars(values: Any, label: str, level: float) -> Any:
    """Draw a bar for each pair, from `level`, with its number where there is room."""
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
