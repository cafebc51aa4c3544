"""What the content of a source and a tokenizer hangs on: by it prepared data are found again."""

import hashlib
import json
from pathlib import Path
from typing import Any

from .digests import file_digest, file_digests
from .files import select
from .names import WIKITEXT, default_cache, is_hub_dataset, is_hub_tokenizer, is_saved_folder
from .sources import WIKITEXT_ROWS_PER_BATCH, builtin_corpus
from .tokenizers import BUILTIN_VOCAB_SIZE


def dataset_identity(dataset: str, cache_dir: Path | None) -> Any:
    """Return what decides the content of a source: the bytes of local data wherever they lie, a Hub set's name."""
    if dataset == "builtin":
        return {"builtin": hashlib.sha256(json.dumps(builtin_corpus()).encode()).hexdigest()}
    if is_hub_dataset(dataset):
        return {"hub": dataset, "rows_per_batch": WIKITEXT_ROWS_PER_BATCH if dataset == WIKITEXT else None}
    path, cache = Path(dataset).expanduser(), Path(cache_dir or default_cache())
    if path.is_file():
        return {"file": [path.suffix.lower(), *file_digests([path], path, cache)]}
    found = sorted(path.rglob("*")) if is_saved_folder(path) else select(path).files
    files = [file for file in found if file.is_file()]
    digests = file_digests(files, path, cache)
    names = [file.relative_to(path).as_posix() for file in files]
    return {"folder": [list(pair) for pair in zip(names, digests, strict=True)]}


def tokenizer_identity(tokenizer: str) -> Any:
    """Return what the tokens of a text hang on: the bytes of local files, the name of one on the Hub."""
    if tokenizer == "builtin":
        return {"builtin": BUILTIN_VOCAB_SIZE}
    if is_hub_tokenizer(tokenizer):
        return {"hub": tokenizer}
    # A tokenizer may lie beside a model: what can belong to it is small and not a weight.
    files = sorted(Path(tokenizer).expanduser().iterdir())
    parts = [file for file in files if file.suffix in (".json", ".txt", ".model", ".tiktoken")]
    return {"folder": [[file.name, file_digest(file)] for file in parts if file.is_file()]}
