"""`python -m gpt2_variants prepare`: what it makes trains as the source would, saved or pushed, whole or not at all."""

import itertools
import json
import os
import random
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from conftest import ROOT, patience, run_to_end
from hub_server import HubServer

from gpt2_variants import __main__, data, network, prepared_data
from gpt2_variants.config.command_line import parse
from gpt2_variants.config.resolve import load_data

TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH"
READ_ONLY = "hf_" + "ABCDEFGHabcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def server():
    with HubServer() as server:
        server.add_user("me", TOKEN)
        server.add_user("reader", READ_ONLY, role="read")
        yield server


@pytest.fixture
def hub(server, monkeypatch):
    """An empty Hub in memory that this process asks too, with the token of a user `me`."""
    for state in (server.repos, server.objects, server.requests):
        state.clear()
    server.interfere = lambda handler: False
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    network.answers.cache_clear()
    yield server
    network.answers.cache_clear()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """No test finds what another one prepared."""
    monkeypatch.setenv("GPT2_VARIANTS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """300 lines of random words, some of them empty."""
    rng = random.Random(3)
    words = ["".join(rng.choices("abcdefgh é🙂", k=rng.randint(1, 7))) for _ in range(80)]
    lines = (" ".join(rng.choices(words, k=rng.randint(0, 12))) + "\n" for _ in range(300))
    path = tmp_path_factory.mktemp("my private folder") / "lines.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


def prepare(*arguments) -> int:
    return __main__.main(["prepare", *map(str, arguments)])


def blocks(part: data.BlockDataset) -> list[list[int]]:
    return part.__getitems__(list(range(len(part))))["input_ids"].tolist()


def cut(rows: list[list[int]], size: int) -> list[list[int]]:
    """The rows as one stream, in pieces of `size`, the last short one dropped."""
    stream = list(itertools.chain.from_iterable(rows))
    return [stream[i : i + size] for i in range(0, len(stream) - size + 1, size)]


def assert_same(one: data.Data, other: data.Data) -> None:
    assert one.fingerprint == other.fingerprint
    assert blocks(one.train) == blocks(other.train)
    assert blocks(one.validation) == blocks(other.validation)
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()


# --- a folder ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "builtin", "saved rows", "ids of other lengths"])
def test_training_on_the_folder_is_training_on_the_source(kind, text, tmp_path, capsys):
    dataset, tokenizer = str(text), "builtin"
    if kind == "builtin":
        dataset = "builtin"
    elif kind == "saved rows":
        rows = datasets.Dataset.from_dict({"text": text.read_text().splitlines(keepends=True)})
        datasets.DatasetDict(train=rows, test=rows.select(range(40))).save_to_disk(str(tmp_path / "rows"))
        dataset = str(tmp_path / "rows")
    elif kind == "ids of other lengths":
        rng = random.Random(0)
        rows = [[rng.randrange(200) for _ in range(rng.randint(0, 40))] for _ in range(100)]
        datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(str(tmp_path / "ids"))
        data.load(str(text), "builtin", 32).tokenizer.save_pretrained(str(tmp_path / "bpe"))
        dataset, tokenizer = str(tmp_path / "ids"), str(tmp_path / "bpe")
    folder = tmp_path / "made"
    capsys.readouterr()
    assert prepare("--dataset", dataset, "--tokenizer", tokenizer, "--block_size", 24, "--output_dir", folder) == 0
    said = capsys.readouterr()
    assert said.err == "", "no progress in a log"

    source = data.load(dataset, tokenizer, 24)
    saved = datasets.load_from_disk(str(folder))
    assert list(saved) == ["train", "validation"]
    assert saved["train"].features == {"input_ids": datasets.List(datasets.Value("uint16"), length=24)}
    assert saved["train"]["input_ids"][:] == blocks(source.train)
    assert saved["validation"]["input_ids"][:] == blocks(source.validation)

    (command,) = re.findall(r"^train on it (.*)$", said.out, re.MULTILINE)
    launcher, script, *options = shlex.split(command)
    assert (launcher, script) == ("deepspeed", "train_ds.py")
    asked = parse([*options, "--preset", "demo", "--output_dir", str(tmp_path / "run"), "--report_to", "none"])
    assert_same(load_data(asked), source)
    assert f"train {len(saved['train']):,}, validation {len(saved['validation']):,}, of 24 tokens" in said.out
    assert source.fingerprint in said.out


def test_wikitext_is_cut_as_published_and_not_anew(text, tmp_path, monkeypatch):
    """Within batches of rows, each batch's remainder dropped, as its own run of blocks."""
    monkeypatch.setattr(data.sources, "WIKITEXT_ROWS_PER_BATCH", 50)
    monkeypatch.setattr(network, "reachable", lambda anew=False: True)
    lines = text.read_text().splitlines(keepends=True)
    raw = datasets.Dataset.from_dict({"text": lines * 4})  # 1,200 rows: the first 12 are for validation

    def fake(name, config=None, *, split=None):
        assert (name, config, split) == ("Salesforce/wikitext", "wikitext-103-raw-v1", ["train[1%:]", "train[:1%]"])
        return [raw.select(range(12, 1200)), raw.select(range(12))]

    monkeypatch.setattr(datasets, "load_dataset", fake)
    data.load(str(text), "builtin", 32).tokenizer.save_pretrained(str(tmp_path / "bpe"))
    folder, bpe = tmp_path / "made", tmp_path / "bpe"
    options = ("--dataset", "wikitext-103", "--tokenizer", bpe, "--block_size", 24)
    assert prepare(*options, "--output_dir", folder) == 0

    tokenizer = data.open_tokenizer(str(bpe))
    rows = [tokenizer.encode(line) for line in (lines * 4)[12:]]
    expected = []
    for first in range(0, len(rows), 50):
        expected += cut(rows[first : first + 50], 24)
    loaded = data.load(str(folder), f"{folder}/tokenizer", 24)
    assert blocks(loaded.train) == expected
    assert len(expected) < len(cut(rows, 24)), "the remainders of the batches are dropped"
    assert_same(loaded, data.load("wikitext-103", str(bpe), 24))


def test_another_block_size_cuts_the_blocks_as_one_stream(text, tmp_path):
    folder = tmp_path / "made"
    prepare("--dataset", text, "--tokenizer", "builtin", "--block_size", 24, "--output_dir", folder)
    saved = datasets.load_from_disk(str(folder))
    other = data.load(str(folder), f"{folder}/tokenizer", 40)
    for part in ("train", "validation"):
        assert blocks(getattr(other, part)) == cut(saved[part]["input_ids"][:], 40)


def test_the_folder_says_what_it_is_and_not_where_it_came_from(text, tmp_path):
    folder = tmp_path / "made"
    data.load(str(text), "builtin", 32).tokenizer.save_pretrained(str(tmp_path / "hidden place/bpe"))
    options = ("--dataset", text, "--tokenizer", tmp_path / "hidden place/bpe", "--block_size", 24)
    prepare(*options, "--output_dir", folder)
    for file in folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert not [secret for secret in (b"private folder", b"hidden place", b"pytest-of") if secret in content], (
                file
            )
    card = (folder / "README.md").read_text(encoding="utf-8")
    source = data.load(str(text), str(tmp_path / "hidden place/bpe"), 24)
    held = round(0.05 * 300)
    for words in (
        *("lines.txt", "`bpe`", source.fingerprint, "its last rows for validation", f"validation {held} rows"),
        *(f"| train | {len(source.train):,} | {24 * len(source.train):,} |", "n<1K", "text-generation"),
        "--dataset made --tokenizer made/tokenizer --block_size 24",
    ):
        assert words in card, words


def test_a_folder_is_whole_or_absent(text, tmp_path, monkeypatch, capsys):
    options = ("--dataset", text, "--tokenizer", "builtin", "--block_size", 24, "--output_dir", tmp_path / "new/made")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gpt2_variants.prepared_data._card", interrupted)
    assert prepare(*options) == 130
    assert list((tmp_path / "new").iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("GPT2_VARIANTS_CACHE", str(tmp_path / "cache"))
    assert prepare(*options) == 0
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "new").rglob("*")}
    capsys.readouterr()
    assert prepare(*options) == 2
    said = capsys.readouterr().err
    assert said == f"error: --output_dir {tmp_path}/new/made: exists already; give a new folder\n"
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "new").rglob("*")} == before


# --- the Hub ----------------------------------------------------------------------------------------------------------


COMMAND = "from gpt2_variants import __main__; sys.exit(__main__.main(sys.argv[1:]))"
LOAD = """
import datasets, json
from gpt2_variants import data
loaded = data.load(sys.argv[1], sys.argv[2], int(sys.argv[3]))
ids = [part.tokens().tolist() for part in (loaded.train, loaded.validation)]
plain = datasets.load_dataset(sys.argv[1])
print(json.dumps([loaded.fingerprint, ids, {name: part["input_ids"][:] for name, part in plain.items()}]))
"""


def client(home: Path, code: str, *arguments) -> subprocess.CompletedProcess:
    """Run Python in a process that has the Hub from its start, with a home of its own and no waiting."""
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    env |= {"HF_HOME": str(home / "hf"), "HF_HUB_DISABLE_XET": "1", "GPT2_VARIANTS_CACHE": str(home / "cache")}
    code = f"import sys, time\ntime.sleep = lambda seconds: None\n{code}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return run_to_end(command, cwd=ROOT, env=env)


@pytest.mark.slow
def test_a_push_is_interrupted_and_repeated_and_trains_as_the_source_does(hub, text, tmp_path):
    uploads = []

    def drop_after_the_first(handler) -> bool:
        if handler.command != "PUT":
            return False
        uploads.append(handler.path)
        if len(uploads) > 1:
            handler.rfile.read(20)
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
        return len(uploads) > 1

    hub.interfere = drop_after_the_first
    folder = tmp_path / "made"
    options = ("--dataset", text, "--tokenizer", "builtin", "--block_size", 24, "--output_dir", folder)
    push = ("--push_to_hub", "--hub_dataset_id", "cut", "--hub_private")
    failed = client(tmp_path, COMMAND, "prepare", *options, *push)
    assert failed.returncode == 1
    *notes, error, again = failed.stderr.splitlines()
    assert [note.split(":")[0] for note in notes] == ["note"] * 2
    assert error.startswith("error: not pushed to cut: RemoteProtocolError: ")
    assert again.startswith(f"{folder} is complete; to repeat the push: python -m gpt2_variants prepare ")
    assert list(datasets.load_from_disk(str(folder))) == ["train", "validation"]
    files = lambda: hub.files("me/cut", "dataset")
    assert not [name for name in files() if name.startswith("data/")]

    hub.interfere = lambda handler: False
    first, arrived = len(hub.requests), len(hub.objects)
    assert arrived == 1
    prepared = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.arrow")}
    done = client(tmp_path, COMMAND, *shlex.split(again.split("push: ")[1])[3:])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert f"pushed      {hub.url}/datasets/me/cut\n" in done.stdout
    assert hub.repos["dataset me/cut"]["private"]
    assert sum(method == "PUT" for method, *_ in hub.requests[first:]) == 1, "what had arrived is not sent again"
    assert prepared == {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.arrow")}
    assert set(files()) == {
        *("README.md", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"),
        *("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"),
    }
    for name, content in files().items():
        for secret in (TOKEN, "private folder", "pytest-of", str(ROOT)):
            assert secret.encode() not in content, name
    left = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    said = "".join((failed.stdout, failed.stderr, done.stdout, done.stderr))
    assert TOKEN.encode() not in b"".join([*left, said.encode()])
    card = files()["README.md"].decode()
    source = data.load(str(text), "builtin", 24)
    for words in ("path: data/train-*", "list: uint16", "length: 24", "- text-generation", source.fingerprint):
        assert words in card, words

    fetch, train = (line.strip() for line in done.stdout.split("train on it ")[1].strip().splitlines())
    assert fetch in card
    assert train in card
    fetched = subprocess.run(
        [Path(sys.executable).parent / "hf", *shlex.split(fetch)[1:]],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
    )
    assert fetched.returncode == 0, fetched.stderr
    words = shlex.split(train)
    dataset, tokenizer, size = (words[words.index(f"--{name}") + 1] for name in ("dataset", "tokenizer", "block_size"))
    loaded = client(tmp_path / "elsewhere", LOAD, dataset, tmp_path / tokenizer, size)
    assert loaded.returncode == 0, loaded.stderr
    fingerprint, ids, plain = json.loads(loaded.stdout)
    assert fingerprint == source.fingerprint
    assert ids == [source.train.tokens().tolist(), source.validation.tokens().tolist()]
    assert plain == {"train": blocks(source.train), "validation": blocks(source.validation)}


def test_other_data_on_the_hub_are_not_overwritten(hub, text, capsys):
    there = {"README.md": b"# Something else"}
    hub.repos["dataset me/cut"] = {"private": False, "files": dict(there), "sha": "0" * 40, "commits": 1}
    options = ("--dataset", text, "--tokenizer", "builtin", "--block_size", 24)
    assert prepare(*options, "--push_to_hub", "--hub_dataset_id", "me/cut") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: not pushed to me/cut: me/cut holds something else, which is not overwritten")
    assert hub.files("me/cut", "dataset") == there


def test_a_tokenizer_of_the_hub_is_named_by_its_id(text):
    """Then nothing has to be fetched first."""
    request = prepared_data.Request(str(text), "openai-community/gpt2-medium", 1024, hub_dataset_id="me/cut")
    (train,) = prepared_data._train_from_hub("me/cut", request)
    assert train == (
        "deepspeed train_ds.py --variant gpt2 --dataset me/cut --tokenizer openai-community/gpt2-medium "
        "--block_size 1024"
    )


@pytest.mark.parametrize(
    ("rows", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**9 * 5, "1B<n<10B"), (10**10, "n>10B")],
)
def test_size_categories(rows, category):
    assert prepared_data._size_category(rows) == category


def faults(capsys, *options) -> list[str]:
    """The lines that are told; nothing may be written, nor take long."""
    start = time.monotonic()
    assert prepare(*options) == 2
    assert time.monotonic() - start < patience(5)
    said = capsys.readouterr()
    assert said.out == ""
    assert all(line.startswith("error: --") for line in said.err.splitlines()), said.err
    assert TOKEN not in said.err
    assert READ_ONLY not in said.err
    return said.err.splitlines()


@pytest.mark.parametrize(
    ("more", "environment", "words"),
    [
        ((), {}, ["--output_dir: is missing"]),
        (("--push_to_hub",), {}, ["needs --hub_dataset_id"]),
        (("--hub_dataset_id", "me/cut"), {}, ["--hub_dataset_id: has no effect without --push_to_hub"]),
        (("--push_to_hub", "--hub_dataset_id", "me/cut"), {"HF_TOKEN": ""}, ["no Hugging Face token"]),
        (("--push_to_hub", "--hub_dataset_id", "me/cut"), {"HF_TOKEN": READ_ONLY}, ["may only read"]),
        (("--push_to_hub", "--hub_dataset_id", "you/cut"), {}, ["me may not write there"]),
        (
            ("--push_to_hub", "--hub_dataset_id", "me/cut"),
            {"HF_ENDPOINT": "http://127.0.0.1:9"},
            ["(http://127.0.0.1:9) cannot be reached"],
        ),
        (
            ("--push_to_hub", "--hub_dataset_id", "a/b/c", "--output_dir", ".", "--block_size", "x"),
            {},
            ["--block_size x: not a whole number", "exists already", "--hub_dataset_id a/b/c"],
        ),
    ],
)
def test_faults_are_told_before_the_work(more, environment, words, hub, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    lines = faults(capsys, "--dataset", text, "--tokenizer", "builtin", *more)
    assert len(lines) == len(words)
    for line, word in zip(lines, words, strict=True):
        assert word in line
    assert not (tmp_path / "cache").exists()
    assert not hub.repos
    assert not [request for request in hub.requests if request[0] not in ("GET", "HEAD")]


def test_a_fault_of_the_data_is_told_with_those_of_the_push(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    lines = faults(
        capsys,
        *("--dataset", tmp_path / "gone.txt", "--tokenizer", "builtin", "--push_to_hub", "--hub_dataset_id", "cut"),
    )
    assert [line.split(":")[1].split()[0] for line in lines] == ["--dataset", "--push_to_hub"]
