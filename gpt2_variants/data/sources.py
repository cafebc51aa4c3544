"""Sources: the Hub, WikiText-103, local data, the built-in corpus, each as rows of one column."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import network
from .files import listed, select, split_of
from .local import Rows, one_column, read_files
from .names import (
    LEGAL_DATASETS,
    LOCAL_DATASETS,
    WIKITEXT,
    WIKITEXT_RAW,
    WIKITEXT_READY,
    WIKITEXT_READY_BLOCK_SIZES,
    DataError,
    brief,
    is_hub_dataset,
    is_saved_folder,
    unreachable,
)
from .reading import END_OF_TEXT_WORD, HELD_OUT, NO_SEPARATOR, Reading
from .tokenizers import vocabulary_digest

if TYPE_CHECKING:
    import datasets
    import transformers


WIKITEXT_ROWS_PER_BATCH = 40_000  # the published cut drops the remainder of every batch of so many rows
GPT2_ENTRIES = 50_257
GPT2_VOCABULARY = "71cca498f566a6fce90612118ffe70ec265ffdc746e7e6743a2253d346af4d30"  # see vocabulary_digest


@dataclass(frozen=True)
class Source:
    """Rows of one column, `text` (strings) or `input_ids` (lists of ids); no `validation` where it must be held out.

    Attributes:
        origin: in words, what was read; it names no path.
        validated_on: in words, where its validation part comes from.
        train, validation: the rows.
        rows_per_batch: blocks are cut within so many rows; None cuts one stream.
        separator: what stands after each document: "eos", "none", or a text.
        held_out: the part of the rows to hold out, where there is no `validation`.
        notes: what a user is to know of the reading, a line each; they may name files.
    """

    origin: str
    validated_on: str
    train: datasets.Dataset
    validation: datasets.Dataset | None
    rows_per_batch: int | None = None
    separator: str = NO_SEPARATOR
    held_out: float = HELD_OUT
    notes: tuple[str, ...] = ()

    @property
    def is_text(self) -> bool:
        """Whether the rows are text."""
        return self.train.column_names == ["text"]

    @property
    def parts(self) -> list[datasets.Dataset]:
        """The parts that there are."""
        return [part for part in (self.train, self.validation) if part is not None]


def read_source(
    dataset: str,
    tokenizer: transformers.PreTrainedTokenizerBase | None,
    block_size: int,
    scratch: Path,
    reading: Reading | None = None,
) -> Source:
    """Read what `--dataset` names; WikiText-103 comes ready-made for the published tokenizer and block sizes.

    Raises:
        DataError: it cannot be read, or options of `reading` do not fit it.
    """
    reading = reading or Reading()
    source = _read(dataset, tokenizer, block_size, scratch, reading)
    if reading.validation_dataset is not None:
        own = replace(reading, validation_dataset=None, validation_split_percentage=None)
        other = _read(reading.validation_dataset, tokenizer, block_size, scratch, own)
        if other.is_text != source.is_text:
            raise DataError(
                f"--validation_dataset {reading.validation_dataset}: of it and --dataset {dataset} one holds text, the "
                "other token ids; give one kind only"
            )
        source = replace(
            source,
            validation=other.train,
            validated_on="a source of its own",
            notes=(*source.notes, *other.notes),
        )
    percent = reading.validation_split_percentage
    if percent is not None:
        if source.validation is not None:
            raise DataError(
                f"--validation_split_percentage {percent:g}: --dataset {dataset} has a validation part of its own; "
                "leave it out"
            )
        source = replace(source, held_out=percent / 100)
    return source


def _read(
    dataset: str,
    tokenizer: transformers.PreTrainedTokenizerBase | None,
    block_size: int,
    scratch: Path,
    reading: Reading,
) -> Source:
    from datasets import Dataset

    if dataset in ("builtin", WIKITEXT) and (reading.text_column or reading.encoding):
        option = "text_column" if reading.text_column else "encoding"
        raise DataError(f"--{option}: --dataset {dataset} is read as it is; leave it out")
    if dataset == "builtin":
        train, validation = (Dataset.from_dict({"text": rows}) for rows in builtin_corpus())
        separator = reading.document_separator or NO_SEPARATOR
        return Source("the topics of Python's own help", "every tenth", train, validation, separator=separator)
    if dataset == WIKITEXT:
        _separator(dataset, [], reading)
        return _read_wikitext(tokenizer, block_size, reading, scratch)
    if is_hub_dataset(dataset):
        # WikiText's rows are lines, under whichever name
        is_lines = "wikitext" in dataset.lower()
        return _from_splits(dataset, "from the Hub", _from_hub(dataset, asked=dataset), reading, scratch, is_lines)
    return _read_local(dataset, Path(dataset).expanduser(), reading, scratch)


def _read_local(dataset: str, path: Path, reading: Reading, scratch: Path) -> Source:
    import datasets

    if is_saved_folder(path):
        try:
            with network.offline(True):
                saved = datasets.load_from_disk(str(path))
        except Exception as error:
            reason = brief(error.__cause__ or error)
            raise DataError(f"--dataset {dataset}: cannot be read ({reason}); {LEGAL_DATASETS}") from error
        splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        return _from_splits(dataset, "local", splits, reading, scratch)
    selection = select(path)
    rows = {split: read_files(dataset, files, reading, scratch) for split, files in selection.used.items()}
    return _assembled(dataset, "local", rows, reading, [])


def file_notes(dataset: str) -> list[str]:
    """Return what of a local folder is read and what is not, a line each; of other sources nothing."""
    path = Path(dataset).expanduser()
    if dataset in ("builtin", WIKITEXT) or not path.is_dir() or is_saved_folder(path):
        return []
    selection = select(path)
    read = [file for files in selection.used.values() for file in files]
    notes = [listed(read), *(f"not read: {name} {why}" for name, why in selection.left_out)]
    return notes + [f"not read: the {split} split, since there is a validation split" for split in selection.unused]


def _from_splits(
    dataset: str,
    origin: str,
    splits: dict[str, datasets.Dataset],
    reading: Reading,
    scratch: Path,
    is_lines: bool = False,
) -> Source:
    """Return the source of a data set's splits, whatever words name them; with `is_lines` no row is a document."""
    by_split: dict[str, str] = {}
    notes = []
    for name in splits:
        try:
            split = split_of(name) or name
        except ValueError as error:
            raise DataError(f"--dataset {dataset}: its split {name} {error}; rename it") from error
        if split in by_split:
            notes.append(f"not read: the split {name}, since {by_split[split]} is {split} too")
        else:
            by_split[split] = name
    if "train" not in by_split:
        if len(splits) > 1:
            raise DataError(
                f"--dataset {dataset}: has no train split, only {', '.join(splits)}; give a source that has one"
            )
        by_split = {"train": next(iter(splits))}
    held = next((split for split in ("validation", "test") if split in by_split), None)
    wanted = ["train", *([held] if held else [])]
    notes += [f"not read: the split {name}" for split, name in by_split.items() if split not in wanted]
    rows = {split: one_column(dataset, splits[by_split[split]], reading, scratch) for split in wanted}
    for part in rows.values():
        part.is_documents = part.is_documents and not is_lines
    return _assembled(dataset, origin, rows, reading, notes)


def _assembled(dataset: str, origin: str, rows: dict[str, Rows], reading: Reading, notes: list[str]) -> Source:
    held = next((split for split in ("validation", "test") if split in rows), None)
    train, validation = rows["train"], rows[held] if held else None
    if validation is not None and validation.is_text != train.is_text:
        raise DataError(f"--dataset {dataset}: of train and {held} one holds text, one token ids; give one kind only")
    parts = [part for part in (train, validation) if part is not None]
    of_parts = sorted({note for part in parts for note in part.notes})
    return Source(
        ", ".join([origin, *of_parts]),
        f"its {held} split" if held else "its last rows",
        train.data,
        None if validation is None else validation.data,
        separator=_separator(dataset, parts, reading),
        notes=(*notes, *of_parts),
    )


def _separator(dataset: str, parts: list[Rows], reading: Reading) -> str:
    """Return what stands after each document. Raises `DataError` where one is asked for and rows are no documents."""
    asked = reading.document_separator
    documents = bool(parts) and all(part.is_documents for part in parts)
    if asked not in (None, NO_SEPARATOR) and not documents:
        raise DataError(
            f"--document_separator {asked}: the rows of --dataset {dataset} are no documents (lines of text, or token "
            "ids); leave it out, or give none"
        )
    return asked or (END_OF_TEXT_WORD if documents else NO_SEPARATOR)


def held_out_by_characters(source: Source) -> Source:
    """Return `source`, but that a text of one line is divided at a space, since no rows of it can be held out."""
    from datasets import Dataset

    if source.validation is not None or not source.is_text:
        return source
    texts = [text for text in source.train[:2]["text"] if text] if len(source.train) <= 2 else []
    if len(texts) != 1:
        return source
    (text,) = texts
    place = text.find(" ", int(len(text) * (1 - source.held_out))) + 1
    if place <= 0:
        return source
    return replace(
        source,
        train=Dataset.from_dict({"text": [text[:place]]}),
        validation=Dataset.from_dict({"text": [text[place:]]}),
        validated_on=f"its last {len(text) - place:,} characters",
    )


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


def _read_wikitext(
    tokenizer: transformers.PreTrainedTokenizerBase | None, block_size: int, reading: Reading, scratch: Path
) -> Source:
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
            return _from_splits(WIKITEXT, f"ready-made {ready}", splits, reading, scratch)
    train, validation = _from_hub(WIKITEXT_RAW, asked=WIKITEXT, split=["train[1%:]", "train[:1%]"])
    if lost:
        print(
            f"note: cutting {WIKITEXT} from the raw set, for its ready-made blocks cannot be had: {lost}",
            file=sys.stderr,
        )
    train, validation = (one_column(WIKITEXT, part, reading, scratch).data for part in (train, validation))
    return Source(
        f"cut from {WIKITEXT_RAW}",
        "its first 1 %",
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
