"""Preparing data that are larger than memory: what is read again, what a kill costs, what is held at once."""

import json
import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import datasets
import pytest

from gpt2_variants import data
from gpt2_variants.data import load

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A cache of its own for every test."""
    monkeypatch.setenv("GPT2_VARIANTS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def settled(monkeypatch):
    """Files count as settled at once: the tests do not wait."""
    monkeypatch.setattr(data.digests, "SETTLED_NS", 0)


def make_text(lines: int, seed: int = 0) -> str:
    """Lines of 0 to 12 words, every one ended by a newline."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh é🙂", k=rng.randint(1, 7))) for _ in range(80)]
    return "".join(" ".join(rng.choices(words, k=rng.randint(0, 12))) + "\n" for _ in range(lines))


def write_text(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def python(code: str, *args: object) -> subprocess.Popen:
    """Run code that begins with `from gpt2_variants import data` in a process of its own."""
    code = "import os, sys, time\nfrom pathlib import Path\nfrom gpt2_variants import data\n" + textwrap.dedent(code)
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def digests(*files: Path, source: Path, cache: Path) -> list[str]:
    return data.digests.file_digests(files, source, cache)


class Reads(list):
    """The files that were read whole for their digests."""

    def __init__(self, monkeypatch):
        read = data.digests.file_digest

        def counted(file):
            self.append(file.name)
            return read(file)

        monkeypatch.setattr(data.digests, "file_digest", counted)

    def taken(self) -> list[str]:
        taken = list(self)
        self.clear()
        return taken


# --- stamps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder", "saved"])
def test_a_second_load_reads_no_byte_of_the_source(tmp_path, monkeypatch, settled, kind):
    if kind == "saved":
        datasets.Dataset.from_dict({"text": make_text(100).splitlines(True)}).save_to_disk(str(tmp_path / "source"))
    else:
        write_text(tmp_path / "source/a.txt", make_text(60))
        write_text(tmp_path / "source/b/c.txt", make_text(60, seed=1))
    source = str(tmp_path / ("source/a.txt" if kind == "file" else "source"))
    first = load(source, "builtin", 16)
    reads = Reads(monkeypatch)
    second = load(source, "builtin", 16)
    other = load(source, "builtin", 32)  # the digests do not hang on what becomes of the source
    assert reads == []
    assert second.fingerprint == first.fingerprint != other.fingerprint


def test_stamps_change_no_key(tmp_path, cache, settled):
    source = write_text(tmp_path / "a.txt", make_text(60))
    load(source, "builtin", 16)
    (key,) = (file.parent.name for file in cache.glob("*/info.json"))
    (stamps,) = cache.glob("*.stamps")
    load(source, "builtin", 16)
    stamps.unlink()
    load(source, "builtin", 16)
    assert [file.parent.name for file in cache.glob("*/info.json")] == [key]


def test_what_changed_is_read_again(tmp_path, cache, monkeypatch, settled):
    source = tmp_path / "source"
    a, b = source / "a.txt", source / "b.txt"
    write_text(a, "one")
    write_text(b, "two")
    first = digests(a, b, source=source, cache=cache)
    reads = Reads(monkeypatch)
    time.sleep(0.05)  # more than the clock of a file system's times ticks

    before = a.stat()
    write_text(a, "eno")  # of the same size, in the same inode, with its mtime set back
    os.utime(a, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (a.stat().st_size, a.stat().st_mtime_ns, a.stat().st_ino) == (3, before.st_mtime_ns, before.st_ino)
    second = digests(a, b, source=source, cache=cache)
    assert second[0] != first[0]
    assert second[1] == first[1]
    assert reads.taken() == ["a.txt"]

    write_text(tmp_path / "new", "two")  # another inode in its place
    os.utime(tmp_path / "new", ns=(b.stat().st_atime_ns, b.stat().st_mtime_ns))
    os.replace(tmp_path / "new", b)
    assert digests(a, b, source=source, cache=cache) == second
    assert reads.taken() == ["b.txt"]

    time.sleep(0.05)
    a.touch()
    assert digests(a, b, source=source, cache=cache) == second
    assert reads.taken() == ["a.txt"]
    assert digests(a, b, source=source, cache=cache) == second
    assert reads.taken() == []


def test_a_file_that_may_still_change_is_not_trusted(tmp_path, cache, monkeypatch):
    source = Path(write_text(tmp_path / "a.txt", "one"))
    reads = Reads(monkeypatch)
    monkeypatch.setattr(data.digests, "SETTLED_NS", 10**15)
    for _ in range(2):
        digests(source, source=source, cache=cache)
        assert reads.taken() == ["a.txt"]
    assert not list(cache.glob("*"))

    def changing(file):
        file.write_text("two")
        return "0" * 32

    monkeypatch.setattr(data.digests, "SETTLED_NS", 0)
    monkeypatch.setattr(data.digests, "file_digest", changing)
    digests(source, source=source, cache=cache)
    assert not list(cache.glob("*")), "it changed while it was read"


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "\0" * len(text),
        lambda text: "[]",
        lambda text: '{"format": 1}',
        lambda text: text.replace('"format": 1', '"format": 0'),
        lambda text: text.replace('"source": "', '"source": "/elsewhere'),
        lambda text: json.dumps(json.loads(text) | {"files": [1]}),
        lambda text: json.dumps(json.loads(text) | {"files": {key: [1, 2] for key in json.loads(text)["files"]}}),
        lambda text: json.dumps(json.loads(text) | {"files": {key: [1] * 6 for key in json.loads(text)["files"]}}),
    ],
)
def test_damaged_or_foreign_stamps_are_done_without(tmp_path, cache, monkeypatch, settled, damage):
    source = Path(write_text(tmp_path / "a.txt", "one"))
    first = digests(source, source=source, cache=cache)
    (stamps,) = cache.glob("*.stamps")
    whole = stamps.read_text()
    stamps.write_text(damage(whole))
    reads = Reads(monkeypatch)
    assert digests(source, source=source, cache=cache) == first
    assert reads.taken() == ["a.txt"]
    assert stamps.read_text() == whole
    stamps.write_bytes(b"\xff")
    assert digests(source, source=source, cache=cache) == first


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, settled):
    source = Path(write_text(tmp_path / "a.txt", "one"))
    write_text(tmp_path / "file", "in the way")
    expected = [data.digests.file_digest(source)]
    assert digests(source, source=source, cache=tmp_path / "file/cache") == expected
    cache = tmp_path / "read-only"
    cache.mkdir()
    monkeypatch.setattr(data.digests.os, "replace", refuse)
    assert digests(source, source=source, cache=cache) == expected
    assert list(cache.iterdir()) == []


def refuse(*args):
    raise PermissionError("for reading only")


def test_processes_may_stamp_at_once(tmp_path, cache):
    files = [Path(write_text(tmp_path / f"source/{i}.txt", make_text(20, seed=i))) for i in range(20)]
    code = """
    source, cache = map(Path, sys.argv[1:])
    data.digests.SETTLED_NS = 0
    files = sorted(source.iterdir())
    until = time.monotonic() + 1
    found = set()
    while time.monotonic() < until:
        files[3].touch()  # so that the stamps are written again and again
        found.add(tuple(data.digests.file_digests(files, source, cache)))
    print(found)
    """
    both = [python(code, tmp_path / "source", cache) for _ in range(2)]
    outputs = [process.communicate(timeout=50) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0].strip() == outputs[1][0].strip() == str({tuple(map(data.digests.file_digest, sorted(files)))})
    assert [file.suffix for file in cache.iterdir()] == [".stamps"]
