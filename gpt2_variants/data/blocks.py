"""What comes out: blocks of token ids, and the order in which they are read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from .arrow import flat_ids

if TYPE_CHECKING:
    import datasets
    import torch


PAD = -1
"""Index of a row that fills up a short batch: input ids of block 0, every label -100 (ignored by the loss)."""


class BlockDataset:
    """Blocks of S token ids on disk, memory-mapped: a map-style data set for `torch.utils.data.DataLoader`.

    Attributes:
        block_size: S, tokens per block.
    """

    def __init__(self, rows: datasets.Dataset) -> None:
        """Wrap rows whose column `input_ids` is a list of fixed length S."""
        self.block_size: int = rows.features["input_ids"].length
        self._rows = rows.with_format("arrow", columns=["input_ids"])

    @property
    def rows(self) -> datasets.Dataset:
        """The blocks as `datasets` has them, one a row, giving plain lists."""
        return self._rows.with_format(None)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Read n blocks.

        Args:
            indices: n block numbers; `PAD` gives a row that no loss counts.

        Returns:
            `input_ids` and `labels`, int64 tensors of shape (n, S). Labels are the ids themselves, not shifted.
        """
        import torch

        is_pad = torch.tensor(indices, dtype=torch.int64) == PAD
        table = self._rows[[0 if index == PAD else index for index in indices]]
        input_ids = torch.from_numpy(flat_ids(table).astype(np.int64)).view(-1, self.block_size)
        return {"input_ids": input_ids, "labels": input_ids.masked_fill(is_pad[:, None], -100)}

    def tokens(self) -> np.ndarray:
        """Return all ids, block after block: shape (number of blocks * S,)."""
        return np.concatenate(list(self.token_batches()))

    def token_batches(self) -> Iterator[np.ndarray]:
        """Return the same in pieces of some blocks each."""
        for table in self._rows.iter(batch_size=1024):
            yield flat_ids(table)

    def token_counts(self, vocab_size: int, start: int = 0) -> np.ndarray:
        """Count every token id at the positions `start` to S-1 of all blocks; int64, shape (vocab_size,)."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for table in self._rows.iter(batch_size=1024):
            ids = flat_ids(table).reshape(-1, self.block_size)[:, start:]
            counts += np.bincount(ids.ravel(), minlength=vocab_size)
        return counts


class GlobalBatchSampler:
    """The micro-batches of one rank, such that a global batch is the same set of blocks on any number of ranks.

    Epoch e visits all blocks in the order `np.random.default_rng([seed, e]).permutation(num_blocks)`. Step s, counted
    from 0 over all epochs, lies in epoch s // steps_per_epoch and takes that epoch's next `batch_size` blocks; an
    epoch's last batch is filled up with `PAD`. Rank r takes the r-th of `world_size` contiguous slices and cuts it
    into micro-batches. Nothing has to be saved but the step: a resumed run starts at `start_step` and reads no
    earlier block.

    In an epoch's last step whole micro-batches may be `PAD`: divide a loss by the labels that count in the global
    batch, not by those of a micro-batch.
    """

    def __init__(
        self,
        num_blocks: int,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        *,
        num_steps: int,
        start_step: int = 0,
    ) -> None:
        """Plan the steps `start_step` to `num_steps` - 1.

        Args:
            num_blocks: blocks in the data set.
            batch_size: blocks per optimizer step, over all ranks.
            micro_batch_size: blocks per forward pass of one rank.
            rank: this rank, 0 to `world_size` - 1.
            world_size: number of ranks.
            seed: of the order; with the epoch it gives the permutation.
            num_steps: optimizer steps of the whole run, those before `start_step` included.
            start_step: first step to give out, i.e. the number of steps done.

        Raises:
            ValueError: if `batch_size` is no multiple of `micro_batch_size` x `world_size`, or one is out of range.
        """
        if min(num_blocks, batch_size, micro_batch_size, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(
                f"num_blocks {num_blocks}, batch_size {batch_size}, micro_batch_size {micro_batch_size} and world_size "
                f"{world_size} must be at least 1, and rank {rank} between 0 and world_size - 1"
            )
        if batch_size % (micro_batch_size * world_size):
            raise ValueError(
                f"batch_size {batch_size} is no multiple of micro_batch_size {micro_batch_size} x {world_size} ranks; "
                "choose a micro_batch_size that divides batch_size / ranks"
            )
        self.num_blocks = num_blocks
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.num_steps = num_steps
        self.start_step = start_step

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch, a last short one included."""
        return math.ceil(self.num_blocks / self.batch_size)

    def __len__(self) -> int:
        """Micro-batches that this rank is given from `start_step` on."""
        per_step = self.batch_size // (self.micro_batch_size * self.world_size)
        return max(0, self.num_steps - self.start_step) * per_step

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = None, np.empty(0, dtype=np.int64)
        for step in range(self.start_step, self.num_steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = np.random.default_rng([self.seed, epoch]).permutation(self.num_blocks)
            first = step % self.steps_per_epoch * self.batch_size
            batch = np.full(self.batch_size, PAD, dtype=np.int64)
            blocks = order[first : first + self.batch_size]
            batch[: len(blocks)] = blocks
            # (world_size, micro-batches per step, micro_batch_size)
            yield from batch.reshape(self.world_size, -1, self.micro_batch_size)[self.rank].tolist()


def data_loader(
    dataset: BlockDataset, sampler: GlobalBatchSampler | list[list[int]], num_workers: int = 0, pin_memory: bool = False
) -> torch.utils.data.DataLoader:
    """Load the micro-batches that `sampler` lists, each a dict of (n, S) tensors from `BlockDataset.__getitems__`.

    Args:
        dataset: where the blocks are.
        sampler: `GlobalBatchSampler` for training, a list of `eval_batches` for evaluation.
        num_workers: processes that read ahead; 0 reads in this one.
        pin_memory: page-locked tensors, for copies to a CUDA device.
    """
    import torch.utils.data

    return torch.utils.data.DataLoader(
        dataset,  # type: ignore[arg-type]  # which need not inherit from torch's
        batch_sampler=sampler,
        collate_fn=_as_read,  # type: ignore[arg-type]  # of what __getitems__ returns, here no list
        num_workers=num_workers,
        pin_memory=pin_memory,
        # Every new iterator draws a seed. From the global generator that would change the dropout after a resume.
        generator=torch.Generator(),
    )


def _as_read(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return batch


def eval_batches(num_blocks: int, batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """Share blocks 0 to `num_blocks` - 1 among the ranks, each exactly once, for an evaluation.

    All ranks get the same number of batches (a rank with fewer would hang the others at ZeRO stage 3) and every batch
    has the same size (another shape would recompile); `PAD` fills the last ones.

    Args:
        num_blocks: blocks in the data set.
        batch_size: blocks per forward pass of one rank.
        rank: this rank, 0 to `world_size` - 1.
        world_size: number of ranks.

    Returns:
        This rank's batches of `batch_size` block numbers.
    """
    count = math.ceil(num_blocks / (batch_size * world_size))
    indices = np.full(count * world_size * batch_size, PAD, dtype=np.int64)
    indices[:num_blocks] = np.arange(num_blocks)
    return indices.reshape(count, world_size, batch_size)[:, rank].tolist()


def unigram_perplexity(train: BlockDataset, validation: BlockDataset, vocab_size: int) -> float:
    """Perplexity of a model that knows how often each token occurs, and nothing of context: what training must beat.

    The exponential of the mean cross-entropy of the validation tokens at positions 1 to S-1, those that a next-token
    model predicts, under the counts of all training tokens plus one for each of `vocab_size` entries (Laplace
    smoothing).
    """
    seen = train.token_counts(vocab_size) + 1
    predicted = validation.token_counts(vocab_size, start=1)
    surprise = np.log(seen.sum()) - np.log(seen)  # nats per token id
    return float(np.exp(predicted @ surprise / predicted.sum()))
