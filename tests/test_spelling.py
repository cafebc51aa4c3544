"""What ids spell: as the tokenizer's own decoding, but for bytes that are no characters."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gpt2_variants.spelling import Spelling

TEXT = "naïve café “quotes” 漢字 🙂 and plain words, many plain words"


def byte_level(size: int = 270) -> PreTrainedTokenizerFast:
    """A byte-level BPE, whose entries are mostly single bytes, with a special token and an added word."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    backend.train_from_iterator([TEXT] * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.add_tokens(["Häuschen"])
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


def test_whole_text_is_the_tokenizers_own(tokenizer):
    ids = [tokenizer.eos_token_id, *tokenizer(TEXT + " \\xe2")["input_ids"]]
    assert Spelling(tokenizer).text(ids) == TEXT + " \\xe2"
    assert Spelling(tokenizer).text(ids) == tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def test_bytes_that_are_no_characters_are_shown_as_such(tokenizer):
    spelling = Spelling(tokenizer)
    of_bytes = {spelling._bytes(id): id for id in range(len(tokenizer))}
    e2, x80, a = (of_bytes[byte] for byte in (b"\xe2", b"\x80", b"a"))
    assert "\ufffd" in tokenizer.decode([a, e2, a])
    assert spelling.text([a, e2, a]) == r"a\xe2a"
    assert spelling.text([e2, x80]) == r"\xe2\x80"
    assert spelling.quoted(e2) == r"b'\xe2'"
    assert spelling.quoted(a) == "'a'"
    # the tokenizer's own decoding takes the characters of added words for bytes
    assert spelling.text(tokenizer("a Häuschen")["input_ids"]) == "a Häuschen"
    assert spelling.quoted(tokenizer.eos_token_id) == "'<|end|>'"
    assert spelling.quoted(tokenizer.convert_tokens_to_ids("Häuschen")) == "'Häuschen'"


def test_what_is_streamed_is_the_text_and_no_character_is_printed_in_parts(tokenizer, capsys):
    """Random ids, so that characters are cut anywhere; each piece is complete when it is printed."""
    spelling, rng = Spelling(tokenizer), random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(len(tokenizer) + 3) for _ in range(30)] + tokenizer(TEXT)["input_ids"][: rng.randrange(40)]
        streamer = spelling.streamer()
        streamer.put(torch.tensor([ids[:5]]))
        shown = capsys.readouterr().out
        for id in ids[5:]:
            streamer.put(torch.tensor([id]))
            piece = capsys.readouterr().out
            assert "\ufffd" not in piece
            shown += piece
            assert spelling.text(ids).startswith(shown)
        streamer.end()
        assert shown + capsys.readouterr().out == spelling.text(ids) + "\n"


def test_a_tokenizer_without_bytes_is_left_to_its_own_decoding():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert Spelling(tokenizer).text([0, 1, 1]) == tokenizer.decode([0, 1, 1])
    assert Spelling(tokenizer).quoted(1) == "'b'"
