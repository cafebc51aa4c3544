"""What is asked for: cheap checks, before anything is imported."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

from .. import network
from .files import select, selection_fault
from .formats import format_of, suffix_of
from .names import (
    LEGAL_DATASETS,
    WIKITEXT,
    WIKITEXT_RAW,
    WIKITEXT_READY,
    WIKITEXT_READY_BLOCK_SIZES,
    is_hub_dataset,
    is_hub_tokenizer,
    is_path,
    is_prepared,
    is_saved_folder,
    unreachable,
)
from .reading import Reading

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")


def check_source(dataset: str, tokenizer: str | None, reading: Reading | None = None) -> list[str]:
    """Find the faults that can be seen without reading the data, in well under a second.

    The network is touched only where a Hub id is asked for that neither this package nor Hugging Face has cached: one
    probe of at most 3 seconds. Files are sampled at their beginning, middle and end.

    Args:
        dataset: value of `--dataset`.
        tokenizer: value of `--tokenizer`; None checks the data set alone.
        reading: the options of reading.

    Returns:
        One line a fault, naming option, value, what is allowed and the cure; an empty list if none was found.
    """
    faults = local_faults(dataset, tokenizer, reading)
    if not faults and not is_prepared(dataset, tokenizer):
        if is_hub_dataset(dataset) and not _hub_cache_has_dataset(dataset) and not network.reachable():
            faults.append(unreachable("--dataset", dataset))
        if (
            tokenizer is not None
            and is_hub_tokenizer(tokenizer)
            and not network.hub_cache_has(tokenizer, TOKENIZER_FILES)
            and not network.reachable()
        ):
            faults.append(unreachable("--tokenizer", tokenizer))
    return faults


def local_faults(dataset: str, tokenizer: str | None, reading: Reading | None = None) -> list[str]:
    """Find those faults of `check_source` for which no network is needed."""
    reading = reading or Reading()
    faults = reading.faults()
    sources = {"--dataset": dataset, "--validation_dataset": reading.validation_dataset}
    for option, value in sources.items():
        if value is not None and (fault := _dataset_fault(value, reading.encoding)):
            faults.append(f"{option} {value}: {fault}")
    fault = tokenizer_fault(tokenizer) if tokenizer is not None else None
    return faults + ([f"--tokenizer {tokenizer}: {fault}"] if fault else [])


def _dataset_fault(dataset: str, encoding: str | None) -> str | None:
    if dataset == WIKITEXT:
        return None
    if dataset == "builtin":
        if find_spec("pydoc_data") is None:
            return f"this Python comes without pydoc_data, which holds the built-in corpus; {LEGAL_DATASETS}"
        return None
    if not is_path(dataset):
        name, colon, config = dataset.partition(":")
        if network.HUB_ID.fullmatch(name) and bool(config) == bool(colon):
            return None
        return f"neither an existing path nor a Hub id; {LEGAL_DATASETS}"

    path = Path(dataset).expanduser()
    if not path.exists():
        return f"no such file or folder; {LEGAL_DATASETS}"
    if path.is_file() and format_of(path) is None:
        return f"unsupported file type {suffix_of(path) or '(no suffix)'}; {LEGAL_DATASETS}"
    if is_saved_folder(path):
        return None
    selection = select(path)
    fault = selection_fault(path, selection, encoding)
    return f"{fault}; {LEGAL_DATASETS}" if fault and not selection.files and "empty; " not in fault else fault


def tokenizer_fault(tokenizer: str) -> str | None:
    """Say what is wrong with a value of `--tokenizer`, as far as its name and its files tell; None if nothing is."""
    if tokenizer == "builtin":
        return None
    legal = "give builtin, a folder with tokenizer.json (or vocab.json and merges.txt), or a Hub id such as gpt2"
    if not is_path(tokenizer):
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


def _hub_cache_has_dataset(dataset: str) -> bool:
    """Return whether `datasets` has prepared this set before: without a network it can load such sets only."""
    import huggingface_hub.constants

    default = Path(huggingface_hub.constants.HF_HOME, "datasets")
    cache = Path(os.environ.get("HF_DATASETS_CACHE") or default).expanduser()
    wanted = {dataset.partition(":")[0]}
    if dataset == WIKITEXT:
        ready = {WIKITEXT_READY.format(size) for size in WIKITEXT_READY_BLOCK_SIZES}
        wanted = {WIKITEXT_RAW.partition(":")[0]} | ready
    plain = {re.sub(r"[\W_]", "", name).lower() for name in wanted}  # its folders are owner___snake_case_name
    return cache.is_dir() and any(re.sub(r"[\W_]", "", folder.name).lower() in plain for folder in cache.iterdir())
