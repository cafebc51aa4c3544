"""`gpt2_variants.data` against slow references in plain Python; no network, no GPU."""

import http.server
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import output_of, patience, python, write_text

from gpt2_variants import data, network
from gpt2_variants.data import (
    PAD,
    BlockDataset,
    DataError,
    GlobalBatchSampler,
    Reading,
    check_source,
    data_loader,
    eval_batches,
    load,
    unigram_perplexity,
)

ROOT = Path(__file__).parents[1]
TRICKY = "tabs\t\tand  spaces \n naïve café 🙂👩‍👩‍👧 \x01 \r\n it 's , <|endoftext|> end"


@pytest.fixture(autouse=True)
def dialled(monkeypatch, tmp_path):
    """Cut this process off from everything but itself, with empty caches; the addresses it tried are listed."""
    calls = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            calls.append(address)
            if address[0] != "127.0.0.1":
                raise OSError("no network in tests")
        return connect(self, address)

    def guarded_look_up(host, *args, **kwargs):
        calls.append(host)
        if host != "127.0.0.1":
            raise socket.gaierror("no network in tests")
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guarded_connect)
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GPT2_VARIANTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf/hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf/datasets")
    network.answers.cache_clear()
    return calls


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    """A tokenizer folder as GPT-2's: vocab.json and merges.txt, nothing else; some 400 entries."""
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("gpt2")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([make_text(300, seed=9)], 400, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    return str(folder)


def make_text(lines: int, seed: int = 0) -> str:
    """Lines of 0 to 12 words, every one ended by a newline."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh é🙂", k=rng.randint(1, 7))) for _ in range(80)]
    return "".join(" ".join(rng.choices(words, k=rng.randint(0, 12))) + "\n" for _ in range(lines))


def encode(folder: str, texts: list[str]) -> list[list[int]]:
    from transformers import GPT2TokenizerFast

    tokenizer = GPT2TokenizerFast.from_pretrained(folder)
    return [tokenizer.encode(text) for text in texts]


def cut(rows: list[list[int]], size: int, rows_per_batch: int | None = None) -> list[list[int]]:
    """The rule in plain Python: concatenate within batches of rows, cut, drop each batch's remainder."""
    blocks = []
    for first in range(0, len(rows), rows_per_batch or len(rows)):
        stream = []
        for row in rows[first : first + (rows_per_batch or len(rows))]:
            stream += row
        while len(stream) >= size:
            blocks.append(stream[:size])
            stream = stream[size:]
    return blocks


def held_out(rows: list[list[int]], size: int) -> int:
    """Rows to hold out in plain Python: the last 5 %, or as many more as make a block."""
    count = max(1, round(0.05 * len(rows)))
    while sum(len(row) for row in rows[len(rows) - count :]) < size:
        count += 1
    return count


def read(blocks: BlockDataset) -> list[list[int]]:
    return blocks.__getitems__(list(range(len(blocks))))["input_ids"].tolist()


def in_memory(rows: list[list[int]]) -> BlockDataset:
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("uint16"), length=len(rows[0]))})
    return BlockDataset(datasets.Dataset.from_dict({"input_ids": rows}, features=features))


def assert_clear(line: str, option: str, value: str, *words: str) -> None:
    """One line that names the option and its value first, then what is wrong and the cure."""
    assert line.startswith(f"{option} {value}: "), line
    assert "\n" not in line
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in: {line}"


# --- rows to blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("bytes_per_batch", [300, data.arrow.BYTES_PER_BATCH])
def test_text_becomes_the_blocks_of_plain_python(tmp_path, monkeypatch, gpt2_folder, num_proc, bytes_per_batch):
    monkeypatch.setattr(data.arrow, "BYTES_PER_BATCH", bytes_per_batch)  # 300: a remainder is carried at every few rows
    text = make_text(400)
    loaded = load(write_text(tmp_path / "a.txt", text), gpt2_folder, 32, num_proc=num_proc)

    rows = encode(gpt2_folder, text.splitlines(keepends=True))
    assert all(row for row in rows), "an empty line is a newline token"
    held = held_out(rows, 32)
    assert held == 20
    assert read(loaded.train) == cut(rows[:-held], 32)
    assert read(loaded.validation) == cut(rows[-held:], 32)
    assert loaded.train.block_size == 32
    assert loaded.vocab_size == len(loaded.tokenizer) == len(json.loads(Path(gpt2_folder, "vocab.json").read_text()))
    assert f"{len(loaded.train)} blocks" in loaded.description
    assert f"{sum(map(len, rows[:-held])):,} tokens" in loaded.description


def test_few_rows_are_held_out_until_they_give_a_block(tmp_path, gpt2_folder):
    text = make_text(30)
    loaded = load(write_text(tmp_path / "a.txt", text), gpt2_folder, 128)
    rows = encode(gpt2_folder, text.splitlines(keepends=True))
    held = held_out(rows, 128)
    assert held > round(0.05 * 30)
    assert read(loaded.validation) == cut(rows[-held:], 128)
    assert read(loaded.train) == cut(rows[:-held], 128)


def test_too_little_text_names_the_largest_block_size_that_fits(tmp_path, gpt2_folder):
    path = write_text(tmp_path / "a.txt", make_text(30))
    with pytest.raises(DataError) as caught:
        load(path, gpt2_folder, 4096)
    assert_clear(str(caught.value), "--dataset", path, "too little", "4096", "use --block_size ", "more text")
    fits = int(str(caught.value).split("--block_size ")[1].split()[0])
    loaded = load(path, gpt2_folder, fits)
    assert len(loaded.train) >= 1
    assert len(loaded.validation) >= 1
    with pytest.raises(DataError, match=f"use --block_size {fits} or less"):
        load(path, gpt2_folder, fits + 1)


def test_one_row_cannot_be_split(tmp_path, gpt2_folder):
    path = write_text(tmp_path / "a.txt", "x" * 5000)
    with pytest.raises(DataError) as caught:
        load(path, gpt2_folder, 16)
    assert_clear(str(caught.value), "--dataset", path, "1 row", "break the text into lines")


def test_a_text_of_one_line_is_divided_at_a_space(tmp_path, gpt2_folder):
    text = "one long line " * 500
    loaded = load(write_text(tmp_path / "a.txt", text), gpt2_folder, 16)
    place = text.index(" ", int(0.95 * len(text))) + 1
    train, validation = encode(gpt2_folder, [text[:place], text[place:]])
    assert (read(loaded.train), read(loaded.validation)) == (cut([train], 16), cut([validation], 16))
    assert f"its last {len(text) - place} characters for validation" in loaded.description


def test_block_size_of_one_is_refused(gpt2_folder):
    with pytest.raises(DataError) as caught:
        load("builtin", gpt2_folder, 1)
    assert_clear(str(caught.value), "--block_size", "1", "at least 2")


# --- the sources ------------------------------------------------------------------------------------------------------


def test_the_same_text_gives_the_same_blocks_from_every_kind_of_source(tmp_path, gpt2_folder):
    text = make_text(200)
    lines = text.splitlines(keepends=True)
    rows = datasets.Dataset.from_dict({"text": lines})
    half = len(lines) // 2
    sources = [write_text(tmp_path / "a.txt", text)]
    sources.append(write_text(tmp_path / "a.jsonl", "".join(json.dumps({"n": 1, "text": t}) + "\n" for t in lines)))
    rows.rename_column("text", "content").to_parquet(tmp_path / "only_string.parquet")
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=rows).save_to_disk(str(tmp_path / "saved_dict"))
    write_text(tmp_path / "mixed/1.txt", "".join(lines[:half]))
    write_text(tmp_path / "mixed/2/b.json", "".join(json.dumps({"text": t}) + "\n" for t in lines[half:]))
    write_text(tmp_path / "mixed/README.md", "not data")
    write_text(tmp_path / "mixed/.hidden.txt", "not data either")
    write_text(tmp_path / "mixed/3.txt", "")
    sources += [str(tmp_path / name) for name in ("only_string.parquet", "saved", "saved_dict", "mixed")]

    as_lines = Reading(document_separator="none")
    loaded = [load(source, gpt2_folder, 32, reading=as_lines) for source in sources]
    reference = cut(encode(gpt2_folder, lines)[:-10], 32)
    for source, each in zip(sources, loaded, strict=True):
        assert check_source(source, gpt2_folder) == []
        assert read(each.train) == reference, source
        assert read(each.validation) == read(loaded[0].validation), source
    assert len({each.fingerprint for each in loaded}) == 1
    assert len(list((tmp_path / "cache").glob("*/info.json"))) == len(sources)


def test_json_lines_without_the_field_count_as_empty(tmp_path, gpt2_folder):
    lines = make_text(60).splitlines(keepends=True)
    with_gaps = [json.dumps({"text": t}) for t in lines] + ['{"text": null}', "{}"]
    loaded = load(write_text(tmp_path / "a.jsonl", "\n".join(with_gaps)), gpt2_folder, 16)
    end = data.open_tokenizer(gpt2_folder).eos_token_id
    rows = [*([*ids, end] for ids in encode(gpt2_folder, lines)), [], []]
    assert read(loaded.train) == cut(rows[: -held_out(rows, 16)], 16)


def test_own_splits_are_used_and_the_test_split_stays_unread(tmp_path, gpt2_folder):
    texts = {name: make_text(60, seed) for seed, name in enumerate(("train", "validation", "test"))}
    rows = {name: encode(gpt2_folder, text.splitlines(keepends=True)) for name, text in texts.items()}
    for name, text in texts.items():
        write_text(tmp_path / f"files/{name}-00000.txt", text)
        write_text(tmp_path / f"folders/{name}/part.txt", text)
    saved = {name: datasets.Dataset.from_dict({"text": t.splitlines(keepends=True)}) for name, t in texts.items()}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "saved"))
    as_lines = Reading(document_separator="none")
    for source in ("files", "folders", "saved"):
        loaded = load(str(tmp_path / source), gpt2_folder, 16, reading=as_lines)
        assert read(loaded.train) == cut(rows["train"], 16), source
        assert read(loaded.validation) == cut(rows["validation"], 16), source
    del saved["validation"]
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "with_test"))
    assert read(load(str(tmp_path / "with_test"), gpt2_folder, 16, reading=as_lines).validation) == cut(
        rows["test"], 16
    )


def test_files_named_by_no_split_beside_train_are_a_fault(tmp_path):
    write_text(tmp_path / "d/train.txt", make_text(10))
    write_text(tmp_path / "d/holdout.txt", make_text(10))
    (fault,) = check_source(str(tmp_path / "d"), None)
    assert_clear(fault, "--dataset", str(tmp_path / "d"), "holdout.txt", "train, validation nor test", "rename")


@pytest.mark.parametrize("fixed", [True, False])
def test_rows_of_ids_are_taken_as_they_are_or_cut_again(tmp_path, gpt2_folder, fixed):
    rng = random.Random(0)
    rows = [[rng.randrange(300) for _ in range(16 if fixed else rng.randint(0, 40))] for _ in range(100)]
    datasets.Dataset.from_dict({"input_ids": rows, "n": [0] * 100}).save_to_disk(str(tmp_path / "ids"))
    loaded = load(str(tmp_path / "ids"), gpt2_folder, 16)
    assert read(loaded.train) == (rows[:-5] if fixed else cut(rows[:-5], 16))
    assert read(loaded.validation) == (rows[-5:] if fixed else cut(rows[-5:], 16))


@pytest.mark.parametrize(("wrong", "shown"), [(70_000, "70000"), (-1, "-1")])
def test_ids_that_the_tokenizer_cannot_have_made_are_refused(tmp_path, gpt2_folder, wrong, shown):
    rows = [[1] * 16] * 50 + [[1] * 15 + [wrong]]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(str(tmp_path / "ids"))
    size = len(json.loads(Path(gpt2_folder, "vocab.json").read_text()))
    with pytest.raises(DataError) as caught:
        load(str(tmp_path / "ids"), gpt2_folder, 16)
    assert_clear(
        str(caught.value), "--tokenizer", gpt2_folder, f"{size} entries", f"id {shown};", "give the --tokenizer"
    )


def test_the_builtin_tokenizer_needs_text(tmp_path):
    datasets.Dataset.from_dict({"input_ids": [[1] * 16] * 50}).save_to_disk(str(tmp_path / "ids"))
    with pytest.raises(DataError) as caught:
        load(str(tmp_path / "ids"), "builtin", 16)
    assert_clear(str(caught.value), "--tokenizer", "builtin", "token ids already", "give the --tokenizer")


@pytest.mark.parametrize("columns", [{"a": ["x"], "b": ["y"]}, {"n": [1]}, {"input_ids": ["x"], "more": ["y"]}])
def test_an_unclear_column_is_refused_with_the_columns_listed(tmp_path, gpt2_folder, columns):
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError) as caught:
        load(str(tmp_path / "a.parquet"), gpt2_folder, 16)
    assert_clear(str(caught.value), "--dataset", str(tmp_path / "a.parquet"), ", ".join(columns), "column `text`")


def test_a_file_that_its_reader_refuses_is_a_data_error(tmp_path, gpt2_folder):
    path = write_text(tmp_path / "a.jsonl", '{"text": "fine"}\n{"text": broken\n')
    with pytest.raises(DataError) as caught:
        load(path, gpt2_folder, 16)
    assert_clear(str(caught.value), "--dataset", path, "cannot be read")


# --- the built-in corpus and tokenizer --------------------------------------------------------------------------------


def test_builtin_corpus_holds_out_topics_that_are_nowhere_in_training(dialled):
    from pydoc_data.topics import topics

    train, validation = data.sources.builtin_corpus()
    assert len(train) + len(validation) == len(topics)
    assert 0.05 < sum(map(len, validation)) / sum(map(len, train)) < 0.2
    seen = {paragraph.strip() for row in train for paragraph in row.split("\n\n")} - {""}
    assert not seen & {paragraph.strip() for row in validation for paragraph in row.split("\n\n")}

    first = load("builtin", "builtin", 128)
    second = load("builtin", "builtin", 128, cache_dir=Path(os.environ["GPT2_VARIANTS_CACHE"], "other"))
    assert read(first.train) == read(second.train)
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 4000
    assert "".join(validation).startswith(first.tokenizer.decode(read(first.validation)[0]))
    assert dialled == []


def test_builtin_tokenizer_is_lossless_and_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = load("builtin", "builtin", 128).tokenizer
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    every_byte = "".join(map(chr, range(256)))
    for text in (TRICKY, every_byte, "", " ", "don't stop .  , ?"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert again.encode(text) == ids
        assert again.decode(ids) == text
    for each in (tokenizer, again):
        assert each.bos_token_id == each.eos_token_id == each.unk_token_id == 0
        assert each.convert_ids_to_tokens(0) == "<|endoftext|>"
        assert each.clean_up_tokenization_spaces is False
        assert each.model_max_length > 10**9
        assert len(each) == 4000


@pytest.mark.parametrize("where", ["train", "validation"])
def test_builtin_tokenizer_learns_from_the_training_part_alone(tmp_path, where):
    lines = make_text(400).splitlines(keepends=True)
    odd = ["zyzzyva zyzzyva zyzzyva\n"] * 15
    rows = odd + lines if where == "train" else lines + odd
    tokenizer = load(write_text(tmp_path / "a.txt", "".join(rows)), "builtin", 16).tokenizer
    assert (len(tokenizer.encode(" zyzzyva")) == 1) == (where == "train")


def test_builtin_tokenizer_reads_a_bounded_amount(monkeypatch, tmp_path):
    monkeypatch.setattr(data.tokenizers, "BUILTIN_TRAINING_CHARACTERS", 1000)
    monkeypatch.setattr(data.arrow, "BYTES_PER_BATCH", 500)
    text = make_text(300) + "zyzzyva zyzzyva zyzzyva\n" * 50 + make_text(300)
    tokenizer = load(write_text(tmp_path / "a.txt", text), "builtin", 16).tokenizer
    assert len(tokenizer.encode(" zyzzyva")) > 1


def test_tokenizers_add_and_say_nothing(tmp_path, monkeypatch, capfd):
    """A tokenizer that frames every text and warns of length: rows are still concatenated as they are, in silence."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    plain = data.tokenizers.train_tokenizer(datasets.Dataset.from_dict({"text": [make_text(100)]}))
    bpe = plain.backend_tokenizer
    bpe.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    framing = PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=4)
    framing.save_pretrained(tmp_path / "framing")
    path = write_text(tmp_path / "a.txt", make_text(100))
    warnings = []  # the library's log handler holds another stderr than capfd's
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning", lambda text, *_: warnings.append(text))
    capfd.readouterr()
    loaded = load(path, str(tmp_path / "framing"), 16)
    assert 0 not in np.array(read(loaded.train))
    assert capfd.readouterr() == ("", "")
    assert warnings == []


def test_the_folder_of_an_exported_model_serves_as_tokenizer_and_its_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the folder's code"))
    first = load("builtin", "builtin", 128)
    first.tokenizer.save_pretrained(tmp_path / "model")
    config = {"model_type": "some-gpt2", "auto_map": {"AutoConfig": "modeling.SomeConfig"}}
    write_text(tmp_path / "model/config.json", json.dumps(config))
    write_text(tmp_path / "model/modeling.py", "raise SystemExit('run')")
    assert load("builtin", str(tmp_path / "model"), 128).fingerprint == first.fingerprint


# --- the Hub ----------------------------------------------------------------------------------------------------------


class FakeHub:
    """Stands for `datasets.load_dataset`: sets by id, each a DatasetDict, or an error to raise; records the calls."""

    def __init__(self, monkeypatch, **sets):
        self.sets, self.calls = sets, []
        monkeypatch.setattr(datasets, "load_dataset", self)
        monkeypatch.setattr(network, "reachable", lambda: True)

    def __call__(self, name, config=None, *, split=None):
        self.calls.append((name, config))
        found = self.sets.get(name.split("/")[1].split("-")[0], ConnectionError(f"no such set\nas {name}"))
        if isinstance(found, Exception):
            raise found
        if split is None:
            return found
        sizes = {name: len(rows) for name, rows in found.items()}
        (parts,) = zip(*(datasets.ReadInstruction.from_spec(spec).to_absolute(sizes) for spec in split), strict=True)
        return [found[part.splitname].select(range(part.from_ or 0, part.to or sizes["train"])) for part in parts]


READY, RAW = "BluebrainAI/wikitext-103-raw-v1-seq16-tokenized-grouped", ("Salesforce/wikitext", "wikitext-103-raw-v1")


@pytest.fixture
def published(monkeypatch, gpt2_folder):
    """Make the small tokenizer and blocks of 16 count as the published ones."""
    tokenizer = data.open_tokenizer(gpt2_folder)
    monkeypatch.setattr(data.sources, "GPT2_VOCABULARY", data.tokenizers.vocabulary_digest(tokenizer))
    monkeypatch.setattr(data.sources, "WIKITEXT_READY_BLOCK_SIZES", (16,))


def id_rows(count: int, seed: int) -> datasets.Dataset:
    rng = random.Random(seed)
    return datasets.Dataset.from_dict({"input_ids": [[rng.randrange(300) for _ in range(16)] for _ in range(count)]})


@pytest.mark.parametrize("split", ["validation", "test"])
def test_wikitext_takes_the_ready_made_blocks(monkeypatch, published, gpt2_folder, split):
    train, held = id_rows(40, 1), id_rows(6, 2)
    hub = FakeHub(monkeypatch, wikitext=datasets.DatasetDict({"train": train, split: held}))
    loaded = load("wikitext-103", gpt2_folder, 16)
    assert hub.calls == [(READY, None)]
    assert read(loaded.train) == train["input_ids"]
    assert read(loaded.validation) == held["input_ids"]


def test_a_models_own_entries_do_not_hide_that_a_tokenizer_is_gpt2s(monkeypatch, published, gpt2_folder, tmp_path):
    """The export of a duo_predict model has one entry more, and is evaluated on the same blocks."""
    tokenizer = data.open_tokenizer(gpt2_folder)
    monkeypatch.setattr(data.sources, "GPT2_ENTRIES", len(tokenizer))
    tokenizer.add_special_tokens({"mask_token": "<|MASK|>"})
    tokenizer.save_pretrained(tmp_path)
    train, held = id_rows(40, 1), id_rows(6, 2)
    hub = FakeHub(monkeypatch, wikitext=datasets.DatasetDict({"train": train, "validation": held}))
    assert data.load_tokens("wikitext-103", str(tmp_path), 16, "validation").tolist() == [
        i for row in held["input_ids"] for i in row
    ]
    assert hub.calls == [(READY, None)]


@pytest.mark.parametrize("split", ["train", "validation", "all"])
def test_tokens_of_a_file(gpt2_folder, tmp_path, split):
    """A part is what a run would use of it, without the remainders; all is every token of the file."""
    path = tmp_path / "a.txt"
    path.write_text(make_text(300))
    tokens = data.load_tokens(str(path), gpt2_folder, 16, split).tolist()
    every = data.open_tokenizer(gpt2_folder)(path.read_text())["input_ids"]
    if split == "all":
        assert tokens == every
    else:
        assert tokens == [i for block in read(getattr(load(str(path), gpt2_folder, 16), split)) for i in block]
        assert len(tokens) < len(every)


def test_all_of_a_source_with_parts_of_its_own_is_both(gpt2_folder, tmp_path):
    for name, text in (("train", "one two\nthree\n"), ("validation", "four\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    expected = data.open_tokenizer(gpt2_folder)("one two\nthree\nfour\n")["input_ids"]
    assert data.load_tokens(str(tmp_path), gpt2_folder, 16, "all").tolist() == expected


def test_only_a_single_file_is_read_whole_unasked(tmp_path):
    (tmp_path / "a.txt").write_text("one\n")
    assert data.default_split(str(tmp_path / "a.txt")) == "all"
    for dataset in (str(tmp_path), "builtin", "wikitext-103", "owner/name"):
        assert data.default_split(dataset) == "validation"


def test_wikitext_ready_made_with_training_blocks_only_is_refused(monkeypatch, published, gpt2_folder):
    FakeHub(monkeypatch, wikitext=datasets.DatasetDict(train=id_rows(40, 1)))
    with pytest.raises(DataError) as caught:
        load("wikitext-103", gpt2_folder, 16)
    words = (READY, "no validation or test split", "use --dataset Salesforce/wikitext:wikitext-103-raw-v1")
    assert_clear(str(caught.value), "--dataset", "wikitext-103", *words)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_wikitext_raw_is_cut_in_batches_of_rows_after_the_first_percent(monkeypatch, gpt2_folder, capsys, num_proc):
    monkeypatch.setattr(data.sources, "WIKITEXT_ROWS_PER_BATCH", 50)
    lines = make_text(1051).splitlines(keepends=True)
    raw = datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": lines}),
        validation=datasets.Dataset.from_dict({"text": ["never read\n"] * 100}),
    )
    hub = FakeHub(monkeypatch, wikitext=raw)
    loaded = load("wikitext-103", gpt2_folder, 24, num_proc=num_proc)
    assert hub.calls == [RAW]
    rows = encode(gpt2_folder, lines)
    first = 11  # 1 % of 1,051 is 10.51, rounded to the closest
    assert read(loaded.validation) == cut(rows[:first], 24, 50)
    assert read(loaded.train) == cut(rows[first:], 24, 50)
    assert read(loaded.train) != cut(rows[first:], 24), "the remainders of the batches are dropped"
    assert capsys.readouterr().err == ""


def test_wikitext_falls_back_to_the_raw_set_and_says_so(monkeypatch, published, gpt2_folder, capsys):
    raw = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": make_text(1000).splitlines(keepends=True)}))
    hub = FakeHub(monkeypatch, wikitext=raw)
    ready_calls = []

    def only_raw(name, config=None, *, split=None):
        if name == READY:
            ready_calls.append(name)
            raise ConnectionError("gone\nfor good")
        return hub(name, config, split=split)

    monkeypatch.setattr(datasets, "load_dataset", only_raw)
    assert len(load("wikitext-103", gpt2_folder, 16).train) > 0
    assert ready_calls == [READY]
    assert hub.calls == [RAW]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "raw set" in said
    assert READY in said


def test_wikitext_with_another_tokenizer_is_cut_from_the_raw_set(monkeypatch, published):
    raw = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": make_text(1000).splitlines(keepends=True)}))
    hub = FakeHub(monkeypatch, wikitext=raw)
    load("wikitext-103", "builtin", 16)
    assert hub.calls == [RAW]


def test_any_hub_set_with_and_without_config(monkeypatch, gpt2_folder):
    lines = make_text(100).splitlines(keepends=True)
    hub = FakeHub(monkeypatch, corpus=datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": lines})))
    assert read(load("some/corpus:en", gpt2_folder, 16).train) == read(load("some/corpus", gpt2_folder, 16).train)
    assert hub.calls == [("some/corpus", "en"), ("some/corpus", None)]
    load("some/corpus", gpt2_folder, 16)
    assert len(hub.calls) == 2, "prepared once, then not looked up again"
    with pytest.raises(DataError) as caught:
        load("some/typo", gpt2_folder, 16)
    assert_clear(
        str(caught.value), "--dataset", "some/typo", "no such set as some/typo", "check the id", "--dataset builtin"
    )


@pytest.mark.parametrize("dataset", ["some/corpus", "some/corpus:en", "wikitext-103"])
def test_a_hub_set_without_network_fails_fast(dialled, gpt2_folder, dataset):
    start = time.monotonic()
    (fault,) = check_source(dataset, None)
    with pytest.raises(DataError) as caught:
        load(dataset, gpt2_folder, 512)
    assert time.monotonic() - start < patience(5)
    for line in (fault, str(caught.value)):
        assert_clear(
            line, "--dataset", dataset, "cannot be reached", "--dataset builtin", ".txt", "where there is a network"
        )
    assert dialled == ["huggingface.co"], "probed once, and nothing else asked"


def test_a_hub_tokenizer_without_network_fails_fast(dialled):
    start = time.monotonic()
    (fault,) = check_source("builtin", "some/tokenizer")
    with pytest.raises(DataError) as caught:
        load("builtin", "some/tokenizer", 64)
    assert time.monotonic() - start < patience(5)
    for line in (fault, str(caught.value)):
        assert_clear(
            line, "--tokenizer", "some/tokenizer", "cannot be reached", "--tokenizer builtin", "tokenizer.json"
        )
    assert dialled == ["huggingface.co"]
    both = check_source("some/corpus", "some/tokenizer")
    assert [line.split()[0] for line in both] == ["--dataset", "--tokenizer"]


def test_what_is_prepared_or_cached_needs_no_network(monkeypatch, tmp_path, gpt2_folder):
    hub = FakeHub(monkeypatch, corpus=datasets.DatasetDict(train=id_rows(50, 1)))
    load("some/corpus", gpt2_folder, 16)
    monkeypatch.setattr(network, "reachable", lambda: False)
    assert check_source("some/corpus", gpt2_folder) == []
    assert load("some/corpus", gpt2_folder, 16).train.block_size == 16
    assert len(hub.calls) == 1

    assert len(check_source("other/BigCorpus", "other/tokenizer")) == 2
    (tmp_path / "hf/datasets/other___big_corpus").mkdir(parents=True)
    write_text(tmp_path / "hf/hub/models--other--tokenizer/snapshots/abc/tokenizer.json", "{}")
    assert check_source("other/BigCorpus", "other/tokenizer") == []


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (404, True), (503, False)])
def test_the_probe_takes_any_answer_but_a_gateway_error(monkeypatch, status, reachable):
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
        assert network.reachable() is reachable
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert network.reachable() is False
        server.shutdown()


def test_a_network_that_swallows_packets_is_given_up_in_three_seconds(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        (fault,) = check_source("some/corpus", None)
        check_source("some/corpus", None)
        assert 2 < time.monotonic() - start < patience(4)
        silent.setblocking(False)
        silent.accept()
        with pytest.raises(BlockingIOError):  # one probe, not two
            silent.accept()
    assert "cannot be reached" in fault


def test_offline_mode_ends_with_the_load(monkeypatch):
    import huggingface_hub.constants

    seen = []
    fake = FakeHub(monkeypatch)
    monkeypatch.setattr(network, "reachable", lambda: False)

    def look(*args, **kwargs):
        seen.append((huggingface_hub.constants.is_offline_mode(), datasets.config.HF_HUB_OFFLINE))
        return fake(*args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", look)
    with pytest.raises(DataError):
        load("some/corpus", "builtin", 16)
    assert seen == [(True, True)]
    assert (huggingface_hub.constants.is_offline_mode(), datasets.config.HF_HUB_OFFLINE) == (False, False)


# --- faults in what is asked ------------------------------------------------------------------------------------------


def make_faulty(folder: Path) -> list[tuple[str, str | None, str, tuple[str, ...]]]:
    """(dataset, tokenizer, option at fault, words of the message)"""
    legal = (".txt", ".parquet", "Hub id")
    late = b"fine text\n" * 25_000 + b"\xff\xfe" + b"fine text\n" * 15_000
    files = {
        "empty.txt": b"",
        "nul.txt": b"ab\0c",
        "latin.txt": "é".encode("latin-1"),
        "late.txt": late,
        "a.pdf": b"a,b",
        "noname": b"x",
        "bad.parquet": b"PAR1 cut short",
        "tokenizer/tokenizer.json": b"{}",
        "pdf/a.pdf": b"a,b",
        "empties/a.txt": b"",
        "sub/x/b.jsonl": b"\0",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content)
    (folder / "nothing").mkdir()

    def at(name: str) -> str:
        return str(folder / name)

    return [
        (at("missing.txt"), None, "--dataset", ("no such file", *legal)),
        ("./missing", None, "--dataset", ("no such file", *legal)),
        ("missing.jsonl", None, "--dataset", ("no such file", *legal)),
        ("missing.csv", None, "--dataset", ("no such file", *legal)),
        ("a/b/c", None, "--dataset", ("no such file", *legal)),
        ("~/surely missing", None, "--dataset", ("no such file", *legal)),
        ("", None, "--dataset", ("neither an existing path nor a Hub id", *legal)),
        ("my data", None, "--dataset", ("neither an existing path nor a Hub id", *legal)),
        ("owner/name:", None, "--dataset", ("nor a Hub id", *legal)),
        (at("empty.txt"), None, "--dataset", ("the file is empty", "give one that holds text")),
        (at("empties"), None, "--dataset", ("all its files are empty", "give one that holds text")),
        (at("nul.txt"), None, "--dataset", ("binary", "offset 2", "UTF-8")),
        (at("latin.txt"), None, "--dataset", ("not UTF-8 (byte 0)", "iconv")),
        (at("late.txt"), None, "--dataset", ("not UTF-8 (byte 250000)", "iconv")),
        (at("sub"), None, "--dataset", ("x/b.jsonl", "binary")),
        (at("a.pdf"), None, "--dataset", ("unsupported file type .pdf", *legal)),
        (at("noname"), None, "--dataset", ("unsupported file type (no suffix)", *legal)),
        (at("bad.parquet"), None, "--dataset", ("not a whole Parquet file", "write it again")),
        (at("nothing"), None, "--dataset", ("the folder is empty", *legal)),
        (
            at("pdf"),
            None,
            "--dataset",
            ("holds no .txt, .jsonl, .json, .csv,", "(a.pdf is of a kind that is not read", *legal),
        ),
        ("builtin", at("missing"), "--tokenizer", ("no such folder", "builtin", "Hub id")),
        ("builtin", at("nothing"), "--tokenizer", ("no tokenizer files", "vocab.json and merges.txt")),
        ("builtin", at("tokenizer/tokenizer.json"), "--tokenizer", ("is a file", f"here {at('tokenizer')}")),
        ("builtin", "no good", "--tokenizer", ("nor a Hub id", "builtin")),
    ]


def test_every_fault_is_one_line_with_option_value_and_cure(tmp_path, dialled):
    for dataset, tokenizer, option, words in make_faulty(tmp_path):
        faults = check_source(dataset, tokenizer)
        assert len(faults) == 1, (dataset, tokenizer, faults)
        assert_clear(faults[0], option, dataset if option == "--dataset" else tokenizer, *words)
        with pytest.raises(DataError) as caught:
            load(dataset, tokenizer or "builtin", 16)
        assert str(caught.value) == faults[0]
    assert dialled == []
    assert not (tmp_path / "cache").exists(), "nothing is written for what cannot be"


def test_all_faults_are_reported_at_once(tmp_path):
    faults = check_source(str(tmp_path / "x.txt"), str(tmp_path / "y"))
    assert [line.split(":")[0] for line in faults] == [
        f"--dataset {tmp_path / 'x.txt'}",
        f"--tokenizer {tmp_path / 'y'}",
    ]


def test_characters_cut_by_a_sample_are_no_fault(tmp_path):
    """Emoji of 4 bytes at every alignment: the samples begin and end within characters."""
    for shift in range(4):
        path = write_text(tmp_path / f"{shift}.txt", "x" * shift + "🙂" * 50_000)
        assert check_source(path, None) == []


def test_a_broken_tokenizer_is_a_data_error(tmp_path):
    write_text(tmp_path / "t/tokenizer.json", "{}")
    with pytest.raises(DataError) as caught:
        load("builtin", str(tmp_path / "t"), 16)
    assert_clear(str(caught.value), "--tokenizer", str(tmp_path / "t"), "cannot be read", "--tokenizer builtin")


def test_a_cache_that_cannot_be_written_names_its_variable(tmp_path, monkeypatch, gpt2_folder):
    write_text(tmp_path / "file", "in the way")
    monkeypatch.setenv("GPT2_VARIANTS_CACHE", str(tmp_path / "file/cache"))
    with pytest.raises(DataError) as caught:
        load("builtin", gpt2_folder, 16)
    assert str(caught.value).startswith(f"the cache of prepared data, {tmp_path / 'file/cache'}: it cannot be written")
    assert "set GPT2_VARIANTS_CACHE" in str(caught.value)
    assert "--dataset" not in str(caught.value)


def test_checking_imports_nothing_heavy(tmp_path):
    code = """
    import sys
    from gpt2_variants import data
    assert data.check_source("builtin", "builtin") == []
    assert len(data.check_source(sys.argv[1], sys.argv[1])) == 2
    print({"torch", "datasets", "transformers", "tokenizers", "pyarrow"} & set(sys.modules))
    """
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(code),
        str(tmp_path / "missing.txt"),
    ]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(data.__file__).parents[2])
    assert out.stdout == "set()\n"


# --- the cache --------------------------------------------------------------------------------------------------------


def test_local_input_touches_no_network_and_no_hugging_face_cache(tmp_path, dialled, gpt2_folder):
    path = write_text(tmp_path / "a.txt", make_text(100))
    assert check_source(path, gpt2_folder) == []
    load(path, gpt2_folder, 16)
    load(path, "builtin", 16)
    assert dialled == []
    assert not (tmp_path / "hf").exists()
    left = {file.name for file in (tmp_path / "cache").glob("*/*")}
    assert left == {"train", "validation", "tokenizer", "info.json"}, "no intermediate files"


def test_a_second_load_prepares_nothing(tmp_path, monkeypatch, gpt2_folder):
    path = write_text(tmp_path / "a.txt", make_text(100))
    first = load(path, gpt2_folder, 16)
    for name in ("_prepare", "read_source", "tokenise_parts", "cut_blocks"):
        monkeypatch.setattr(data.cache, name, None)
    second = load(path, gpt2_folder, 16)
    assert read(second.train) == read(first.train)
    assert read(second.validation) == read(first.validation)
    assert (second.fingerprint, second.description) == (first.fingerprint, first.description)
    assert second.tokenizer.encode(TRICKY) == first.tokenizer.encode(TRICKY)
    moved = load(str(Path(path).rename(tmp_path / "moved.txt")), gpt2_folder, 16)
    assert moved.fingerprint == first.fingerprint
    assert moved.description == first.description.replace("a.txt", "moved.txt")


def test_other_content_tokenizer_or_block_size_is_prepared_anew(tmp_path, gpt2_folder):
    path = write_text(tmp_path / "a.txt", make_text(100))
    prints = [load(path, gpt2_folder, 16).fingerprint, load(path, gpt2_folder, 32).fingerprint]
    prints.append(load(path, "builtin", 16).fingerprint)
    write_text(tmp_path / "a.txt", make_text(100).replace("a", "b", 1))
    prints.append(load(path, gpt2_folder, 16).fingerprint)
    assert len(set(prints)) == 4


def test_only_one_of_two_processes_prepares(tmp_path, gpt2_folder):
    path = write_text(tmp_path / "a.txt", make_text(200))
    code = """
    path, tokenizer, folder, me = sys.argv[1:]
    prepare = data.cache._prepare
    def counted(*args):
        Path(folder, "prepared-" + me).touch()
        time.sleep(1.5)  # the other one arrives meanwhile
        prepare(*args)
    data.cache._prepare = counted
    import datasets, transformers
    Path(folder, "ready-" + me).touch()
    while len(list(Path(folder).glob("ready-*"))) < 2:
        time.sleep(0.01)
    loaded = data.load(path, tokenizer, 16)
    print(loaded.fingerprint, len(loaded.train), loaded.train.__getitems__([3])["input_ids"].tolist())
    """
    both = [python(code, path, gpt2_folder, tmp_path, me) for me in "ab"]
    outputs = [output_of(process, 50) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    assert len(list(tmp_path.glob("prepared-*"))) == 1


def test_a_killed_build_is_never_used_and_is_cleaned_up(tmp_path, gpt2_folder):
    path = write_text(tmp_path / "a.txt", make_text(200))
    code = """
    import signal
    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)
    data.cache._fingerprint = die  # blocks and tokenizer are written by then
    data.load(sys.argv[1], sys.argv[2], 16)
    """
    process = python(code, path, gpt2_folder)
    output_of(process, 50)
    assert process.returncode == -signal.SIGKILL
    (half,) = (tmp_path / "cache").glob("*.building")
    assert (half / "train").is_dir()
    write_text(half / "train/leftover", "of the killed one")

    rebuilt = load(path, gpt2_folder, 16)
    assert rebuilt.fingerprint == load(path, gpt2_folder, 16, cache_dir=tmp_path / "clean").fingerprint
    assert not half.exists()
    assert not list((tmp_path / "cache").rglob("leftover"))


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch, gpt2_folder):
    def fail(*args):
        raise KeyboardInterrupt

    path = write_text(tmp_path / "a.txt", make_text(200))
    monkeypatch.setattr(data.cache, "_fingerprint", fail)
    with pytest.raises(KeyboardInterrupt):
        load(path, gpt2_folder, 16)
    assert [entry.suffix for entry in (tmp_path / "cache").iterdir()] == [".lock"]
    monkeypatch.undo()
    assert len(load(path, gpt2_folder, 16, cache_dir=tmp_path / "cache").train) > 0


# --- reading blocks ---------------------------------------------------------------------------------------------------


def test_rows_come_as_asked_and_padding_counts_in_no_loss():
    blocks = [[10 * row + column for column in range(4)] for row in range(5)]
    batch = in_memory(blocks).__getitems__([3, PAD, 0, 3])
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["input_ids"].tolist() == [blocks[3], blocks[0], blocks[0], blocks[3]]
    assert batch["labels"].tolist() == [blocks[3], [-100] * 4, blocks[0], blocks[3]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_gives_the_sampler_s_batches_and_leaves_the_global_generator_alone(num_workers):
    blocks = in_memory([[row] * 4 for row in range(10)])
    sampler = GlobalBatchSampler(10, 4, 2, 0, 1, seed=3, num_steps=5)
    before = torch.get_rng_state()
    loader = data_loader(blocks, sampler, num_workers=num_workers)
    batches = list(loader)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(loader) == len(batches) == 10
    expected = [[max(index, 0) for index in indices] for indices in sampler]
    assert [batch["input_ids"][:, 0].tolist() for batch in batches] == expected
    assert all(batch["labels"].shape == (2, 4) for batch in batches)


def reference_steps(num_blocks: int, batch_size: int, seed: int, steps: int) -> list[list[int]]:
    """Global batches by the definition, in plain lists."""
    batches, epoch = [], 0
    while len(batches) < steps:
        order = np.random.default_rng([seed, epoch]).permutation(num_blocks).tolist()
        while order:
            batch, order = order[:batch_size], order[batch_size:]
            batches.append(batch + [PAD] * (batch_size - len(batch)))
        epoch += 1
    return batches[:steps]


@pytest.mark.parametrize("num_blocks", [3, 24, 29])
@pytest.mark.parametrize(("world_size", "micro"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_a_global_batch_is_the_same_on_any_number_of_ranks(num_blocks, world_size, micro):
    steps = 11
    ranks = [
        GlobalBatchSampler(num_blocks, 8, micro, rank, world_size, seed=42, num_steps=steps)
        for rank in range(world_size)
    ]
    per_rank = [list(sampler) for sampler in ranks]
    accumulation = 8 // (micro * world_size)
    assert all(len(sampler) == len(batches) == steps * accumulation for sampler, batches in zip(ranks, per_rank))
    assert all(len(batch) == micro for batches in per_rank for batch in batches)
    for step, expected in enumerate(reference_steps(num_blocks, 8, 42, steps)):
        mine = slice(step * accumulation, (step + 1) * accumulation)
        assert [index for batches in per_rank for batch in batches[mine] for index in batch] == expected
    epoch = ranks[0].steps_per_epoch
    assert epoch == math.ceil(num_blocks / 8)
    seen = [i for batches in per_rank for batch in batches[: epoch * accumulation] for i in batch if i != PAD]
    assert sorted(seen) == list(range(num_blocks))


def test_epochs_and_seeds_differ():
    orders = {tuple(map(tuple, reference_steps(50, 50, seed, 1))) for seed in (1, 2)}
    both = [list(GlobalBatchSampler(50, 50, 50, 0, 1, seed, num_steps=2)) for seed in (1, 2)]
    assert len(orders) == 2
    assert both[0] != both[1]
    assert both[0][0] != both[0][1]


@pytest.mark.parametrize("start", [0, 1, 3, 4, 9, 10])
def test_a_resumed_sampler_goes_on_where_the_first_stopped(start):
    whole = list(GlobalBatchSampler(29, 8, 2, 1, 2, seed=7, num_steps=10))
    resumed = GlobalBatchSampler(29, 8, 2, 1, 2, seed=7, start_step=start, num_steps=10)
    assert list(resumed) == whole[start * 2 :]
    assert len(resumed) == len(whole) - start * 2


def test_a_resumed_loader_reads_no_earlier_block():
    reads = []

    class Watched(BlockDataset):
        def __getitems__(self, indices):
            reads.extend(indices)
            return super().__getitems__(indices)

    blocks = Watched(in_memory([[row] * 4 for row in range(40)])._rows)
    sampler = GlobalBatchSampler(40, 8, 4, 0, 1, seed=7, start_step=3, num_steps=5)
    list(data_loader(blocks, sampler))
    assert reads == [index for batch in reference_steps(40, 8, 7, 5)[3:] for index in batch]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch_size": 6}, "batch_size 6 is no multiple of micro_batch_size 2 x 2 ranks; choose"),
        ({"rank": 2}, "rank 2 between 0 and"),
        ({"num_blocks": 0}, "num_blocks 0"),
        ({"micro_batch_size": 0}, "micro_batch_size 0"),
    ],
)
def test_a_sampler_refuses_what_it_cannot_share_out(changed, words):
    asked = {"num_blocks": 10, "batch_size": 8, "micro_batch_size": 2, "rank": 0, "world_size": 2} | changed
    with pytest.raises(ValueError, match=words):
        GlobalBatchSampler(**asked, seed=0, num_steps=1)


@pytest.mark.parametrize("num_blocks", [1, 5, 12, 13])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_evaluation_sees_every_block_once_in_equal_batches(num_blocks, world_size, batch_size):
    shares = [eval_batches(num_blocks, batch_size, rank, world_size) for rank in range(world_size)]
    assert len({len(batches) for batches in shares}) == 1
    assert all(len(batch) == batch_size for batches in shares for batch in batches)
    indices = Counter(index for batches in shares for batch in batches for index in batch)
    padding = indices.pop(PAD, 0)
    assert indices == dict.fromkeys(range(num_blocks), 1)
    assert padding < world_size * batch_size, "no batch of padding on all ranks"


def test_unigram_perplexity_equals_a_plain_loop():
    rng = random.Random(0)
    vocab_size = 50
    train = [[int(rng.random() ** 2 * 40) for _ in range(8)] for _ in range(3000)]  # more than one chunk
    validation = [[rng.randrange(vocab_size) for _ in range(8)] for _ in range(20)]
    counts = Counter(token for block in train for token in block)
    losses = []
    for block in validation:
        for token in block[1:]:
            losses.append(-math.log((counts[token] + 1) / (3000 * 8 + vocab_size)))
    expected = math.exp(math.fsum(losses) / len(losses))
    assert unigram_perplexity(in_memory(train), in_memory(validation), vocab_size) == pytest.approx(expected, rel=1e-12)
