"""What parallel blocks add: how alike the two blocks of each pair are."""

from typing import Any

from ..data import DataError, load_tokens
from ..faults import UsageError
from ..inference import SavedModel
from .kinds import Picture, bars

PASSAGE = 256  # tokens of the held-out text that a parallel model's pairs are looked at on, at most


def pair_similarity(model: Any, ids: Any) -> tuple[Any, Any]:
    """Return how alike the two blocks of each pair of a parallel model are on ids (1, S).

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


def pictures(saved: SavedModel) -> list[Picture]:
    """Draw how alike the blocks of each pair of a parallel model are, on text; raise `UsageError` without that text."""
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
            lambda: bars(cosine, "cosine of the two updates", 0.0),
        ),
        Picture(
            "pair-ratio",
            "How much the two blocks of a pair change",
            "The length of the second block's update over the first's, |R - h| / |L - h|, mean over the tokens, " + on,
            lambda: bars(ratio, "|R - h| / |L - h|", 1.0),
        ),
    ]
