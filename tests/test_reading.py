"""Data as people have them: exactly the bytes that are named are read as text, or a line says why not."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import tempfile
from pathlib import Path

import datasets
import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings

from gpt2_variants import __main__ as commands
from gpt2_variants.data import DataError, Reading, check_source, load, open_tokenizer
from gpt2_variants.data.preview import WINDOW, shared_windows


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_VARIANTS_CACHE", str(tmp_path / "the cache"))


@pytest.fixture(scope="session")
def bpe(tmp_path_factory) -> str:
    """A byte-level tokenizer with an end-of-text, which every text comes back from."""
    folder = tmp_path_factory.mktemp("bpe")
    text = folder / "text.txt"
    text.write_text(lines_of("words", 400))
    load(str(text), "builtin", 8, cache_dir=folder / "cache").tokenizer.save_pretrained(str(folder / "tokenizer"))
    return str(folder / "tokenizer")


def lines_of(word: str, count: int = 60) -> str:
    rng = random.Random(word)
    letters = "abcdefghijklmnopqrstuvwxyz"
    return "".join(f"{word} {i} {''.join(rng.choices(letters, k=8))}\n" for i in range(count))


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def as_jsonl(rows: list) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Rows with columns as the suffix says: JSON lines, Parquet, else as `datasets` saves them."""
    if path.suffix == ".jsonl":
        return write(path, as_jsonl(rows))
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return path


def text_of(data, part: str) -> str:
    """The text that the blocks of a part decode to; the last tokens, too few for a block, are missing."""
    ids = getattr(data, part).tokens().tolist()
    return data.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def trained_text(path: Path, tokenizer: str, **reading) -> str:
    data = load(str(path), tokenizer, 4, reading=Reading(**reading))
    return text_of(data, "train")


def refusal(path: Path, tokenizer: str = "builtin", **reading) -> str:
    with pytest.raises(DataError) as caught:
        load(str(path), tokenizer, 4, reading=Reading(**reading))
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- names ------------------------------------------------------------------------------------------------------------

NAMES = (
    "chap[1].txt",
    "all*.txt",
    "what?.txt",
    "{a,b}.txt",
    "a::b.txt",
    "50%.txt",
    "#1.txt",
    "with space.txt",
    "[!x].txt",
)


@pytest.mark.parametrize("name", [*NAMES, "ü.txt", "zip:..txt", "~.txt"])
@pytest.mark.parametrize("in_folder", [False, True])
def test_exactly_the_named_file_is_read_whatever_its_name_looks_like(name, in_folder, bpe, tmp_path):
    for other in ("chap1.txt", "all2.txt", "whatx.txt", "a.txt", "b.txt", "50.txt", "y.txt"):
        write(tmp_path / "beside" / other, lines_of("wrong"))
    place = tmp_path / f"in {name}" if in_folder else tmp_path / "beside"
    path = write(place / name, lines_of("right"))
    text = trained_text(place if in_folder else path, bpe)
    assert lines_of("right").startswith(text)
    assert len(text) > 500


# --- columns ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        (lambda i: {"id": f"conv-{i}", "messages": [{"role": "user", "content": f"question {i}"}]}, "id, messages"),
        (lambda i: {"source": "wiki", "text": [f"paragraph {i}", "another"]}, "text holds lists"),
        (lambda i: {"source": "wiki", "text": {"en": f"paragraph {i}"}}, "text holds objects"),
        (lambda i: {"prompt": f"p {i}", "completion": f"c {i}"}, "prompt, completion"),
        (lambda i: {"label": i, "review": f"review {i}"}, "label, review"),
        (lambda i: {"n": i}, "n holds numbers"),
        (lambda i: {"content": f"c {i}", "body": f"b {i}"}, "content, body"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_a_column_that_is_not_plainly_the_text_is_refused_with_a_row(row, shown, kind, tmp_path):
    rows = [row(i) for i in range(50)]
    path = write_rows(tmp_path / f"a.{kind}", rows)
    message = refusal(path)
    assert shown in message
    assert "--text_column" in message
    assert "(a row: {" in message


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize(
    ("row", "column"),
    [
        (lambda i, t: {"id": f"x{i}", "content": t}, None),
        (lambda i, t: {"anything": t}, None),
        (lambda i, t: {"prompt": "p", "answer": t}, "answer"),
        (lambda i, t: {"id": str(i), "doc": {"body": t, "n": i}}, "doc.body"),
    ],
)
def test_the_column_taken_is_said_and_recorded(row, column, kind, bpe, tmp_path):
    texts = [f"text {i} of this source" for i in range(60)]
    rows = [row(i, text) for i, text in enumerate(texts)]
    path = write_rows(tmp_path / f"a.{kind}", rows)
    data = load(str(path), bpe, 4, reading=Reading(text_column=column))
    assert "".join(f"{t}<|endoftext|>" for t in texts).startswith(text_of(data, "train"))
    said = column or ("content" if "content" in rows[0] else "anything")
    assert f"text from the column {said}" in data.description
    assert any(note.startswith(f"text from the column {said}") for note in data.notes)
    assert "is not there" in refusal(path, bpe, text_column="nothing")


def test_files_whose_other_columns_differ_or_are_null_are_read(bpe, tmp_path):
    a, b = ([{"text": f"{word} {i}\n"} for i in range(100)] for word in ("one", "two"))
    write(tmp_path / "d/a.jsonl", as_jsonl([{**row, "date": None, "meta": {"x": 1}} for row in a]))
    write(tmp_path / "d/b.jsonl", as_jsonl([{**row, "date": "2020", "meta": "x", "more": [1]} for row in b]))
    text = trained_text(tmp_path / "d", bpe, document_separator="none")
    assert "".join(row["text"] for row in [*a, *b]).startswith(text)
    assert "two 80" in text


def test_a_row_of_another_kind_is_refused_with_its_file(bpe, tmp_path):
    path = write(tmp_path / "a.jsonl", as_jsonl([{"text": f"fine {i}"} for i in range(3000)] + [{"text": ["list"]}]))
    assert "a.jsonl has a row of another kind: its column text holds ['list']" in refusal(path, bpe)


# --- splits and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "validation", "test"),
    [
        ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"),
        ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
        ("my_train.txt", "my_valid.txt", "my_test.txt"),
        ("training/a.txt", "dev/a.txt", "testing/a.txt"),
        ("train-00000-of-00001.txt", "eval-00000-of-00001.txt", "x-test.txt"),
        ("data.train.jsonl", "data.val.jsonl", "data.test.jsonl"),
    ],
)
def test_split_words_count_anywhere_in_a_name(train, validation, test, bpe, tmp_path):
    folder = tmp_path / "d"
    for name, word in ((train, "learn"), (validation, "check"), (test, "secret")):
        lines = lines_of(word)
        text = as_jsonl([{"text": line} for line in lines.splitlines(True)]) if name.endswith("jsonl") else lines
        write(folder / name, text)
    data = load(str(folder), bpe, 4, reading=Reading(document_separator="none"))
    assert lines_of("learn").startswith(text_of(data, "train"))
    assert lines_of("check").startswith(text_of(data, "validation"))
    assert "not read: the test split, since there is a validation split" in data.notes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("corpus.txt", "valid.txt"),
            "valid.txt is named validation, but no file is named train; name corpus.txt train",
        ),
        (("valid.txt", "test.txt"), "but no file is named train"),
        (("train.txt", "holdout.txt"), "holdout.txt is named neither train, validation nor test"),
        (("train_test.txt", "a.txt"), "train_test.txt is named after several splits, test and train"),
    ],
)
def test_a_folder_whose_splits_are_not_clear_is_refused(names, message, tmp_path):
    for name in names:
        write(tmp_path / "d" / name, lines_of(name))
    assert message in refusal(tmp_path / "d")
    (fault,) = check_source(str(tmp_path / "d"), None)
    assert message in fault


@pytest.mark.parametrize("word", ["valid", "val", "dev", "eval", "validation", "my_dev"])
def test_the_splits_of_a_saved_data_set_go_by_any_of_their_names(word, bpe, tmp_path):
    parts = {"train": "learn", word: "check", "test": "secret"}
    rows = {split: datasets.Dataset.from_dict({"text": lines_of(w).splitlines(True)}) for split, w in parts.items()}
    datasets.DatasetDict(rows).save_to_disk(str(tmp_path / "saved"))
    data = load(str(tmp_path / "saved"), bpe, 4, reading=Reading(document_separator="none"))
    assert lines_of("learn").startswith(text_of(data, "train"))
    assert lines_of("check").startswith(text_of(data, "validation"))
    assert "not read: the split test" in data.notes


def test_what_is_read_is_listed_and_what_is_not_is_named(bpe, tmp_path):
    folder = tmp_path / "d"
    lines = {name: lines_of(name, 40) for name in ("a", "b", "c", "linked")}
    write(folder / "a.txt", lines["a"])
    write(folder / "b.txt.gz", gzip.compress(lines["b"].encode()))
    write(folder / "sub/c.txt", lines["c"])
    write(tmp_path / "real/x.txt", lines["linked"])
    (folder / "zlink").symlink_to(tmp_path / "real")
    (folder / "zz_again").symlink_to(tmp_path / "real")
    (folder / "circle").symlink_to(folder)
    (folder / "gone.txt").symlink_to(tmp_path / "nothing")
    for name in ("README.txt", "meta.json", "LICENSE", "picture.png", ".hidden.txt"):
        write(folder / name, "not data\n" * 50)
    write(folder / "empty.txt", "")
    data = load(str(folder), bpe, 4)
    assert "".join(lines.values()).startswith(text_of(data, "train"))
    assert "linked 20" in text_of(data, "train")
    assert data.notes[0].startswith("4 files (3 .txt, 1 .txt.gz; ")
    for line in (
        "README.txt is about the data, by its name",
        "meta.json is about the data, by its name",
        "picture.png is of a kind that is not read (.png)",
        ".hidden.txt is hidden",
        "empty.txt is empty",
        "gone.txt is a link to nothing",
        "zz_again is the same folder as zlink",
        "circle is the same folder as .",
    ):
        assert f"not read: {line}" in data.notes
    (folder / "more.pdf").touch()
    again = load(str(folder), bpe, 4)
    assert "not read: more.pdf is of a kind that is not read (.pdf)" in again.notes, "also where nothing is prepared"


def test_validation_from_elsewhere_or_by_percent(bpe, tmp_path):
    a, b = write(tmp_path / "a.txt", lines_of("learn")), write(tmp_path / "b.txt", lines_of("check"))
    data = load(str(a), bpe, 4, reading=Reading(validation_dataset=str(b)))
    assert lines_of("learn").startswith(text_of(data, "train"))
    assert "learn 59" in text_of(data, "train")
    assert lines_of("check").startswith(text_of(data, "validation"))
    assert "a source of its own for validation" in data.description
    half = load(str(a), bpe, 4, reading=Reading(validation_split_percentage=50))
    assert text_of(half, "validation").startswith("learn 30 ")
    message = refusal(a, bpe, validation_split_percentage=10.0, validation_dataset=str(b))
    assert "--validation_split_percentage: has no effect" in message
    missing = refusal(a, bpe, validation_dataset=str(tmp_path / "gone.txt"))
    assert missing.startswith("--validation_dataset ")


# --- formats ----------------------------------------------------------------------------------------------------------


def as_csv(texts: list[str], delimiter: str) -> str:
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["id", "text"])
    writer.writerows([i, text] for i, text in enumerate(texts))
    return out.getvalue()


def as_parquet(texts: list[str], kind: pa.DataType) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"n": [1] * len(texts), "text": pa.array(texts, kind)}), out)
    return out.getvalue()


ROWS = {
    "a.jsonl": lambda texts: as_jsonl([{"text": t} for t in texts]),
    "a.ndjson": lambda texts: as_jsonl([{"text": t} for t in texts]),
    "array.json": lambda texts: json.dumps([{"text": t} for t in texts]),
    "pretty.json": lambda texts: json.dumps([{"text": t} for t in texts], indent=2),
    "apart.json": lambda texts: "\n".join(json.dumps({"text": t}, indent=1) for t in texts),
    "strings.json": lambda texts: json.dumps(texts),
    "a.csv": lambda texts: as_csv(texts, ","),
    "a.tsv": lambda texts: as_csv(texts, "\t"),
    "a.parquet": lambda texts: as_parquet(texts, pa.string()),
    "large.parquet": lambda texts: as_parquet(texts, pa.large_string()),
    "view.parquet": lambda texts: as_parquet(texts, pa.string_view()),
}
COMPRESS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


# Parquet compresses inside.
FILES = [(name, how) for name in ROWS for how in COMPRESS if not (how and name.endswith("parquet"))]


@pytest.mark.parametrize(("name", "compression"), FILES)
def test_every_format_gives_the_same_blocks(name, compression, bpe, tmp_path):
    texts = [line + 'with "quotes", tabs\t and\nline ends' for line in lines_of("row").splitlines()]
    content = ROWS[name](texts)
    content = content.encode() if isinstance(content, str) else content
    path = write(tmp_path / (name + compression), COMPRESS[compression](content))
    data = load(str(path), bpe, 4)
    tokenizer = open_tokenizer(bpe)
    ids = [i for text in texts[:-3] for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert data.train.tokens().tolist() == ids[: len(ids) // 4 * 4]
    assert "eos after each document" in data.description


TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r\0"), min_size=1, max_size=60)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(texts=st.lists(TEXTS, min_size=3, max_size=12), name=st.sampled_from([*ROWS, "a.txt"]))
def test_any_text_in_any_format_decodes_to_itself(texts, name, bpe):
    """With each text twice, the second half for validation; the end-of-text stands between rows, not between lines."""
    texts = [text.replace("<|endoftext|>", "") + "x" * 9 for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        parts = {}
        for split in ("train", "validation"):
            if name == "a.txt":
                parts[split] = "".join(texts)
                write(Path(folder, split, name), parts[split])
            else:
                content = ROWS[name](texts)
                parts[split] = "".join(f"{text}<|endoftext|>" for text in texts)
                write(Path(folder, split, name), content)
        data = load(folder, bpe, 2, cache_dir=Path(folder, ".cache"))
        for split, wanted in parts.items():
            assert wanted.encode().startswith(text_of(data, split).encode().rstrip(b"\xef\xbf\xbd"))
            ids = open_tokenizer(bpe)([wanted] if name != "a.txt" else wanted.splitlines(True), return_length=True)
            assert abs(sum(ids["length"]) - len(getattr(data, split).tokens())) <= 2 + len(texts)


@pytest.mark.parametrize(("encoding", "shown"), [("utf-16", "--encoding utf-16"), ("latin-1", "--encoding, such as")])
def test_other_encodings_are_read_where_they_are_named(encoding, shown, bpe, tmp_path):
    text = "".join(f"caf\u00e9 na\u00efve {i}\n" for i in range(60))
    path = write(tmp_path / "a.txt", text.encode(encoding))
    assert text.startswith(trained_text(path, bpe, encoding=encoding))
    assert shown in refusal(path, bpe)
    assert "Python knows no such encoding" in refusal(path, bpe, encoding="utf-99")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv"])
def test_a_byte_order_mark_is_no_text(name, bpe, tmp_path):
    texts = lines_of("mark").splitlines(True)
    content = "".join(texts) if name == "a.txt" else ROWS[name](texts)
    with_mark = trained_text(write(tmp_path / "with" / name, "\ufeff" + content), bpe)
    assert with_mark == trained_text(write(tmp_path / "without" / name, content), bpe)
    assert "\ufeff" not in with_mark


@pytest.mark.parametrize("kind", ["npy", "nanogpt.bin", "llmc.bin", "llmc4.bin"])
def test_token_files_of_others_are_taken_as_they_are(kind, bpe, tmp_path):
    ids = np.random.default_rng(0).integers(0, 250, 40_000)
    path = tmp_path / f"tokens.{kind}"
    if kind == "npy":
        np.save(path, ids.astype(np.uint16))
    else:
        head = np.zeros(256, dtype=np.int32)
        head[:3] = (20240801, 7, len(ids)) if kind == "llmc4.bin" else (20240520, 1, len(ids))
        tokens = ids.astype("<u4" if kind == "llmc4.bin" else "<u2").tobytes()
        path.write_bytes(tokens if kind == "nanogpt.bin" else head.tobytes() + tokens)
    data = load(str(path), bpe, 16)
    train = data.train.tokens()
    assert train.tolist() == ids[: len(train)].tolist()
    assert len(train) > 0.7 * len(ids)
    assert "give the --tokenizer that made them" in refusal(path)


def test_masked_unlabelled_and_null_positions_are_dropped_and_counted(bpe, tmp_path):
    rng = random.Random(0)
    rows, wanted = [], []
    for _ in range(100):
        ids = [rng.randrange(1, 250) for _ in range(rng.randint(2, 12))]
        row = ids + [0] * (12 - len(ids))
        mask = [1] * len(ids) + [0] * (12 - len(ids))
        labels = [-100, *row[1:]]
        wanted.append(ids[1:])
        rows.append({"input_ids": row, "attention_mask": mask, "labels": labels})
    padding = sum(12 - len(ids) - 1 for ids in wanted)
    for name in ("a.parquet", "a.jsonl", "saved"):
        path = write_rows(tmp_path / name, rows)
        data = load(str(path), bpe, 4)
        flat = [i for ids in wanted[:95] for i in ids]
        assert data.train.tokens().tolist() == flat[: len(flat) // 4 * 4], name
        assert f"dropped {padding:,} with attention_mask 0, 100 with the label -100" in data.description
    with_null = pa.table({"input_ids": pa.array([[5, None, 7, 8]] * 60, pa.list_(pa.int64()))})
    pq.write_table(with_null, tmp_path / "null.parquet")
    data = load(str(tmp_path / "null.parquet"), bpe, 3)
    assert data.train.tokens().tolist() == [5, 7, 8] * 57
    assert "dropped 60 of null" in data.description


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "fine"}\n{"text": broken\n',
            "a.jsonl cannot be read (ValueError: a.jsonl, line 2: no JSON",
        ),
        ("a.json", '[{"text": "fine"}, {"text": ', "no JSON"),
        ("a.csv", "id,text\n1,a\n2,b,c\n", "line 3: has more fields than the header"),
        ("a.jsonl", "1\n2\n", "has rows without columns, such as 1"),
        ("a.txt.gz", "not gzip at all", "a.txt.gz cannot be read (BadGzipFile"),
        ("a.csv", "some words\nmore words\n", "it is not clear which of the columns some words"),
    ],
)
def test_what_cannot_be_read_is_one_line_with_the_file(name, content, message, bpe, tmp_path):
    assert message in refusal(write(tmp_path / name, content), bpe)


# --- documents --------------------------------------------------------------------------------------------------------


def test_a_separator_stands_after_each_document(bpe, tmp_path):
    texts = [f"document {i}" for i in range(60)]
    path = write(tmp_path / "a.jsonl", as_jsonl([{"text": t} for t in texts]))
    assert "".join(f"{t}<|endoftext|>" for t in texts).startswith(trained_text(path, bpe))
    assert "".join(texts).startswith(trained_text(path, bpe, document_separator="none"))
    assert "".join(f"{t}!" for t in texts).startswith(trained_text(path, bpe, document_separator="!"))
    assert "is 2 tokens" in refusal(path, bpe, document_separator="!?")
    text = write(tmp_path / "a.txt", lines_of("line"))
    assert "<|endoftext|>" not in trained_text(text, bpe)
    assert "--document_separator eos: the rows of --dataset " in refusal(text, bpe, document_separator="eos")


def test_windows_that_both_parts_have_are_counted(bpe, tmp_path):
    rng = np.random.default_rng(1)
    train, validation = rng.integers(0, 250, 6000), rng.integers(0, 250, WINDOW * 20)
    validation[WINDOW * 3 : WINDOW * 5] = train[1001 : 1001 + 2 * WINDOW]  # at any offset of the training tokens
    for split, ids in (("train", train), ("validation", validation)):
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / f"{split}.npy", ids.astype(np.uint16))
    data = load(str(tmp_path), bpe, WINDOW, cache_dir=tmp_path / ".cache")
    assert shared_windows(data.train, data.validation) == (2, 20)


def test_the_command_shows_what_would_be_trained_on(bpe, tmp_path, capfd):
    write(tmp_path / "d/train.txt", lines_of("learn"))
    write(tmp_path / "d/valid.txt", lines_of("check"))
    write(tmp_path / "d/notes.pdf", "x")
    assert commands.main(["data", str(tmp_path / "d"), "--tokenizer", bpe, "--block_size", "8"]) == 0
    out = capfd.readouterr().out
    for part in (
        "2 files (2 .txt;",
        "not read: notes.pdf is of a kind",
        "first block 'learn 0",
        "0 of ",
        "fingerprint ",
    ):
        assert part in out
    assert commands.main(["data", str(tmp_path / "gone.txt"), "--block_size", "x", "--encoding", "utf-99"]) == 2
    assert len([line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]) == 3


def test_reading_is_in_the_key_and_in_the_plan(bpe, tmp_path):
    path = write(tmp_path / "a.jsonl", as_jsonl([{"text": f"t {i}", "other": f"o {i}"} for i in range(99)]))
    first = load(str(path), bpe, 4)
    other = load(str(path), bpe, 4, reading=Reading(text_column="other"))
    assert text_of(other, "train").startswith("o 0<|endoftext|>o 1")
    assert first.fingerprint != other.fingerprint
    assert len(list(Path(os.environ["GPT2_VARIANTS_CACHE"]).glob("*/info.json"))) == 2


def test_a_tokenizer_that_adds_a_space_to_every_line_is_said(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate(" \u2581abcdefghijklmnopqrstuvwxyz0123456789\n")}
    model = Tokenizer(models.BPE(letters, [], unk_token="a"))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    model.decoder = decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=model, unk_token="a").save_pretrained(str(tmp_path / "llama"))
    data = load(str(write(tmp_path / "a.txt", lines_of("line"))), str(tmp_path / "llama"), 4)
    assert any("adds tokens at the beginning or end of every line" in note for note in data.notes)
    assert "adds tokens at the beginning or end of every line" in data.description
