"""What duo-predict adds: whom each position of its two streams sees."""

from typing import Any

from .. import drawing
from ..inference import SavedModel
from .kinds import Picture

VISIBLE = 6  # tokens that duo-predict's pattern is drawn for


def visibility(num_tokens: int, neighbour: bool) -> Any:
    """Return what each position of both streams attends to, bool (2S-1, 2S-1) over t_1..t_S m_1..m_{S-1}."""
    import torch

    from ..models.modeling_duo_predict import infill_visibility

    causal = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    tokens = torch.cat([causal, torch.zeros(num_tokens, num_tokens - 1, dtype=torch.bool)], dim=1)
    return torch.cat([tokens, infill_visibility(num_tokens, neighbour)])


def pictures(saved: SavedModel) -> list[Picture]:
    """Return the pattern of attention of a duo-predict model, which differs by layer where it does not leak."""
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
