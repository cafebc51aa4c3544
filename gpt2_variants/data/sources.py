"""Sources: the Hub, WikiText-103, local data, the built-in corpus, each as rows of one column."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import network
from .formats import one_column, read_local
from .names import (
    LOCAL_DATASETS,
    WIKITEXT,
    WIKITEXT_RAW,
    WIKITEXT_READY,
    WIKITEXT_READY_BLOCK_SIZES,
    DataError,
    brief,
    is_hub_dataset,
    unreachable,
)
from .tokenizers import vocabulary_digest

if TYPE_CHECKING:
    import datasets
    import transformers


WIKITEXT_ROWS_PER_BATCH = 40_000  # the published cut drops the remainder of every batch of so many rows
GPT2_ENTRIES = 50_257
GPT2_VOCABULARY = "71cca498f566a6fce90612118ffe70ec265ffdc746e7e6743a2253d346af4d30"  # see vocabulary_digest


@dataclass(frozen=True)
class Source:
    """Rows of one column, `text` (strings) or `input_ids` (lists of ids); no `validation` where it must be held out."""

    origin: str  # in words: what was read, and where its validation part comes from
    train: datasets.Dataset
    validation: datasets.Dataset | None
    rows_per_batch: int | None = None  # blocks are cut within so many rows; None cuts one stream

    @property
    def is_text(self) -> bool:
        """Whether the rows are text."""
        return self.train.column_names == ["text"]

    @property
    def parts(self) -> list[datasets.Dataset]:
        """The parts that there are."""
        return [part for part in (self.train, self.validation) if part is not None]


def read_source(
    dataset: str, tokenizer: transformers.PreTrainedTokenizerBase | None, block_size: int, scratch: Path
) -> Source:
    """Read what `--dataset` names; WikiText-103 comes ready-made for the published tokenizer and block sizes."""
    from datasets import Dataset

    if dataset == "builtin":
        train, validation = (Dataset.from_dict({"text": rows}) for rows in builtin_corpus())
        return Source("the topics of Python's own help, every tenth for validation", train, validation)
    if dataset == WIKITEXT:
        return _read_wikitext(tokenizer, block_size)
    if is_hub_dataset(dataset):
        return _from_splits(dataset, "from the Hub", _from_hub(dataset, asked=dataset))
    path = Path(dataset).expanduser()
    return _from_splits(dataset, "local", read_local(dataset, path, scratch))


def builtin_corpus() -> tuple[list[str], list[str]]:
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


def _read_wikitext(tokenizer: transformers.PreTrainedTokenizerBase | None, block_size: int) -> Source:
    """WikiText-103 as the published runs cut it: validation is the first 1 % of the raw train split's rows."""
    is_gpt2 = tokenizer is not None and vocabulary_digest(tokenizer, GPT2_ENTRIES) == GPT2_VOCABULARY
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
    train, validation = (one_column(WIKITEXT, part) for part in (train, validation))
    return Source(
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
            raise DataError(unreachable("--dataset", asked)) from error
        raise DataError(
            f"--dataset {asked}: {name} cannot be read from the Hub ({brief(error)}); check the id (id:config where "
            f"it has several configs) and your access to it, or {LOCAL_DATASETS}"
        ) from error


def _from_splits(dataset: str, origin: str, splits: dict[str, datasets.Dataset]) -> Source:
    if "train" not in splits:
        raise DataError(
            f"--dataset {dataset}: has no train split, only {', '.join(splits)}; give a source that has one"
        )
    held = next((split for split in ("validation", "test") if split in splits), None)
    train = one_column(dataset, splits["train"])
    validation = one_column(dataset, splits[held]) if held else None
    if validation is not None and validation.column_names != train.column_names:
        raise DataError(f"--dataset {dataset}: of train and {held} one holds text, one token ids; give one kind only")
    return Source(f"{origin}, {f'its {held} split' if held else 'its last rows'} for validation", train, validation)
