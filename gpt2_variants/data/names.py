"""What data sets and tokenizers are called, and what those names mean."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from .. import network


class DataError(ValueError):
    """The data asked for cannot be had. One line a fault: the option, its value, what is legal, the cure."""


WIKITEXT = "wikitext-103"
WIKITEXT_READY = "BluebrainAI/wikitext-103-raw-v1-seq{}-tokenized-grouped"
WIKITEXT_READY_BLOCK_SIZES = (512, 1024)
WIKITEXT_RAW = "Salesforce/wikitext:wikitext-103-raw-v1"
# A name that ends with one of them means a file, also one that is not read or not there.
FILE_SUFFIXES = frozenset(
    (
        ".arrow .bin .bz2 .csv .gz .json .jsonl .md .ndjson .npy .parquet .pdf .pt .raw .text .tokens .tsv .txt .xml "
        ".xz .zip .zst"
    ).split()
)
LEGAL_DATASETS = (
    f"give builtin, {WIKITEXT}, a .txt, .jsonl, .json, .csv, .tsv or .parquet file (text also as .gz, .bz2, .xz, "
    ".zst), token ids as .npy or .bin, a folder of such files, a folder saved by `datasets`, or a Hub id (id or "
    "id:config)"
)
LOCAL_DATASETS = "use --dataset builtin, or a local .txt, .jsonl or .parquet file or folder"
LOCAL_TOKENIZERS = "use --tokenizer builtin, or a local folder with tokenizer.json (or vocab.json and merges.txt)"


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
    """Return the `SourceName` of a value of `--dataset`."""
    if dataset == "builtin":
        return SourceName("Python's language reference", language="en")
    if dataset == WIKITEXT:
        hub_id, _, config = WIKITEXT_RAW.partition(":")
        return SourceName("WikiText-103 (raw)", hub_id, config, "train[:1%]", language="en")
    if is_hub_dataset(dataset):
        hub_id, _, config = dataset.partition(":")
        return SourceName(dataset, hub_id, config or None)
    return SourceName(Path(dataset).expanduser().absolute().name)


def is_path(name: str) -> bool:
    """Return whether `name` means a place on this machine; everything else is taken for a Hub id."""
    looks_local = name.startswith(("/", "./", "../", "~")) or name in (".", "..") or name.count("/") > 1
    return looks_local or Path(name).suffix.lower() in FILE_SUFFIXES or (name != "" and Path(name).exists())


def is_hub_dataset(dataset: str) -> bool:
    """Return whether a value of `--dataset` names something on the Hub."""
    return dataset == WIKITEXT or (dataset != "builtin" and not is_path(dataset))


def is_hub_tokenizer(tokenizer: str) -> bool:
    """Return whether a value of `--tokenizer` names something on the Hub."""
    return tokenizer != "builtin" and not is_path(tokenizer)


def is_saved_folder(path: Path) -> bool:
    """Return whether `datasets` saved the folder at `path`."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def unreachable(option: str, value: str) -> str:
    """Return the fault of a Hub id that cannot be had, with what can be used offline."""
    cure = LOCAL_DATASETS if option == "--dataset" else LOCAL_TOKENIZERS
    return (
        f"{option} {value}: not a local path, and the Hugging Face Hub ({network.endpoint()}) cannot be reached to get "
        f"it; {cure}, or load it once where there is a network"
    )


def brief(error: BaseException) -> str:
    """Return an error in one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def default_split(dataset: str) -> str:
    """Return what `load_tokens` reads where no split is asked for: all of a local file, else the validation part."""
    is_file = dataset not in ("builtin", WIKITEXT) and Path(dataset).expanduser().is_file()
    return "all" if is_file else "validation"


def default_cache() -> Path:
    """Return the folder of prepared data."""
    return Path(os.environ.get("GPT2_VARIANTS_CACHE") or "~/.cache/gpt2_variants").expanduser()


def is_prepared(dataset: str, tokenizer: str | None) -> bool:
    """Return whether the default cache holds this Hub set or tokenizer, so that a load may need no network."""
    for file in default_cache().glob("*/info.json"):
        try:
            info = json.loads(file.read_text(encoding="utf-8"))
            if info["dataset"] == dataset and tokenizer in (None, info["tokenizer"]):
                return True
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            continue  # damaged: it will be prepared anew
    return False
