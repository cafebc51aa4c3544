"""Text or tokens in, fixed blocks of token ids out, in an order that any number of ranks can share and resume.

    source (Hub set, local files, saved `datasets` folder, built-in corpus)
      -> rows of text  -> rows of token ids, no separator between rows  -> blocks of S ids  -> one cache folder

`load` prepares this once per source, tokenizer and block size and then memory-maps it. `GlobalBatchSampler` decides
which blocks an optimizer step sees; that hangs on the seed and the step alone, never on ranks or a restart.

Importing this file costs numpy only: torch, datasets, transformers and tokenizers are imported where they are used.
"""

from .blocks import PAD, BlockDataset, GlobalBatchSampler, data_loader, eval_batches, unigram_perplexity
from .cache import Data, load, load_tokens
from .checks import check_source
from .cutting import quiet, tokenise_rows
from .names import WIKITEXT, DataError, SourceName, default_split, source_name
from .reading import Reading
from .tokenizers import encode, open_tokenizer, vocabulary_size

__all__ = [
    "PAD",
    "WIKITEXT",
    "BlockDataset",
    "Data",
    "DataError",
    "GlobalBatchSampler",
    "Reading",
    "SourceName",
    "check_source",
    "data_loader",
    "default_split",
    "encode",
    "eval_batches",
    "load",
    "load_tokens",
    "open_tokenizer",
    "quiet",
    "source_name",
    "tokenise_rows",
    "unigram_perplexity",
    "vocabulary_size",
]
