"""What would be trained on: files, column, splits, tokens, blocks as text, and what both parts have in common."""

from __future__ import annotations

import numpy as np

from .blocks import BlockDataset
from .cache import Data

WINDOW = 32  # tokens
MOST_WINDOWS = 20_000  # of the validation part that are looked for
SHOWN_CHARACTERS = 400


def describe(data: Data, seed: int = 0) -> str:
    """Return lines on `data`; a random training block is drawn by `seed`."""
    shared, looked_for = shared_windows(data.train, data.validation)
    number = int(np.random.default_rng(seed).integers(len(data.train)))
    lines = [
        *(f"{'reading' if i == 0 else '':<11} {note}" for i, note in enumerate(data.notes)),
        f"data        {data.description}",
        f"fingerprint {data.fingerprint}",
        f"blocks      train {len(data.train):,}, validation {len(data.validation):,}",
        f"first block {_text(data, 0)}",
        f"block {number:<5} {_text(data, number)}",
        f"duplicates  {shared:,} of {looked_for:,} windows of {WINDOW} tokens of the validation part are in the "
        "training part too",
    ]
    return "\n".join(lines)


def _text(data: Data, number: int) -> str:
    ids = data.train.__getitems__([number])["input_ids"][0].tolist()
    text = repr(data.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def shared_windows(train: BlockDataset, validation: BlockDataset) -> tuple[int, int]:
    """Count the windows of validation tokens that stand somewhere in the training tokens too.

    Returns:
        How many of those that were looked for are there, and how many were looked for: windows one after the other, at
        most `MOST_WINDOWS`, spread over the validation part. Compared by a 64-bit hash.
    """
    tokens = validation.tokens()
    starts = np.arange(0, len(tokens) - WINDOW + 1, WINDOW)
    starts = starts[:: -(-len(starts) // MOST_WINDOWS) or 1]
    if not len(starts):
        return 0, 0
    wanted = _hashes(tokens)[starts]
    found = np.zeros(len(wanted), dtype=bool)
    rest = np.empty(0, dtype=tokens.dtype)
    for part in train.token_batches():
        stream = np.concatenate([rest, part])
        if len(stream) >= WINDOW:
            found |= np.isin(wanted, _hashes(stream))
        rest = stream[-(WINDOW - 1) :]
    return int(found.sum()), len(wanted)


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """Return a hash of every window of `tokens` (N,): uint64, (N - WINDOW + 1,)."""
    count = len(tokens) - WINDOW + 1
    mixed = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    total = np.zeros(max(count, 0), dtype=np.uint64)
    for place in range(WINDOW):
        total = total * np.uint64(0xBF58476D1CE4E5B9) + mixed[place : place + count]
    return total
