"""Text or tokens in, fixed blocks of token ids out, in an order that any number of ranks can share and resume.

    source (Hub set, local files, saved `datasets` folder, built-in corpus)
      -> rows of text  -> rows of token ids, no separator between rows  -> blocks of S ids  -> one cache folder

`load` prepares this once per source, tokenizer and block size and then memory-maps it. `GlobalBatchSampler` decides
which blocks an optimizer step sees; that hangs on the seed and the step alone, never on ranks or a restart.

Importing this file costs numpy only: torch, datasets, transformers and tokenizers are imported where they are used.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import network

if TYPE_CHECKING:
    import datasets
    import torch
    import transformers

PAD = -1
"""Index of a row that fills up a short batch: input ids of block 0, every label -100 (ignored by the loss)."""

FORMAT = 2
"""Version of the prepared data; raise it whenever the same source would give other blocks."""

END_OF_TEXT = "<|endoftext|>"
BUILTIN_VOCAB_SIZE = 4_000
BUILTIN_TRAINING_CHARACTERS = 20_000_000
HELD_OUT = 0.05  # of the rows, where a source has no split of its own

WIKITEXT = "wikitext-103"
WIKITEXT_READY = "BluebrainAI/wikitext-103-raw-v1-seq{}-tokenized-grouped"
WIKITEXT_READY_BLOCK_SIZES = (512, 1024)
WIKITEXT_RAW = "Salesforce/wikitext:wikitext-103-raw-v1"
WIKITEXT_ROWS_PER_BATCH = 40_000  # the published cut drops the remainder of every batch of so many rows
GPT2_ENTRIES = 50_257
GPT2_VOCABULARY = "71cca498f566a6fce90612118ffe70ec265ffdc746e7e6743a2253d346af4d30"  # see _vocabulary_digest

FILE_KINDS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
FOREIGN_SUFFIXES = {".arrow", ".bin", ".csv", ".gz", ".md", ".npy", ".pdf", ".pt", ".tsv", ".xml", ".zip", ".zst"}
SPLIT_NAMES = {name: name for name in ("train", "validation", "test")}
SPLIT_NAMES |= dict.fromkeys(("valid", "val", "dev"), "validation")

LEGAL_DATASETS = (
    f"give builtin, {WIKITEXT}, a .txt, .jsonl, .json (lines) or .parquet file, a folder of such files, a folder saved "
    "by `datasets`, or a Hub id (id or id:config)"
)
LOCAL_DATASETS = "use --dataset builtin, or a local .txt, .jsonl or .parquet file or folder"
LOCAL_TOKENIZERS = "use --tokenizer builtin, or a local folder with tokenizer.json (or vocab.json and merges.txt)"

LARGEST_ID = 2**31 - 2  # so that the number of entries is an int32 too

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")
SAMPLE_BYTES = 64 * 1024
BYTES_PER_BATCH = 4 << 20  # of rows handed to the tokenizer, or cut into blocks, at a time
BYTES_PER_PROCESS = 8 << 20  # less text than this does not pay for starting a process


class DataError(ValueError):
    """The data asked for cannot be had. One line a fault: the option, its value, what is legal, the cure."""


# --- what is asked for: cheap checks, before anything is imported -----------------------------------------------------


def check_source(dataset: str, tokenizer: str | None) -> list[str]:
    """Find the faults that can be seen without reading the data, in well under a second.

    The network is touched only where a Hub id is asked for that neither this package nor Hugging Face has cached: one
    probe of at most 3 seconds. Files are sampled at their beginning, middle and end.

    Args:
        dataset: value of `--dataset`.
        tokenizer: value of `--tokenizer`; None checks the data set alone.

    Returns:
        One line a fault, naming option, value, what is allowed and the cure; an empty list if none was found.
    """
    faults = _local_faults(dataset, tokenizer)
    if not faults and not _is_prepared(dataset, tokenizer):
        if _is_hub_dataset(dataset) and not _hub_cache_has_dataset(dataset) and not network.reachable():
            faults.append(_unreachable("--dataset", dataset))
        if (
            tokenizer is not None
            and _is_hub_tokenizer(tokenizer)
            and not network.hub_cache_has(tokenizer, TOKENIZER_FILES)
            and not network.reachable()
        ):
            faults.append(_unreachable("--tokenizer", tokenizer))
    return faults


def _local_faults(dataset: str, tokenizer: str | None) -> list[str]:
    fault = _dataset_fault(dataset)
    faults = [f"--dataset {dataset}: {fault}"] if fault else []
    fault = _tokenizer_fault(tokenizer) if tokenizer is not None else None
    return faults + ([f"--tokenizer {tokenizer}: {fault}"] if fault else [])


def _dataset_fault(dataset: str) -> str | None:
    if dataset == WIKITEXT:
        return None
    if dataset == "builtin":
        if find_spec("pydoc_data") is None:
            return f"this Python comes without pydoc_data, which holds the built-in corpus; {LEGAL_DATASETS}"
        return None
    if not _is_path(dataset):
        name, colon, config = dataset.partition(":")
        if network.HUB_ID.fullmatch(name) and bool(config) == bool(colon):
            return None
        return f"neither an existing path nor a Hub id; {LEGAL_DATASETS}"

    path = Path(dataset).expanduser()
    if not path.exists():
        return f"no such file or folder; {LEGAL_DATASETS}"
    if path.is_file() and path.suffix.lower() not in FILE_KINDS:
        return f"unsupported file type {path.suffix or '(no suffix)'}; {LEGAL_DATASETS}"
    if _is_saved_folder(path):
        return None
    files = _data_files(path)
    if not files and path.is_dir() and not any(path.iterdir()):
        return f"the folder is empty; {LEGAL_DATASETS}"
    if not files and path.is_dir():
        return f"the folder holds no {', '.join(FILE_KINDS)} file; {LEGAL_DATASETS}"
    if all(file.stat().st_size == 0 for file in files):
        return f"{'the file is' if path.is_file() else 'all its files are'} empty; give one that holds text"
    for file in files:
        if fault := _content_fault(file):
            where = "" if file == path else f"{file.relative_to(path)}: "
            return f"{where}{fault}"
    return _split_fault(path, files)


def _tokenizer_fault(tokenizer: str) -> str | None:
    if tokenizer == "builtin":
        return None
    legal = "give builtin, a folder with tokenizer.json (or vocab.json and merges.txt), or a Hub id such as gpt2"
    if not _is_path(tokenizer):
        return None if network.HUB_ID.fullmatch(tokenizer) else f"neither an existing folder nor a Hub id; {legal}"
    path = Path(tokenizer).expanduser()
    if not path.exists():
        return f"no such folder; {legal}"
    if not path.is_dir():
        return f"is a file; give the folder that holds it, here {path.parent}"
    names = {file.name for file in path.iterdir()}
    complete = names & {"tokenizer.json", "vocab.txt", "tokenizer.model", "spiece.model"}
    return (
        None if complete or names >= {"vocab.json", "merges.txt"} else f"the folder holds no tokenizer files; {legal}"
    )


@dataclass(frozen=True)
class SourceName:
    """How to name a `--dataset` to others, who must not learn where it lies on this machine.

    Attributes:
        name: in words; of local data the last part of the path.
        hub_id, config, split: of what is on the Hub: where, and which part of it is validated on; else None.
        language: where it is known, by its ISO 639-1 code.
    """

    name: str
    hub_id: str | None = None
    config: str | None = None
    split: str | None = None
    language: str | None = None


def source_name(dataset: str) -> SourceName:
    """The `SourceName` of a value of `--dataset`."""
    if dataset == "builtin":
        return SourceName("Python's language reference", language="en")
    if dataset == WIKITEXT:
        hub_id, _, config = WIKITEXT_RAW.partition(":")
        return SourceName("WikiText-103 (raw)", hub_id, config, "train[:1%]", language="en")
    if _is_hub_dataset(dataset):
        hub_id, _, config = dataset.partition(":")
        return SourceName(dataset, hub_id, config or None)
    return SourceName(Path(dataset).expanduser().absolute().name)


def _is_path(name: str) -> bool:
    """Whether `name` means a place on this machine; everything else is taken for a Hub id."""
    looks_local = name.startswith(("/", "./", "../", "~")) or name in (".", "..") or name.count("/") > 1
    suffixes = FILE_KINDS.keys() | FOREIGN_SUFFIXES
    return looks_local or Path(name).suffix.lower() in suffixes or (name != "" and Path(name).exists())


def _is_hub_dataset(dataset: str) -> bool:
    return dataset == WIKITEXT or (dataset != "builtin" and not _is_path(dataset))


def _is_hub_tokenizer(tokenizer: str) -> bool:
    return tokenizer != "builtin" and not _is_path(tokenizer)


def _is_saved_folder(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _data_files(path: Path) -> list[Path]:
    """The readable files under `path` (itself, if it is a file), sorted by their path; hidden ones are left out."""
    if path.is_file():
        return [path]
    found = (file for file in path.rglob("*") if file.suffix.lower() in FILE_KINDS and file.is_file())
    visible = (file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))
    return sorted(visible, key=lambda file: file.relative_to(path).as_posix())


def _content_fault(file: Path) -> str | None:
    """Tell whether a file plainly is not what its suffix says, from samples of its beginning, middle and end."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        if file.suffix.lower() == ".parquet":
            head = stream.read(4)
            stream.seek(max(0, size - 4))
            whole = size == 0 or head == stream.read() == b"PAR1"
            return None if whole else "not a whole Parquet file (PAR1 mark missing); write it again or give another"
        for start in sorted({0, max(0, size // 2), max(0, size - SAMPLE_BYTES)}):
            stream.seek(start)
            sample = stream.read(SAMPLE_BYTES)
            if (nul := sample.find(b"\0")) >= 0:
                return f"binary, not text (NUL byte at offset {start + nul}); give UTF-8 text"
            # A window may begin within a character (at most 3 continuation bytes) and end within one (final=False).
            skipped = next((i for i in range(min(4, len(sample))) if sample[i] & 0xC0 != 0x80), 0) if start else 0
            try:
                codecs.getincrementaldecoder("utf-8")().decode(sample[skipped:], final=start + len(sample) == size)
            except UnicodeDecodeError as error:
                return f"not UTF-8 (byte {start + skipped + error.start}); convert it, e.g. `iconv -f latin1 -t utf-8`"
    return None


def _files_by_split(path: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Group the files of a folder by the split that their name, or a folder's above them, begins with.

    Names count only where one of them says train, as in `train-00000.parquet` or `train/a.txt`: nobody means to train
    on the `test.txt` beside a `train.txt`. Otherwise all files are the train split. The key "" holds files of no
    split.
    """
    splits: dict[str, list[Path]] = {}
    for file in files:
        parts = file.relative_to(path).parts if file != path else ()
        words = (re.split(r"[^a-z]", part.lower(), maxsplit=1)[0] for part in parts)
        split = next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "")
        splits.setdefault(split, []).append(file)
    return splits if "train" in splits else {"train": files}


def _split_fault(path: Path, files: list[Path]) -> str | None:
    stray = _files_by_split(path, files).get("")
    if not stray:
        return None
    return (
        f"some files are named train, but {stray[0].relative_to(path)} is named neither train, validation nor test; "
        "rename it after its split or move it away"
    )


# --- the network ------------------------------------------------------------------------------------------------------


def _unreachable(option: str, value: str) -> str:
    cure = LOCAL_DATASETS if option == "--dataset" else LOCAL_TOKENIZERS
    return (
        f"{option} {value}: not a local path, and the Hugging Face Hub ({network.endpoint()}) cannot be reached to get "
        f"it; {cure}, or load it once where there is a network"
    )


def _hub_cache_has_dataset(dataset: str) -> bool:
    """Whether `datasets` has prepared this set before: without a network it can load such sets only."""
    import huggingface_hub.constants

    default = Path(huggingface_hub.constants.HF_HOME, "datasets")
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or default).expanduser()
    wanted = {dataset.partition(":")[0]}
    if dataset == WIKITEXT:
        ready = {WIKITEXT_READY.format(size) for size in WIKITEXT_READY_BLOCK_SIZES}
        wanted = {WIKITEXT_RAW.partition(":")[0]} | ready
    plain = {re.sub(r"[\W_]", "", name).lower() for name in wanted}  # its folders are owner___snake_case_name
    return cache.is_dir() and any(re.sub(r"[\W_]", "", folder.name).lower() in plain for folder in cache.iterdir())


# --- what comes out: blocks, and the order in which they are read -----------------------------------------------------


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
        input_ids = torch.from_numpy(_flat_ids(table).astype(np.int64)).view(-1, self.block_size)
        return {"input_ids": input_ids, "labels": input_ids.masked_fill(is_pad[:, None], -100)}

    def tokens(self) -> np.ndarray:
        """All ids, block after block: shape (number of blocks * S,)."""
        return np.concatenate([_flat_ids(table) for table in self._rows.iter(batch_size=1024)])

    def token_counts(self, vocab_size: int, start: int = 0) -> np.ndarray:
        """Count every token id at the positions `start` to S-1 of all blocks; int64, shape (vocab_size,)."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for table in self._rows.iter(batch_size=1024):
            ids = _flat_ids(table).reshape(-1, self.block_size)[:, start:]
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


@dataclass(frozen=True)
class Data:
    """A source, tokenised and cut into blocks.

    Attributes:
        train: blocks to train on.
        validation: blocks never trained on.
        tokenizer: what turned text into ids.
        vocab_size: `vocabulary_size(tokenizer)`; every id is below it.
        fingerprint: hex digest of the training blocks, in order, and the vocabulary. Equal content gives equal
            fingerprints on every machine and by every path to it; resuming with another one would train on other
            data.
        summary: one line on the kind of source, its validation part, rows, tokens and blocks; it names no path.
        description: the summary with the names of source and tokenizer, for logs.
    """

    train: BlockDataset
    validation: BlockDataset
    tokenizer: transformers.PreTrainedTokenizerBase
    vocab_size: int
    fingerprint: str
    summary: str
    description: str


# --- loading: prepare once, then memory-map ---------------------------------------------------------------------------


def load(
    dataset: str, tokenizer: str, block_size: int, *, cache_dir: Path | None = None, num_proc: int | None = None
) -> Data:
    """Tokenise a source and cut it into blocks, or open what an earlier call prepared.

    Any number of processes may call this at once: one prepares while the others wait for its lock. Rows are
    concatenated as they are, with no separator and no special tokens between them. A source with a `validation` (or
    else `test`) split is evaluated on that; of others the last 5 % of rows are held out, or more where those give no
    whole block.

    What came from the Hub is prepared once and then no longer looked up there: delete its folder in the cache to get a
    newer version. The words `builtin` and `wikitext-103` win over files of that name; write `./builtin` for those.

    Args:
        dataset: `wikitext-103`, `builtin`, a local file or folder, or a Hub id, `id` or `id:config`.
        tokenizer: `builtin` (a byte-level BPE of up to 4,000 entries, trained on the training part), a folder or a
            Hub id.
        block_size: S, tokens per block, at least 2.
        cache_dir: where prepared data live; default $GPT2_VARIANTS_CACHE, else ~/.cache/gpt2_variants.
        num_proc: processes to tokenise with; by default as many as there are cores and the amount of text pays for.

    Raises:
        DataError: with one line a fault, if the source or tokenizer cannot be had, do not fit together, or give no
            block.
    """
    if faults := _local_faults(dataset, tokenizer):
        raise DataError("\n".join(faults))
    if block_size < 2:
        raise DataError(f"--block_size {block_size}: a block needs at least 2 tokens, one to read and one to predict")
    identity = {
        "format": FORMAT,
        "dataset": _dataset_identity(dataset),
        "tokenizer": _tokenizer_identity(tokenizer),
        "block_size": block_size,
        "held_out": HELD_OUT,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    cache = Path(cache_dir or _default_cache())
    prepared = cache / key
    if not (prepared / "info.json").is_file():
        from filelock import FileLock

        try:
            cache.mkdir(parents=True, exist_ok=True)
            lock = FileLock(cache / f"{key}.lock")
            lock.acquire()
        except OSError as error:
            raise DataError(
                f"--dataset {dataset}: the cache folder {cache} cannot be written ({_brief(error)}); set "
                "GPT2_VARIANTS_CACHE to a folder that can"
            ) from error
        try:
            if not (prepared / "info.json").is_file():  # another process may have been faster
                _prepare(prepared, dataset, tokenizer, block_size, num_proc)
        finally:
            lock.release()
    return _open(prepared, dataset, tokenizer)


def default_split(dataset: str) -> str:
    """What `load_tokens` reads where no split is asked for: all of a local file, else the validation part."""
    is_file = dataset not in ("builtin", WIKITEXT) and Path(dataset).expanduser().is_file()
    return "all" if is_file else "validation"


def load_tokens(dataset: str, tokenizer: str, block_size: int, split: str) -> np.ndarray:
    """A source as one stream of token ids, to evaluate on.

    Args:
        dataset: as for `load`.
        tokenizer: a folder or a Hub id.
        block_size: of the training run that `split` refers to.
        split: `validation` or `train`, the blocks `load` gives, one after the other; or `all`, every token of the
            source (its validation part last, where it has one of its own), which is not kept in the cache.

    Returns:
        (number of tokens,) ids of an integer type.

    Raises:
        DataError: as for `load`.
    """
    if split != "all":
        return getattr(load(dataset, tokenizer, block_size), split).tokens()
    if faults := _local_faults(dataset, tokenizer):
        raise DataError("\n".join(faults))
    with tempfile.TemporaryDirectory() as scratch, quiet():
        opened = open_tokenizer(tokenizer)
        source = _read(dataset, opened, block_size, Path(scratch))
        parts = source.parts
        if source.is_text:
            parts = [tokenise_rows(part, opened, tokenizer, Path(scratch), num_proc=None) for part in parts]
        else:
            _check_tokens(dataset, source, tokenizer, opened)
        # int64: numpy would make floats of an int64 and a uint64 part
        return np.concatenate([_flat_ids(part.with_format("arrow")[:]).astype(np.int64) for part in parts])


def _default_cache() -> Path:
    return Path(os.environ.get("GPT2_VARIANTS_CACHE") or "~/.cache/gpt2_variants").expanduser()


def _open(prepared: Path, dataset: str, tokenizer_name: str) -> Data:
    from datasets import Dataset

    info = json.loads((prepared / "info.json").read_text(encoding="utf-8"))
    tokenizer = open_tokenizer(str(prepared / "tokenizer"))
    vocab_size = vocabulary_size(tokenizer)
    return Data(
        train=BlockDataset(Dataset.load_from_disk(str(prepared / "train"))),
        validation=BlockDataset(Dataset.load_from_disk(str(prepared / "validation"))),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        fingerprint=info["fingerprint"],
        summary=info["summary"],
        # The names are those of this call: the same content may have been prepared under others.
        description=f"{dataset}: {info['summary']}; tokenizer {tokenizer_name}, {vocab_size:,} entries",
    )


def _is_prepared(dataset: str, tokenizer: str | None) -> bool:
    """Whether the default cache holds this Hub set or tokenizer, so that a load may need no network."""
    for file in _default_cache().glob("*/info.json"):
        info = json.loads(file.read_text(encoding="utf-8"))
        if info["dataset"] == dataset and tokenizer in (None, info["tokenizer"]):
            return True
    return False


def _dataset_identity(dataset: str) -> Any:
    """What the content of a source hangs on: the bytes of local data wherever they lie, the name of a Hub set."""
    if dataset == "builtin":
        return {"builtin": hashlib.sha256(json.dumps(_builtin_corpus()).encode()).hexdigest()}
    if _is_hub_dataset(dataset):
        return {"hub": dataset, "rows_per_batch": WIKITEXT_ROWS_PER_BATCH if dataset == WIKITEXT else None}
    path = Path(dataset).expanduser()
    if path.is_file():
        return {"file": [path.suffix.lower(), _file_digest(path)]}
    files = sorted(path.rglob("*")) if _is_saved_folder(path) else _data_files(path)
    return {"folder": [[file.relative_to(path).as_posix(), _file_digest(file)] for file in files if file.is_file()]}


def _tokenizer_identity(tokenizer: str) -> Any:
    if tokenizer == "builtin":
        return {"builtin": BUILTIN_VOCAB_SIZE}
    if _is_hub_tokenizer(tokenizer):
        return {"hub": tokenizer}
    # A tokenizer may lie beside a model: what can belong to it is small and not a weight.
    files = sorted(Path(tokenizer).expanduser().iterdir())
    parts = [file for file in files if file.suffix in (".json", ".txt", ".model", ".tiktoken")]
    return {"folder": [[file.name, _file_digest(file)] for file in parts if file.is_file()]}


def _file_digest(file: Path) -> str:
    import xxhash

    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _vocabulary_digest(tokenizer: transformers.PreTrainedTokenizerBase, entries: int | None = None) -> str:
    """Digest of the vocabulary, or of its first `entries` ids: a model may have added its own after them."""
    vocabulary = [(token, i) for token, i in tokenizer.get_vocab().items() if entries is None or i < entries]
    return hashlib.sha256(json.dumps(sorted(vocabulary)).encode()).hexdigest()


def _fingerprint(blocks: datasets.Dataset, vocabulary: str) -> str:
    digest = hashlib.sha256(f"{blocks.features['input_ids'].length} {vocabulary}".encode())
    for table in blocks.with_format("arrow").iter(batch_size=1024):
        digest.update(_flat_ids(table).astype("<i4").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Source:
    """Rows of one column, `text` (strings) or `input_ids` (lists of ids); no `validation` where it must be held out."""

    origin: str  # in words: what was read, and where its validation part comes from
    train: datasets.Dataset
    validation: datasets.Dataset | None
    rows_per_batch: int | None = None  # blocks are cut within so many rows; None cuts one stream

    @property
    def is_text(self) -> bool:
        return self.train.column_names == ["text"]

    @property
    def parts(self) -> list[datasets.Dataset]:
        return [part for part in (self.train, self.validation) if part is not None]


def _prepare(prepared: Path, dataset: str, tokenizer_name: str, block_size: int, num_proc: int | None) -> None:
    """Build the folder `prepared`: aside, then moved, so that it is complete or absent. The caller holds its lock."""
    building = prepared.with_name(prepared.name + ".building")
    for leftover in (building, prepared):  # of a killed process, or without its info.json
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = building / "scratch"
    scratch.mkdir(parents=True)
    try:
        with quiet():
            tokenizer = None if tokenizer_name == "builtin" else open_tokenizer(tokenizer_name)
            source = _read(dataset, tokenizer, block_size, scratch)
            if not source.is_text:
                _check_tokens(dataset, source, tokenizer_name, tokenizer)
            train, validation, tokenizer = _tokenise_parts(
                dataset, source, tokenizer, tokenizer_name, block_size, scratch, num_proc
            )

            vocab_size = vocabulary_size(tokenizer)
            blocks = {"train": train, "validation": validation}
            for part, tokens in blocks.items():
                blocks[part] = _cut(tokens, block_size, vocab_size, source.rows_per_batch, scratch)
                if not len(blocks[part]):
                    raise DataError(
                        f"--dataset {dataset}: no {WIKITEXT_ROWS_PER_BATCH:,} rows of its {part} part hold "
                        f"{block_size} tokens; choose a smaller --block_size"
                    )
                blocks[part].save_to_disk(str(building / part))
            tokenizer.save_pretrained(str(building / "tokenizer"))
            counts = [
                f"{part} {len(tokens):,} rows, {_count_tokens(tokens):,} tokens, {len(blocks[part]):,} blocks"
                for part, tokens in (("train", train), ("validation", validation))
            ]
        info = {
            "dataset": dataset,
            "tokenizer": tokenizer_name,
            "fingerprint": _fingerprint(blocks["train"], _vocabulary_digest(tokenizer)),
            "summary": f"{source.origin}; blocks of {block_size} tokens; {'; '.join(counts)}",
        }
        shutil.rmtree(scratch)
        (building / "info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
        building.rename(prepared)
    finally:
        shutil.rmtree(building, ignore_errors=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Show the progress of `datasets` on a terminal only, and let each process tokenise with one thread."""
    import datasets

    environment, parallelism = os.environ, os.environ.get("TOKENIZERS_PARALLELISM")
    bars_shown = not datasets.are_progress_bars_disabled()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism; threads in each would compete
    try:
        yield
    finally:
        if bars_shown:
            datasets.enable_progress_bars()
        # `Dataset.map` leaves a copy in its place: changes undone in the one would stay in the other
        os.environ = environment  # noqa: B003
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if parallelism is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = parallelism


# --- reading the sources ----------------------------------------------------------------------------------------------


def _read(
    dataset: str, tokenizer: transformers.PreTrainedTokenizerBase | None, block_size: int, scratch: Path
) -> _Source:
    """Read what `--dataset` names; WikiText-103 comes ready-made for the published tokenizer and block sizes."""
    from datasets import Dataset

    if dataset == "builtin":
        train, validation = (Dataset.from_dict({"text": rows}) for rows in _builtin_corpus())
        return _Source("the topics of Python's own help, every tenth for validation", train, validation)
    if dataset == WIKITEXT:
        return _read_wikitext(tokenizer, block_size)
    if _is_hub_dataset(dataset):
        return _from_splits(dataset, "from the Hub", _from_hub(dataset, asked=dataset))
    path = Path(dataset).expanduser()
    return _from_splits(dataset, "local", _read_local(dataset, path, scratch))


def _builtin_corpus() -> tuple[list[str], list[str]]:
    """English text that every CPython carries, 465,000 characters: (training rows, validation rows), one a topic.

    Every tenth topic is held out. Some topics repeat paragraphs of others ("compound" holds all of "if"), so that
    paragraphs of the held-out topics are taken out of the training topics too.
    """
    from pydoc_data.topics import topics

    names = sorted(topics)
    held_out = names[6::10]
    hidden = {paragraph.strip() for name in held_out for paragraph in topics[name].split("\n\n")}
    train = []
    for name in names:
        if name not in held_out:
            kept = [paragraph for paragraph in topics[name].split("\n\n") if paragraph.strip() not in hidden]
            train.append("\n\n".join(kept) + "\n")
    return train, [topics[name] + "\n" for name in held_out]


def _read_wikitext(tokenizer: transformers.PreTrainedTokenizerBase | None, block_size: int) -> _Source:
    """WikiText-103 as the published runs cut it: validation is the first 1 % of the raw train split's rows."""
    is_gpt2 = tokenizer is not None and _vocabulary_digest(tokenizer, GPT2_ENTRIES) == GPT2_VOCABULARY
    lost = None
    if is_gpt2 and block_size in WIKITEXT_READY_BLOCK_SIZES:
        ready = WIKITEXT_READY.format(block_size)
        try:
            splits = _from_hub(ready, asked=WIKITEXT)
        except DataError as error:
            lost = error
        else:
            if not splits.keys() & {"validation", "test"}:
                raise DataError(
                    f"--dataset {WIKITEXT}: the ready-made set {ready} has no validation or test split, only "
                    f"{', '.join(splits)}; use --dataset {WIKITEXT_RAW}, which has one"
                )
            return _from_splits(WIKITEXT, f"ready-made {ready}", splits)
    train, validation = _from_hub(WIKITEXT_RAW, asked=WIKITEXT, split=["train[1%:]", "train[:1%]"])
    if lost:
        print(
            f"note: cutting {WIKITEXT} from the raw set, for its ready-made blocks cannot be had: {lost}",
            file=sys.stderr,
        )
    train, validation = (_one_column(WIKITEXT, part) for part in (train, validation))
    return _Source(
        f"cut from {WIKITEXT_RAW}, its first 1 % for validation",
        train,
        validation,
        rows_per_batch=WIKITEXT_ROWS_PER_BATCH,
    )


def _from_hub(dataset: str, asked: str, split: list[str] | None = None) -> Any:
    """Call `datasets.load_dataset` for "id" or "id:config"; with no network it gives what is cached or fails at once.

    `asked` is the value of `--dataset`, for the error.
    """
    import datasets

    name, _, config = dataset.partition(":")
    reachable = network.reachable()
    try:
        with network.offline(not reachable):
            return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # Hub, network, parsing: their errors share no base class
        if not reachable:
            raise DataError(_unreachable("--dataset", asked)) from error
        raise DataError(
            f"--dataset {asked}: {name} cannot be read from the Hub ({_brief(error)}); check the id (id:config where "
            f"it has several configs) and your access to it, or {LOCAL_DATASETS}"
        ) from error


def _read_local(dataset: str, path: Path, scratch: Path) -> dict[str, datasets.Dataset]:
    import datasets

    try:
        with network.offline(True):
            if _is_saved_folder(path):
                saved = datasets.load_from_disk(str(path))
                return saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
            by_split = _files_by_split(path, _data_files(path))
            return {split: _read_files(dataset, files, scratch) for split, files in by_split.items()}
    except DataError:
        raise
    except Exception as error:  # the readers wrap Arrow's, pandas' and Unicode errors in various ways
        reason = _brief(error.__cause__ or error)
        raise DataError(f"--dataset {dataset}: cannot be read ({reason}); {LEGAL_DATASETS}") from error


def _read_files(dataset: str, files: list[Path], scratch: Path) -> datasets.Dataset:
    """Read files in their order, runs of the same kind together."""
    from datasets import Dataset, concatenate_datasets

    rows = []
    filled = (file for file in files if file.stat().st_size)
    for kind, run in itertools.groupby(filled, key=lambda file: FILE_KINDS[file.suffix.lower()]):
        paths = [str(file) for file in run]
        if kind == "text":
            part = Dataset.from_text(paths, cache_dir=str(scratch), keep_linebreaks=True)
        elif kind == "json":
            part = Dataset.from_json(paths, cache_dir=str(scratch))
        else:
            part = Dataset.from_parquet(paths, cache_dir=str(scratch))
        rows.append(_one_column(dataset, part))
    if len({tuple(part.column_names) for part in rows}) > 1:
        raise DataError(f"--dataset {dataset}: some files hold text, others token ids; give one kind only")
    return concatenate_datasets(rows)


def _from_splits(dataset: str, origin: str, splits: dict[str, datasets.Dataset]) -> _Source:
    if "train" not in splits:
        raise DataError(
            f"--dataset {dataset}: has no train split, only {', '.join(splits)}; give a source that has one"
        )
    held = next((split for split in ("validation", "test") if split in splits), None)
    train = _one_column(dataset, splits["train"])
    validation = _one_column(dataset, splits[held]) if held else None
    if validation is not None and validation.column_names != train.column_names:
        raise DataError(f"--dataset {dataset}: of train and {held} one holds text, one token ids; give one kind only")
    return _Source(f"{origin}, {f'its {held} split' if held else 'its last rows'} for validation", train, validation)


def _one_column(dataset: str, rows: datasets.Dataset) -> datasets.Dataset:
    """Keep the column to train on, named `text` or `input_ids`. Text is preferred: it fits every tokenizer."""
    from datasets import LargeList, List, Value

    kinds = rows.features
    strings = [name for name, kind in kinds.items() if getattr(kind, "dtype", None) in ("string", "large_string")]
    ids = kinds.get("input_ids")
    if "text" in strings:
        column = "text"
    elif isinstance(ids, (List, LargeList)) and isinstance(ids.feature, Value) and "int" in ids.feature.dtype:
        return rows.select_columns(["input_ids"])
    elif len(strings) == 1:
        column = strings[0]
    else:
        raise DataError(
            f"--dataset {dataset}: it is not clear which of the columns {', '.join(kinds)} to train on; give a column "
            "`text`, a single column of strings, or `input_ids` (lists of token ids)"
        )
    rows = rows.select_columns([column]).rename_columns({column: "text"} if column != "text" else {})
    return rows if rows.features["text"].dtype == "string" else rows.cast_column("text", Value("string"))


def _brief(error: BaseException) -> str:
    """An error in one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


# --- tokens -----------------------------------------------------------------------------------------------------------


def open_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    """Open a tokenizer from a folder, with no network, or from the Hub.

    Raises:
        DataError: there is none, it cannot be read, or an id of its is larger than any model's vocabulary.
    """
    from transformers import AutoTokenizer, GPT2TokenizerFast  # type: ignore[attr-defined]  # made on import

    if fault := _tokenizer_fault(name):
        raise DataError(f"--tokenizer {name}: {fault}")
    is_local = _is_path(name)
    offline = is_local or not network.reachable()
    path = Path(name).expanduser()
    try:
        with network.offline(offline):
            described = [path / name for name in ("tokenizer.json", "tokenizer_config.json", "config.json")]
            if is_local and (path / "merges.txt").exists() and not any(file.exists() for file in described):
                # AutoTokenizer of transformers 5 does not recognise a bare vocab.json with merges.txt.
                opened = GPT2TokenizerFast.from_pretrained(str(path))
            else:
                # No code from elsewhere, and no prompt that asks for it: the folder of an exported model names some.
                opened = AutoTokenizer.from_pretrained(str(path) if is_local else name, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parts raise
        if offline and not is_local:
            raise DataError(_unreachable("--tokenizer", name)) from error
        raise DataError(f"--tokenizer {name}: cannot be read ({_brief(error)}); {LOCAL_TOKENIZERS}") from error
    if (largest := vocabulary_size(opened) - 1) > LARGEST_ID:
        raise DataError(
            f"--tokenizer {name}: gives ids up to {largest}, and a model needs an entry for each up to the largest; "
            f"at most {LARGEST_ID} is possible, give a tokenizer that numbers its tokens from 0 on"
        )
    return opened


def vocabulary_size(tokenizer: transformers.PreTrainedTokenizerBase) -> int:
    """The entries that a model needs for a tokenizer: its largest id, of added tokens too, plus one.

    `len(tokenizer)` counts the tokens, which are fewer where ids were left out.
    """
    return max((*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder), default=-1) + 1


def encode(
    tokenizer: transformers.PreTrainedTokenizerBase, name: str, texts: list[str], special_tokens: bool = False
) -> list[list[int]]:
    """The ids of each text, and nothing of it left out.

    Args:
        tokenizer: an opened one.
        name: what the user calls it, for the error.
        texts: in any number, of any length.
        special_tokens: whether to add those that the tokenizer puts around a text.

    Raises:
        DataError: the tokenizer has no entry for something in a text and no unk token to stand for it. tokenizers and
            transformers then raise something, give None for an id or, of a BPE, leave the character out.
    """

    def ids_of(texts: list[str]) -> list[list[int]]:
        # verbose=False: "sequence longer than the maximum" does not matter to text that is cut into blocks.
        encoded = tokenizer(texts, add_special_tokens=special_tokens, return_attention_mask=False, verbose=False)
        if any(None in ids for ids in encoded["input_ids"]):
            raise ValueError("it gives no id for some token")
        return encoded["input_ids"]

    def fails(text: str) -> bool:
        try:
            ids_of([text])
        except Exception:
            return True
        return False

    reason = ""
    culprit = _left_out(tokenizer, texts)
    if culprit is None:
        try:
            return ids_of(texts)
        except Exception as error:  # tokenizers raises Exception itself
            reason = f" ({_brief(error)})"
            line = next((text for text in texts if fails(text)), "")
            culprit = next((word for word in line.split() if fails(word)), line)
    shown = repr(culprit if len(culprit) <= 40 else f"{culprit[:40]}...")
    raise DataError(
        f"--tokenizer {name}: cannot encode {shown}, since it has no entry for it and no unk token in its "
        f"vocabulary{reason}; give a tokenizer with an unk token, or a byte-level one such as builtin or gpt2"
    )


def _left_out(tokenizer: transformers.PreTrainedTokenizerBase, texts: list[str]) -> str | None:
    """A character of `texts` that a BPE would leave out without a word; None if there is none, or it is no BPE."""
    from tokenizers import models, pre_tokenizers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    bpe = getattr(backend, "model", None)
    if backend is None or not isinstance(bpe, models.BPE) or bpe.unk_token is not None:
        return None

    def known(token: str) -> bool:
        return backend.token_to_id(token) is not None

    if all(map(known, pre_tokenizers.ByteLevel.alphabet())):
        return None
    prefix, suffix = bpe.continuing_subword_prefix or "", bpe.end_of_word_suffix or ""
    in_added_tokens = {character for token in tokenizer.added_tokens_decoder.values() for character in token.content}

    def has_entry(symbol: str) -> bool:
        if any(map(known, (symbol, prefix + symbol, symbol + suffix, prefix + symbol + suffix))):
            return True
        return bpe.byte_fallback and all(known(f"<0x{byte:02X}>") for byte in symbol.encode())

    for character in sorted(set().union(*texts) - in_added_tokens):
        # What normalizer and pre-tokenizer take away is meant to go; what they hand on is not.
        normal = backend.normalizer.normalize_str(character) if backend.normalizer else character
        pieces = backend.pre_tokenizer.pre_tokenize_str(normal) if backend.pre_tokenizer else [(normal, None)]
        if not all(has_entry(symbol) for piece, _ in pieces for symbol in piece):
            return character
    return None


def _train_tokenizer(rows: datasets.Dataset) -> transformers.PreTrainedTokenizerBase:
    """A byte-level BPE like GPT-2's, small: 4,000 entries (fewer on tiny texts), `<|endoftext|>` is id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def texts() -> Iterator[list[str]]:
        left = BUILTIN_TRAINING_CHARACTERS
        for batch in rows.iter(batch_size=_rows_per_batch(rows)):
            yield [text for text in batch["text"] if text]
            left -= sum(len(text) for text in batch["text"] if text)
            if left <= 0:
                return

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BUILTIN_VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # sorted: the set's order is not fixed
        show_progress=False,
    )
    bpe.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _tokenise_parts(
    dataset: str,
    source: _Source,
    tokenizer: transformers.PreTrainedTokenizerBase | None,
    tokenizer_name: str,
    block_size: int,
    scratch: Path,
    num_proc: int | None,
) -> tuple[datasets.Dataset, datasets.Dataset, transformers.PreTrainedTokenizerBase]:
    """Tokenise both parts, after holding out the last rows where the source has one part only."""
    if source.validation is not None:
        trained = tokenizer or _train_tokenizer(source.train)
        train, validation = (
            tokenise_rows(part, trained, tokenizer_name, scratch, num_proc) if source.is_text else part
            for part in (source.train, source.validation)
        )
        fits = min(_count_tokens(train), _count_tokens(validation))
        if fits < block_size:
            raise _too_little(dataset, train, validation, block_size, fits)
        return train, validation, trained

    rows = source.train
    if len(rows) < 2:
        raise DataError(
            f"--dataset {dataset}: has {len(rows)} row (line), and whole rows are held out for validation; break the "
            "text into lines, or give a validation split"
        )
    held = max(1, round(HELD_OUT * len(rows)))
    while True:
        # Only their tokens tell whether these rows give a block; a tokenizer trained on the rest changes with them.
        trained = tokenizer or _train_tokenizer(rows.select(range(len(rows) - held)))
        tokens = tokenise_rows(rows, trained, tokenizer_name, scratch, num_proc) if source.is_text else rows
        reversed_totals = np.cumsum(_row_lengths(tokens)[::-1])  # tokens in the last 1, 2, ... rows
        needed = int(np.searchsorted(reversed_totals, block_size)) + 1
        if needed <= held or needed >= len(rows):
            break
        held = needed
    validation = tokens.select(range(len(rows) - held, len(rows)))
    train = tokens.select(range(len(rows) - held))
    if needed > held or _count_tokens(train) < block_size:
        ends = reversed_totals[max(1, round(HELD_OUT * len(rows))) - 1 : -1]
        fits = int(np.minimum(ends, reversed_totals[-1] - ends).max())
        raise _too_little(dataset, train, validation, block_size, fits)
    return train, validation, trained


def _too_little(
    dataset: str, train: datasets.Dataset, validation: datasets.Dataset, block_size: int, fits: int
) -> DataError:
    cure = f"use --block_size {fits} or less, or give more text" if fits >= 2 else "give more text"
    return DataError(
        f"--dataset {dataset}: too little for a training and a validation block of {block_size}, with "
        f"{_count_tokens(train):,} and {_count_tokens(validation):,} tokens; {cure}"
    )


def tokenise_rows(
    rows: datasets.Dataset,
    tokenizer: transformers.PreTrainedTokenizerBase,
    tokenizer_name: str,
    scratch: Path,
    num_proc: int | None,
) -> datasets.Dataset:
    """Rows of text to rows of ids below the tokenizer's `vocabulary_size`, row by row, in parallel where that pays."""
    from datasets import Features, List, Value

    vocab_size = vocabulary_size(tokenizer)

    def tokenise(batch: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
        texts = [text or "" for text in batch["text"]]  # JSON lines may lack the field
        rows = encode(tokenizer, tokenizer_name, texts)
        largest = max(map(max, filter(None, rows)), default=0)
        if largest >= vocab_size:
            raise DataError(
                f"--tokenizer {tokenizer_name}: gives the id {largest}, which none of its "
                f"tokens has (the largest is {vocab_size - 1}); give a tokenizer whose unk token is in its vocabulary"
            )
        return {"input_ids": rows}

    if num_proc is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_proc = min(cores, rows.data.nbytes // BYTES_PER_PROCESS)
    return rows.map(
        tokenise,
        batched=True,
        batch_size=_rows_per_batch(rows),
        num_proc=num_proc if num_proc > 1 else None,
        remove_columns=rows.column_names,
        features=Features({"input_ids": List(Value("int32"))}),
        cache_file_name=str(Path(tempfile.mkdtemp(dir=scratch), "tokens.arrow")),
        new_fingerprint="tokens",  # spares hashing the tokenizer; the file is read by this build alone
        desc="Tokenising",
    )


def _cut(
    tokens: datasets.Dataset, block_size: int, vocab_size: int, rows_per_batch: int | None, scratch: Path
) -> datasets.Dataset:
    """Concatenate rows and cut them into blocks of S ids, one row a block.

    With `rows_per_batch` this happens within consecutive batches of so many rows, counted from the first, and each
    batch's remainder is dropped. Otherwise the rows are one stream, and only the remainder at its very end is dropped.
    One process does this in order, whatever tokenised the rows: sharding would move the batches' boundaries.
    """
    import pyarrow as pa
    from datasets import Features, List, Value

    dtype = "uint16" if vocab_size <= 2**16 else "int32"
    carried = np.empty(0, dtype)

    def cut(table: pa.Table) -> pa.Table:
        nonlocal carried
        ids = np.concatenate([carried, _flat_ids(table).astype(dtype)])
        whole = len(ids) // block_size * block_size
        if rows_per_batch is None:
            carried = ids[whole:].copy()
        return pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(pa.array(ids[:whole]), block_size)})

    blocks = tokens.with_format("arrow").map(
        cut,
        batched=True,
        batch_size=rows_per_batch or _rows_per_batch(tokens),
        remove_columns=tokens.column_names,
        features=Features({"input_ids": List(Value(dtype), length=block_size)}),
        cache_file_name=str(Path(tempfile.mkdtemp(dir=scratch), "blocks.arrow")),
        new_fingerprint="blocks",
        desc="Cutting into blocks",
    )
    return blocks.with_format(None)


def _check_tokens(
    dataset: str,
    source: _Source,
    tokenizer_name: str,
    tokenizer: transformers.PreTrainedTokenizerBase | None,
) -> None:
    """Refuse token ids that the tokenizer cannot have made."""
    if tokenizer is None:
        raise DataError(
            f"--tokenizer builtin: is trained on text, but --dataset {dataset} holds token ids already; give the "
            "--tokenizer that made them"
        )
    vocab_size = vocabulary_size(tokenizer)
    largest = smallest = 0
    for part in source.parts:
        for table in part.with_format("arrow").iter(batch_size=_rows_per_batch(part)):
            if table["input_ids"].combine_chunks().flatten().null_count:
                raise DataError(f"--dataset {dataset}: holds null among its token ids; make it again without")
            ids = _flat_ids(table)
            # As Python's integers: numpy compares an int64 with a uint64 as floats.
            largest, smallest = max(largest, int(ids.max(initial=0))), min(smallest, int(ids.min(initial=0)))
    if largest >= vocab_size or smallest < 0:
        wrong = largest if largest >= vocab_size else smallest
        raise DataError(
            f"--tokenizer {tokenizer_name}: has {vocab_size} entries, but --dataset {dataset} holds the token id "
            f"{wrong}; give the --tokenizer that made these ids"
        )


def _flat_ids(table: Any) -> np.ndarray:
    """The ids of an Arrow table's column `input_ids`, all rows one after the other, shape (tokens,)."""
    return table["input_ids"].combine_chunks().flatten().to_numpy(zero_copy_only=False)


def _row_lengths(tokens: datasets.Dataset) -> np.ndarray:
    import pyarrow.compute as pc

    column = tokens.with_format("arrow")[:]["input_ids"]
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy().astype(np.int64)


def _count_tokens(tokens: datasets.Dataset) -> int:
    return int(_row_lengths(tokens).sum())


def _rows_per_batch(rows: datasets.Dataset) -> int:
    """As many rows as make a few megabytes: a row may be a line or a book."""
    bytes_per_row = rows.data.nbytes / max(1, rows.data.num_rows)
    return int(np.clip(BYTES_PER_BATCH / max(1.0, bytes_per_row), 1, 10_000))
