"""The pictures of a saved model, whichever family it is of."""

import functools
from collections.abc import Callable
from pathlib import Path

from .. import drawing
from ..inference import SavedModel
from . import drift_diffusion, duo_predict, parallel, rotating_head
from .kinds import Picture, heatmap


def _learned(saved: SavedModel) -> list[Picture]:
    """Return a heat map of each of the tensors (L, columns) that a user's own variant says it learned."""
    return [
        Picture(
            name=f"learned-{number}",
            title=title,
            caption=f"{title}, by layer, as the model's `learned` gives it.",
            draw=functools.partial(heatmap, values.detach().float(), title),
        )
        for number, (title, values) in enumerate(saved.model.learned().items(), start=1)
    ]


MAKERS: dict[str, Callable[[SavedModel], list[Picture]]] = {
    "dd-gpt2": drift_diffusion.pictures,
    "rotating-head-gpt2": rotating_head.pictures,
    "duo-predict-gpt2": duo_predict.pictures,
    "parallel-gpt2": parallel.pictures,
}


def pictures_of(model_folder: Path) -> list[Picture]:
    """Return the pictures of the model in a folder: an export, or a checkpoint of a variant with its tokenizer.

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
