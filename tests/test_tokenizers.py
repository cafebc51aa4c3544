"""Tokenizers of other people: ids with gaps, ids above 65,535, and text that has no id."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import train
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, PythonBackend

from gpt2_variants import VARIANTS, __main__
from gpt2_variants.data import DataError, encode, load, load_tokens, open_tokenizer, unigram_perplexity, vocabulary_size
from gpt2_variants.hub import export

GAP = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "d": 4, "e": 50}
HIGH = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "d": 65_535, "e": 70_000}


def fast(model, **options) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def words(vocabulary: dict[str, int], **options) -> PreTrainedTokenizerFast:
    return fast(models.WordLevel(vocabulary, unk_token="<unk>"), **options)


def saved(tokenizer, folder: Path) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("a b c d e\n" * 400)
    return str(path)


class Characters(PythonBackend):
    """A tokenizer in Python without an unk token: what it does not know gets None."""

    def __init__(self, vocab: dict[str, int] | None = None, **options):
        self.entries = vocab or {"a": 0, "b": 1, " ": 40}
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return len(self.entries)

    def get_vocab(self) -> dict[str, int]:
        return {**self.entries, **self.added_tokens_encoder}

    def _tokenize(self, text: str) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.entries.get(token)

    def _convert_id_to_token(self, index: int) -> str | None:
        return next((token for token, i in self.entries.items() if i == index), None)


def test_the_vocabulary_is_the_largest_id_plus_one():
    assert vocabulary_size(words(GAP)) == 51
    assert len(words(GAP)) == 6  # which is not what a model needs
    assert vocabulary_size(words({"<unk>": 0, "a": 1})) == 2
    assert vocabulary_size(words({"<unk>": 0, "a": 1}, additional_special_tokens=["<x>", "<y>"], pad_token="<p>")) == 5
    # added tokens are numbered by the count of tokens: here in the gap
    assert vocabulary_size(words(GAP, additional_special_tokens=["<x>"])) == 51
    assert vocabulary_size(fast(models.BPE({"a": 0, "b": 70_000}, []))) == 70_001
    assert vocabulary_size(fast(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0), pad_token="<p>")) == 3
    assert vocabulary_size(Characters()) == 41


@pytest.mark.parametrize(("vocabulary", "dtype"), [(GAP, "uint16"), (HIGH, "int32")])
def test_blocks_hold_the_tokenizers_own_ids(vocabulary, dtype, text, tmp_path):
    tokenizer = saved(words(vocabulary), tmp_path / "tokenizer")
    data = load(text, tokenizer, 10)
    assert data.train.rows.features["input_ids"].feature.dtype == dtype
    once = [vocabulary[word] for word in "abcde"]
    assert data.train.__getitems__([0])["input_ids"].tolist() == [once * 2]
    assert data.vocab_size == max(vocabulary.values()) + 1
    assert f"{data.vocab_size:,} entries" in data.description
    assert np.isfinite(unigram_perplexity(data.train, data.validation, data.vocab_size))
    assert sorted(set(load_tokens(text, tokenizer, 10, "all").tolist())) == sorted(once)


def test_65_536_entries_fit_16_bits_and_one_more_does_not(text, tmp_path):
    for largest, dtype in ((65_535, "uint16"), (65_536, "int32")):
        tokenizer = saved(words({**GAP, "e": largest}), tmp_path / str(largest))
        data = load(text, tokenizer, 10)
        assert data.train.rows.features["input_ids"].feature.dtype == dtype
        assert data.train.tokens().max() == largest


def test_an_id_that_no_model_can_have_an_entry_for(text, tmp_path, monkeypatch):
    """The limit is lowered: tokenizers itself takes gigabytes to write one with such an id."""
    monkeypatch.setattr("gpt2_variants.data.tokenizers.LARGEST_ID", 49)
    with pytest.raises(DataError, match=r"gives ids up to 50, .* at most 49 is possible"):
        load(text, saved(words(GAP), tmp_path / "tokenizer"), 10)


@pytest.mark.parametrize(
    ("ids", "kind", "said"),
    [
        ([3, 50, 4], "int64", None),
        ([3, 49, 4], "int32", None),  # an id of the gap has an entry all the same
        ([3, 51, 4], "int64", "has 51 entries, .* token id 51;"),
        ([3, 65_536 + 3, 4], "int32", "the token id 65539;"),  # 3, if it wrapped
        ([3, 2**32 + 3, 4], "int64", "the token id 4294967299;"),
        ([3, 2**64 - 1, 4], "uint64", "the token id 18446744073709551615;"),
        ([3, -100, 4], "int64", "the token id -100;"),
    ],
)
def test_ids_that_others_made_are_checked_before_they_are_stored(ids, kind, said, tmp_path):
    rows = pa.array([ids] * 60, pa.list_(getattr(pa, kind)()))
    Dataset(pa.table({"input_ids": rows})).save_to_disk(tmp_path / "rows")
    tokenizer = saved(words(GAP), tmp_path / "tokenizer")
    rows = str(tmp_path / "rows")
    reads = (lambda: load(rows, tokenizer, 6).train.tokens(), lambda: load_tokens(rows, tokenizer, 6, "all"))
    for read in reads:
        if said is None:
            assert read()[:3].tolist() == ids
        else:
            with pytest.raises(DataError, match=said):
                read()


def small(tiny_run, dataset: str, tokenizer: str) -> list[str]:
    """`tiny_run` on other data."""
    options = list(tiny_run)
    options[options.index("--dataset") + 1] = dataset
    return [*options, "--tokenizer", tokenizer, "--max_steps", "2"]


@pytest.mark.parametrize("variant", ["gpt2", "duo_predict"])
def test_a_run_with_gaps_from_prepare_to_generate(variant, text, tiny_run, tmp_path, in_process, capsys):
    tokenizer = saved(words(GAP), tmp_path / "tokenizer")
    options = small(tiny_run, text, tokenizer)
    plan = train(options, tmp_path / "plan", "--dry_run", variant=variant)
    counted = int(capsys.readouterr().out.split("parameters         ")[1].split()[0].replace(",", ""))
    assert not plan.exists()
    folder = train(options, tmp_path / "run", variant=variant)
    assert json.loads((folder / "run.json").read_text())["num_parameters"] == counted
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    again = AutoTokenizer.from_pretrained(folder / "model")
    entries = 51 + VARIANTS[variant].extra_vocabulary
    assert model.transformer.wte.weight.shape[0] == model.config.vocab_size == entries
    assert vocabulary_size(again) == entries
    assert again("a b e")["input_ids"] == [1, 2, 50]
    if variant == "duo_predict":
        assert again.mask_token_id == model.config.mask_token_id == 51
        assert again.mask_token == "<|MASK|>"
        assert again("a <|MASK|> e")["input_ids"] == [1, 51, 50]
    capsys.readouterr()
    assert __main__.main(["evaluate", "--model", str(folder / "model"), "--dataset", text, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 2000
    assert (
        __main__.main(["generate", "--model", str(folder / "model"), "--prompt", "a b e", "--max_new_tokens", "4"]) == 0
    )
    prepared = [
        "--dataset",
        text,
        "--tokenizer",
        tokenizer,
        "--block_size",
        "8",
        "--output_dir",
        str(tmp_path / "blocks"),
    ]
    assert __main__.main(["prepare", *prepared]) == 0
    assert "of a vocabulary of 51" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tokenizer", "fields", "mask"),
    [
        (words({"<unk>": 0, "a": 1}), {}, ("<|MASK|>", 2)),
        (words(GAP), {}, ("<|MASK|>", 51)),
        (words(HIGH), {}, ("<|MASK|>", 70_001)),
        (fast(models.BPE(GAP, [], unk_token="<unk>")), {}, ("<|MASK|>", 51)),
        (fast(models.WordPiece(GAP, unk_token="<unk>")), {}, ("<|MASK|>", 51)),
        (words(GAP, additional_special_tokens=["<x>"], mask_token="[MASK]"), {}, ("<|MASK|>", 51)),
        (words({"<unk>": 0, "<|MASK|>": 1, "a": 2}), {}, ("<|MASK_1|>", 3)),  # the name is taken by another id
        (words({"<unk>": 0, "a": 1, "m": 2}, mask_token="m"), {"mask_token_id": 2}, ("m", 2)),
        (words({"<unk>": 0, "a": 1}), {"vocab_size": 64}, ("<|MASK|>", 63)),  # padded: the model's last entry
        (fast(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)), {}, ("<|MASK|>", 2)),
    ],
)
def test_the_exported_mask_token_has_the_models_id(tokenizer, fields, mask, tmp_path, capsys):
    give_away(tokenizer, fields, tmp_path)
    exported = open_tokenizer(str(tmp_path / "model"))
    assert (exported.mask_token, exported.mask_token_id) == mask
    assert exported.convert_tokens_to_ids(mask[0]) == mask[1]
    assert exported(f"a {mask[0]}", add_special_tokens=False)["input_ids"][-1] == mask[1]
    for token, i in tokenizer.get_vocab().items():
        assert exported.convert_tokens_to_ids(token) == i
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("tokenizer", "fields", "said"),
    [
        (words({"<unk>": 0, "a": 1}), {"mask_token_id": 1}, "id 1 is its 'a'"),
        (fast(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)), {"vocab_size": 9}, "the model's id 8"),
    ],
)
def test_a_mask_token_that_cannot_have_the_id_is_said_in_a_line(tokenizer, fields, said, tmp_path, capsys):
    give_away(tokenizer, fields, tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: the exported tokenizer names no mask token: ")
    assert said in line
    assert open_tokenizer(str(tmp_path / "model")).mask_token_id is None


def give_away(tokenizer, fields: dict, folder: Path) -> None:
    """Export a small duo_predict for a tokenizer."""
    record = VARIANTS["duo_predict"]
    shape = {"n_layer": 1, "n_embd": 8, "n_head": 2, "bos_token_id": None, "eos_token_id": None}
    config = record.make_config(None, vocabulary_size(tokenizer), 16, **shape, **fields)
    weights = dict(record.model_class(config).named_parameters())
    export(record, config, {name: p.detach() for name, p in weights.items()}, tokenizer, 8, folder / "model")


def byte_pairs(vocabulary: dict[str, int], **options) -> PreTrainedTokenizerFast:
    return fast(models.BPE(vocabulary, [], **options))


NO_UNK = {
    "words": (words({"a": 0, "b": 1}), "Missing [UNK] token"),
    "word pieces": (fast(models.WordPiece({"a": 0, "b": 1}, unk_token="[UNK]")), "Missing [UNK] token"),
    "unigram": (fast(models.Unigram([("a", -1.0), ("b", -1.0)], unk_id=None)), "`unk_id` is missing"),
    "byte pairs whose unk token is missing": (byte_pairs({"a": 0, "b": 1}, unk_token="<u>"), "<u>` not found"),
    "byte pairs, which leave out": (byte_pairs({"a": 0, "b": 1}), ""),
    "byte pairs that fall back on bytes they lack": (byte_pairs({"a": 0, "b": 1}, byte_fallback=True), ""),
    "a tokenizer in Python": (Characters(), "no id"),
}


@pytest.mark.parametrize("kind", NO_UNK)
def test_text_without_an_id_is_named_in_one_line(kind):
    tokenizer, reason = NO_UNK[kind]
    assert encode(tokenizer, "mine", ["a b", "", "b"])
    with pytest.raises(DataError) as caught:
        encode(tokenizer, "mine", ["a b", "a b zé a"])
    line = str(caught.value)
    assert line.startswith("--tokenizer mine: cannot encode 'z")
    assert "no unk token" in line
    assert "give a tokenizer with an unk token, or a byte-level one" in line
    assert reason in line
    assert "\n" not in line


def test_byte_pairs_that_encode_everything_or_drop_on_purpose_are_not_refused():
    assert encode(byte_pairs({"a": 0, "<u>": 70}, unk_token="<u>"), "mine", ["a z"]) == [[0, 70]]
    stripped = byte_pairs({"a": 0})
    stripped.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.StripAccents()])
    assert encode(stripped, "mine", ["A  a\n"]) == [[0, 0]]
    with_bytes = byte_pairs({f"<0x{i:02X}>": i for i in range(256)}, byte_fallback=True)
    assert encode(with_bytes, "mine", ["é"]) == [[0xC3, 0xA9]]
    added = byte_pairs({"a": 0})
    added.add_tokens(["<x>"])
    assert encode(added, "mine", ["a<x>"]) == [[0, 1]]


def test_an_unk_token_beyond_the_vocabulary_is_refused(text, tmp_path, monkeypatch):
    """Python tokenizers may give any id; here one that no token has."""
    tokenizer = saved(words(GAP), tmp_path / "tokenizer")
    monkeypatch.setattr("gpt2_variants.data.cutting.encode", lambda tokenizer, name, texts: [[0, 99]] * len(texts))
    with pytest.raises(DataError, match="gives the id 99, which none of its tokens has"):
        load(text, tokenizer, 11)


def test_every_command_says_it_in_one_line(tiny_run, tmp_path, in_process, capsys):
    """`train`, `evaluate`, `prepare` and `generate`, also where several processes tokenise."""
    known, unknown = tmp_path / "known.txt", tmp_path / "unknown.txt"
    known.write_text("a b c d\n" * 400)
    unknown.write_text("a b c d zzz\n" * 400)
    tokenizer = saved(words({"a": 0, "b": 1, "c": 2, "d": 3}), tmp_path / "tokenizer")

    def error(code: int) -> str:
        assert code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "loss_type" not in line]
        assert line.startswith("error: ")
        assert "cannot encode 'zzz'" in line
        assert "no unk token" in line
        return line

    train(small(tiny_run, str(unknown), tokenizer), tmp_path / "none", variant="gpt2", code=2)
    assert not (tmp_path / "none").exists()
    assert f"--tokenizer {tokenizer}: " in error(2)
    error(__main__.main(["train", "--variant", "gpt2", *small(tiny_run, str(unknown), tokenizer), "--dry_run"]))
    prepared = ["--dataset", str(unknown), "--tokenizer", tokenizer, "--output_dir", str(tmp_path / "blocks")]
    error(__main__.main(["prepare", *prepared]))
    assert not (tmp_path / "blocks").exists()
    with pytest.raises(DataError, match="cannot encode 'zzz'"):
        load(str(unknown), tokenizer, 10, num_proc=2)

    model = str(train(small(tiny_run, str(known), tokenizer), tmp_path / "run", variant="gpt2") / "model")
    capsys.readouterr()
    error(__main__.main(["evaluate", "--model", model, "--dataset", str(unknown)]))
    error(__main__.main(["evaluate", "--model", model, "--dataset", str(unknown), "--split", "validation"]))
    error(__main__.main(["generate", "--model", model, "--prompt", "a zzz"]))


def test_a_demo_whose_tokenizer_cannot_encode_the_closing_prompt_is_finished(tiny_run, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a b c d\n" * 400)
    monkeypatch.setattr("gpt2_variants.report.write", lambda runs: type("Written", (), {"page": "page"}))
    monkeypatch.setattr("signal.signal", lambda *arguments: None)
    tokenizer = saved(words({"a": 0, "b": 1, "c": 2, "d": 3}), tmp_path / "tokenizer")
    train(small(tiny_run, str(text), tokenizer), tmp_path / "run", variant="gpt2")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sample ")]
    assert "none: --tokenizer" in line
    assert "cannot encode 'The'" in line
