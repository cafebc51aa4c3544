"""What is asked for: cheap checks, before anything is imported."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

from .. import network
from .formats import content_fault, data_files, split_fault
from .names import (
    FILE_KINDS,
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

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")


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
    faults = local_faults(dataset, tokenizer)
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


def local_faults(dataset: str, tokenizer: str | None) -> list[str]:
    """Find those faults of `check_source` for which no network is needed."""
    fault = _dataset_fault(dataset)
    faults = [f"--dataset {dataset}: {fault}"] if fault else []
    fault = tokenizer_fault(tokenizer) if tokenizer is not None else None
    return faults + ([f"--tokenizer {tokenizer}: {fault}"] if fault else [])


def _dataset_fault(dataset: str) -> str | None:
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
    if path.is_file() and path.suffix.lower() not in FILE_KINDS:
        return f"unsupported file type {path.suffix or '(no suffix)'}; {LEGAL_DATASETS}"
    if is_saved_folder(path):
        return None
    files = data_files(path)
    if not files and path.is_dir() and not any(path.iterdir()):
        return f"the folder is empty; {LEGAL_DATASETS}"
    if not files and path.is_dir():
        return f"the folder holds no {', '.join(FILE_KINDS)} file; {LEGAL_DATASETS}"
    if all(file.stat().st_size == 0 for file in files):
        return f"{'the file is' if path.is_file() else 'all its files are'} empty; give one that holds text"
    for file in files:
        if fault := content_fault(file):
            where = "" if file == path else f"{file.relative_to(path)}: "
            return f"{where}{fault}"
    return split_fault(path, files)


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
