"""Tokenizers: opened, trained, and never leaving out a part of a text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .. import network
from .arrow import rows_in_batch
from .checks import tokenizer_fault
from .names import LOCAL_TOKENIZERS, DataError, brief, is_path, unreachable
from .reading import END_OF_TEXT_WORD, NO_SEPARATOR

if TYPE_CHECKING:
    import datasets
    import transformers


END_OF_TEXT = "<|endoftext|>"
BUILTIN_VOCAB_SIZE = 4_000
BUILTIN_TRAINING_CHARACTERS = 20_000_000
LARGEST_ID = 2**31 - 2  # so that the number of entries is an int32 too


def open_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    """Open a tokenizer from a folder, with no network, or from the Hub.

    Raises:
        DataError: there is none, it cannot be read, or an id of its is larger than any model's vocabulary.
    """
    from transformers import AutoTokenizer, GPT2TokenizerFast  # type: ignore[attr-defined]  # made on import

    if fault := tokenizer_fault(name):
        raise DataError(f"--tokenizer {name}: {fault}")
    is_local = is_path(name)
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
            raise DataError(unreachable("--tokenizer", name)) from error
        raise DataError(f"--tokenizer {name}: cannot be read ({brief(error)}); {LOCAL_TOKENIZERS}") from error
    if (largest := vocabulary_size(opened) - 1) > LARGEST_ID:
        raise DataError(
            f"--tokenizer {name}: gives ids up to {largest}, and a model needs an entry for each up to the largest; "
            f"at most {LARGEST_ID} is possible, give a tokenizer that numbers its tokens from 0 on"
        )
    return opened


def vocabulary_size(tokenizer: transformers.PreTrainedTokenizerBase) -> int:
    """Return the entries that a model needs for a tokenizer: its largest id, of added tokens too, plus one.

    `len(tokenizer)` counts the tokens, which are fewer where ids were left out.
    """
    return max((*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder), default=-1) + 1


def encode(
    tokenizer: transformers.PreTrainedTokenizerBase, name: str, texts: list[str], special_tokens: bool = False
) -> list[list[int]]:
    """Return the ids of each text, and nothing of it left out.

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
            reason = f" ({brief(error)})"
            line = next((text for text in texts if fails(text)), "")
            culprit = next((word for word in line.split() if fails(word)), line)
    shown = repr(culprit if len(culprit) <= 40 else f"{culprit[:40]}...")
    raise DataError(
        f"--tokenizer {name}: cannot encode {shown}, since it has no entry for it and no unk token in its "
        f"vocabulary{reason}; give a tokenizer with an unk token, or a byte-level one such as builtin or gpt2"
    )


def separator_id(separator: str, tokenizer: transformers.PreTrainedTokenizerBase, name: str) -> int | None:
    """Return the id that stands after each document; None for no separator, or where a tokenizer has no end-of-text.

    Args:
        separator: "none", "eos", or a text.
        tokenizer: an opened one.
        name: what the user calls it, for the error.

    Raises:
        DataError: the text is not one token.
    """
    if separator == NO_SEPARATOR:
        return None
    if separator == END_OF_TEXT_WORD:
        return tokenizer.eos_token_id
    ids = encode(tokenizer, name, [separator])[0]
    if len(ids) != 1:
        raise DataError(
            f"--document_separator {separator}: is {len(ids)} tokens of --tokenizer {name}, and one is needed; eos, "
            "none, or a text that is one token"
        )
    return ids[0]


def line_note(tokenizer: transformers.PreTrainedTokenizerBase) -> str | None:
    """Return a warning if a tokenizer gives lines other tokens than the same text in one piece; else None.

    SentencePiece and its like put a space before every text that they are given.
    """
    lines = ["first line\n", "second line\n"]
    try:
        first, second, whole = encode(tokenizer, "", [*lines, "".join(lines)])
    except DataError:  # it cannot encode English
        return None
    if first + second == whole:
        return None
    return "the tokenizer adds tokens at the beginning or end of every line, which the text does not have"


def _left_out(tokenizer: transformers.PreTrainedTokenizerBase, texts: list[str]) -> str | None:
    """Return a character of `texts` that a BPE would leave out without a word; None for none, or for no BPE."""
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


def train_tokenizer(rows: datasets.Dataset) -> transformers.PreTrainedTokenizerBase:
    """Return a byte-level BPE like GPT-2's, small: 4,000 entries (fewer on tiny texts), `<|endoftext|>` is id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def texts() -> Iterator[list[str]]:
        left = BUILTIN_TRAINING_CHARACTERS
        for batch in rows.iter(batch_size=rows_in_batch(rows)):
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


def vocabulary_digest(tokenizer: transformers.PreTrainedTokenizerBase, entries: int | None = None) -> str:
    """Return digest of the vocabulary, or of its first `entries` ids: a model may have added its own after them."""
    vocabulary = [(token, i) for token, i in tokenizer.get_vocab().items() if entries is None or i < entries]
    return hashlib.sha256(json.dumps(sorted(vocabulary)).encode()).hexdigest()
