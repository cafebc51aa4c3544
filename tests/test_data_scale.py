"""Preparing data that are larger than memory: what is read again, what a kill costs, what is held at once."""

import importlib
import json
import os
import random
import textwrap
import time
from pathlib import Path

import datasets
import pytest
from conftest import output_of, python, write_text

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
    outputs = [output_of(process, 50) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0].strip() == outputs[1][0].strip() == str({tuple(map(data.digests.file_digest, sorted(files)))})
    assert [file.suffix for file in cache.iterdir()] == [".stamps"]


# --- pieces -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch):
    """Some twenty pieces of a text of 10 kB, of several batches each."""
    monkeypatch.setattr(data.pieces, "BYTES_PER_PIECE", 500)
    monkeypatch.setattr(data.arrow, "BYTES_PER_BATCH", 200)


SMALL_PIECES = """
data.pieces.BYTES_PER_PIECE = 500
data.arrow.BYTES_PER_BATCH = 200
"""


def content(folder: Path) -> dict[str, bytes]:
    """What a prepared folder holds, but for the names of its source."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def killed(code: str, *args: object) -> None:
    process = python(SMALL_PIECES + textwrap.dedent(code), *args)
    output = output_of(process, 50)
    assert process.returncode == -9, output


KILLED_AFTER_SEVEN_PIECES = """
write = data.pieces._Work.write
def counted(work, start, stop):
    found = write(work, start, stop)
    if len(list(work.folder.glob("*.arrow"))) == 7:
        (work.folder / "half.aside").touch()
        os.kill(os.getpid(), 9)
    return found
data.pieces._Work.write = counted
data.load(sys.argv[1], sys.argv[2], 16, num_proc=1)
"""


@pytest.mark.parametrize("tokenizer", ["builtin", pytest.param("folder", marks=pytest.mark.slow)])
def test_a_killed_build_goes_on_after_its_last_whole_piece(tmp_path, cache, monkeypatch, small_pieces, tokenizer):
    source = write_text(tmp_path / "a.txt", make_text(400))
    if tokenizer == "folder":
        load("builtin", "builtin", 16, cache_dir=tmp_path / "other").tokenizer.save_pretrained(tmp_path / "tokenizer")
        tokenizer = str(tmp_path / "tokenizer")
    killed(KILLED_AFTER_SEVEN_PIECES, source, tokenizer)
    (half,) = cache.glob("*.building")
    left = {file: file.stat().st_mtime_ns for file in half.glob("pieces/*.arrow")}
    assert len(left) == 7

    killed(
        """
        tokenise_pieces = data.cutting.tokenise_pieces
        def die(*args):
            tokenise_pieces(*args)
            os.kill(os.getpid(), 9)
        data.cutting.tokenise_pieces = die
        data.load(sys.argv[1], sys.argv[2], 16, num_proc=2)
        """,
        source,
        tokenizer,
    )
    pieces = list(half.glob("pieces/*"))
    assert len(pieces) > 15
    assert {file: file.stat().st_mtime_ns for file in left} == left, "they were not written again"
    assert not list(half.rglob("*.aside"))

    texts = []
    encode = data.cutting.encode
    monkeypatch.setattr(data.cutting, "encode", lambda t, n, texts_: texts.extend(texts_) or encode(t, n, texts_))
    rebuilt = load(source, tokenizer, 16)
    assert sum(map(len, texts)) < 500, "no more than tells how many rows are held out"
    assert {file.suffix for file in cache.iterdir()} <= {"", ".lock", ".stamps", ".verified"}
    assert sorted(file.name for file in half.with_suffix("").iterdir()) == [
        "info.json",
        "tokenizer",
        "train",
        "validation",
    ]
    whole = load(source, tokenizer, 16, cache_dir=tmp_path / "clean")
    assert rebuilt.fingerprint == whole.fingerprint
    assert content(half.with_suffix("")) == content(tmp_path / "clean" / half.stem)


def test_a_build_killed_when_all_but_its_name_was_done_is_taken_as_it_is(tmp_path, cache, monkeypatch):
    source = write_text(tmp_path / "a.txt", make_text(400))
    killed(
        """
        import shutil
        remove = shutil.rmtree
        def die(path, **options):
            if Path(path).name == "pieces":
                os.kill(os.getpid(), 9)
            remove(path, **options)
        shutil.rmtree = die
        data.load(sys.argv[1], "builtin", 16)
        """,
        source,
    )
    monkeypatch.setattr(data.cache, "read_source", None)
    finished = load(source, "builtin", 16)
    monkeypatch.undo()
    assert not list(cache.rglob("pieces"))
    assert finished.fingerprint == load(source, "builtin", 16, cache_dir=tmp_path / "clean").fingerprint


def pieces_of(texts: list[str | None], folder: Path, tokenizer, identity: str = "", num_proc: int = 1):
    rows = datasets.Dataset.from_dict({"text": texts})
    tokenise = data.cutting._tokenise(tokenizer, "mine")
    return data.pieces.tokenise_pieces(rows, tokenise, identity, folder, num_proc)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load("builtin", "builtin", 16, cache_dir=tmp_path_factory.mktemp("tokenizer")).tokenizer


def test_only_a_whole_piece_of_the_same_text_place_and_tokenizer_is_used(tmp_path, small_pieces, tokenizer):
    texts: list[str | None] = [*make_text(400).splitlines(True), None, ""]
    folder = tmp_path / "pieces"

    def rows(tokens) -> list[list[int]]:
        return [row for table in tokens.tables() for row in table["input_ids"].to_pylist()]

    first = rows(pieces_of(texts, folder, tokenizer))
    assert first == [tokenizer.encode(text or "") for text in texts]
    files = set(folder.iterdir())

    def new(*args, **options) -> int:
        before = set(folder.iterdir())
        pieces_of(*args, **options)
        return len(set(folder.iterdir()) - before)

    assert new(texts, folder, tokenizer) == 0
    assert new(texts, folder, tokenizer, identity="another") == len(files)
    assert new([texts[0], texts[1].replace("c", "b", 1), *texts[2:]], folder, tokenizer) == 1
    assert new([*texts[:-1], None], folder, tokenizer) == 1, "null is another row than the empty one"
    assert new([*texts[1:], texts[0]], folder, tokenizer) == len(files), "in another place"
    shifted = [texts[0] + texts[1][:1], texts[1][1:], *texts[2:]]
    assert new(shifted, folder, tokenizer) == 1, "the same bytes in other rows"

    for number, file in enumerate(sorted(files)):
        whole = file.read_bytes()
        file.write_bytes([b"", whole[: len(whole) // 2], whole[:-200], b"foreign"][number % 4])
    assert rows(pieces_of(texts, folder, tokenizer)) == first


def test_a_tokenizer_s_digest_tells_others_apart(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path / "same")
    assert data.pieces.tokenizer_digest(tokenizer) == data.pieces.tokenizer_digest(tokenizer)
    other = AutoTokenizer.from_pretrained(tmp_path / "same")
    before = data.pieces.tokenizer_digest(other)
    other.add_tokens(["<new>"])
    assert data.pieces.tokenizer_digest(other) != before


@pytest.mark.parametrize("most_rows", [None, 7])
def test_ranges_cover_all_rows_and_are_filled_up(monkeypatch, most_rows):
    monkeypatch.setattr(data.arrow, "ROWS_PER_BATCH", 30)
    texts = [*make_text(200).splitlines(True), None, "", "x" * 1000, *[""] * 40, "y"]
    rows = datasets.Dataset.from_dict({"text": texts})
    ranges = list(data.pieces.row_ranges(rows, 100, most_rows))
    assert [start for start, _, _ in ranges] == [0, *[stop for _, stop, _ in ranges[:-1]]]
    assert ranges[-1][1] == len(texts)
    for start, stop, nbytes in ranges:
        sizes = [len((text or "").encode()) for text in texts[start:stop]]
        assert nbytes == sum(sizes)
        assert sum(sizes[:-1]) < 100
        assert 0 < stop - start <= (most_rows or len(texts))
        assert nbytes >= 100 or most_rows or stop == len(texts)
    assert list(data.pieces.row_ranges(rows.select(range(0)), 100)) == []


def test_processes_give_what_one_gives_and_their_errors_arrive(tmp_path, small_pieces, tokenizer):
    texts = make_text(300).splitlines(True)
    one, several = (pieces_of(texts, tmp_path / str(n), tokenizer, num_proc=n) for n in (1, 3))
    assert [t.to_pylist() for t in one.tables()] == [t.to_pylist() for t in several.tables()]
    assert one.dataset()[:] == several.dataset()[:]

    class Unpicklable(Exception):
        pass

    def fails(error):
        def tokenise(texts):
            raise error

        return tokenise

    rows = datasets.Dataset.from_dict({"text": texts})
    for error, raised in ((data.DataError("in words"), data.DataError), (Unpicklable("in words"), RuntimeError)):
        with pytest.raises(raised, match="in words"):
            data.pieces.tokenise_pieces(rows, fails(error), "", tmp_path / "failed", 2)
    assert list((tmp_path / "failed").iterdir()) == []


def test_a_killed_process_is_told_and_its_finished_pieces_are_kept(tmp_path, cache, monkeypatch, small_pieces):
    source = write_text(tmp_path / "a.txt", make_text(400))
    encode = data.cutting.encode
    parent = os.getpid()

    def killed_later(tokenizer, name, texts):
        if os.getpid() != parent and len(list(cache.glob("*.building/pieces/*.arrow"))) >= 5:
            os.kill(os.getpid(), 9)
        return encode(tokenizer, name, texts)

    monkeypatch.setattr(data.cutting, "encode", killed_later)
    with pytest.raises(data.DataError, match=r"exit code -9.*goes on after what is done"):
        load(source, "builtin", 16, num_proc=2)
    (half,) = cache.glob("*.building")
    assert [entry.name for entry in half.iterdir()] == ["pieces"]
    assert len(list(half.glob("pieces/*"))) >= 5
    monkeypatch.setattr(data.cutting, "encode", encode)
    load(source, "builtin", 16, num_proc=2)
    assert not half.exists()


def test_an_ordinary_failure_leaves_nothing(tmp_path, cache, monkeypatch, small_pieces):
    def fails(tokenizer, name, texts):
        if len(list(cache.glob("*.building/pieces/*.arrow"))) >= 5:
            raise data.DataError("no entry for it")
        return encode(tokenizer, name, texts)

    encode = data.cutting.encode
    monkeypatch.setattr(data.cutting, "encode", fails)
    source = write_text(tmp_path / "a.txt", make_text(400))
    for num_proc in (1, 2):
        with pytest.raises(data.DataError, match="no entry for it"):
            load(source, "builtin", 16, num_proc=num_proc)
        assert not list(cache.glob("*.building"))


def test_a_tail_without_a_block_is_not_tokenised_again_and_again(tmp_path, monkeypatch, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    texts = []
    encode = data.cutting.encode
    monkeypatch.setattr(data.cutting, "encode", lambda t, n, texts_: texts.extend(texts_) or encode(t, n, texts_))
    text = make_text(200) + "\n" * 30
    loaded = load(write_text(tmp_path / "a.txt", text), str(tmp_path / "tokenizer"), 64)
    assert len(loaded.validation) >= 1
    assert sum(map(len, texts)) < 1.5 * len(text)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_tokens_are_cut_and_fingerprinted_a_few_megabytes_at_a_time(tmp_path):
    import hashlib
    import tracemalloc

    import numpy as np
    import pyarrow as pa

    rng = np.random.default_rng(0)
    files, ids = [], []
    for number in range(8):
        files.append((tmp_path / f"{number}.arrow", 40_000))
        schema = pa.schema([("input_ids", pa.list_(pa.int32()))])
        with pa.ipc.new_stream(str(files[-1][0]), schema) as stream:
            for _ in range(4):  # 4 MB each
                ids.append(rng.integers(0, 300, size=1_000_000, dtype=np.int32))
                rows = pa.ListArray.from_arrays(pa.array(np.arange(0, 1_000_001, 100, dtype=np.int32)), ids[-1])
                stream.write_batch(pa.record_batch([rows], schema=schema))
    data.arrow.row_lengths({"input_ids": rows})  # imports what it needs
    tokens = data.arrow.Tokens(files)
    allocated = pa.total_allocated_bytes()
    most = 0

    class Watched(data.arrow.Tokens):
        def tables(self):
            nonlocal most
            for table in super().tables():
                most = max(most, pa.total_allocated_bytes() - allocated)
                yield table

    tracemalloc.start()
    try:
        blocks, count = data.cutting.cut_blocks(Watched(files), 1024, 300, None, tmp_path / "train")
        fingerprint = data.cache._fingerprint(tmp_path / "train", 1024, "vocabulary")
        assert data.arrow.count_tokens(Watched(files)) == count == 32_000_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert blocks == 32_000_000 // 1024
    assert most < 16 << 20, "of 128 MB"
    assert peak < 32 << 20, "of 128 MB"
    whole = np.concatenate(ids)
    digest = hashlib.sha256(b"1024 vocabulary" + whole[: blocks * 1024].tobytes())
    assert fingerprint == digest.hexdigest()
    middle = tokens.select(39_999, 80_001)
    assert len(middle) == 40_002
    assert sum(len(table) for table in middle.tables()) == 40_002
    joined = np.concatenate([data.arrow.flat_ids(table) for table in middle.tables()])
    assert np.array_equal(joined, whole[3_999_900:8_000_100])


def test_blocks_in_several_files_are_opened_as_one(tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.setattr(data.arrow, "BYTES_PER_FILE", 100)
    blocks = [np.arange(16 * n, 16 * (n + 3), dtype="uint16") for n in range(0, 30, 3)]
    assert data.arrow.write_blocks(iter(blocks), 0, 16, "uint16", tmp_path / "train") == 30
    assert len(list((tmp_path / "train").glob("data-000??-of-00005.arrow"))) == 5
    opened = datasets.load_from_disk(str(tmp_path / "train"))
    assert opened["input_ids"][:] == np.arange(480).reshape(30, 16).tolist()
    data.arrow.write_blocks(iter(blocks), 10**9, 16, "uint16", tmp_path / "large")
    assert len(list((tmp_path / "large").glob("*.arrow"))) == 1, "no more files than can be open at once"
    again = tmp_path / "again"
    opened.save_to_disk(str(again))
    assert datasets.load_from_disk(str(again)).features == opened.features


def test_a_batch_for_the_tokenizer_is_bounded_where_rows_differ_in_size(tmp_path, monkeypatch):
    monkeypatch.setattr(data.arrow, "BYTES_PER_BATCH", 1000)
    monkeypatch.setattr(data.arrow, "ROWS_PER_BATCH", 100)
    sizes = []

    def tokenise(texts):
        sizes.append((len(texts), sum(map(len, texts))))
        return [[1] for _ in texts]

    rows = datasets.Dataset.from_dict({"text": ["x"] * 1000 + ["y" * 900] * 50})
    tokens = data.pieces.tokenise_pieces(rows, tokenise, "", tmp_path / "pieces", 1)
    assert len(tokens) == 1050
    assert max(count for count, _ in sizes) <= 100
    assert max(size for _, size in sizes) <= 1000 + 900


@pytest.mark.slow
def test_more_text_takes_no_more_memory(tmp_path):
    """The private memory of the process and the largest of its children, at 32 and at 128 MB of text."""
    code = """
    import resource, threading
    import datasets
    megabytes, folder = int(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir()
    datasets.disable_progress_bars()
    (folder / "a.txt").write_text("some words of a line, which is one of many\\n" * (megabytes * 1000000 // 43))
    encode = lambda tokenizer, name, texts: [[7] * (len(text) // 4) for text in texts]  # fast, and as many ids
    data.cutting.encode = encode
    most = 0
    def watch():
        global most
        while True:
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            most = max(most, int(status["RssAnon"].split()[0]))
            time.sleep(0.02)
    threading.Thread(target=watch, daemon=True).start()
    data.load(str(folder / "a.txt"), "builtin", 1024, cache_dir=folder)
    print(most // 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
    """
    outputs = []
    for megabytes in (32, 128):
        process = python(code, megabytes, tmp_path / str(megabytes))
        out, err = output_of(process, 300)
        assert process.returncode == 0, err
        outputs.append(tuple(map(int, out.split())))
    (small, _), (large, child) = outputs
    assert large - small < 48, outputs
    assert child < 1000, outputs


# --- progress ---------------------------------------------------------------------------------------------------------


class Clock:
    """Seconds that pass as told."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(data.progress.time, "monotonic", lambda: self.now)


def test_a_log_has_a_line_now_and_then_with_speed_and_time_left(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    progress = data.progress.Progress("tokenising", 200_000_000)
    for seconds, size, is_new in ((1, 40_000_000, False), (8, 20_000_000, True), (11, 20_000_000, True)):
        clock.now += seconds
        progress.add(size, is_new)
    clock.now += 9
    progress.add(20_000_000)
    clock.now += 7171
    progress.add(20_000_000)
    progress.close()
    assert capsys.readouterr().err.splitlines() == [
        "tokenising: 80 of 200 MB, 40 of them by an earlier run, 2.00 MB/s, 1 min left",
        "tokenising: 120 of 200 MB, 40 of them by an earlier run, 0.01 MB/s, 2 h 00 min left",
    ]


def test_quick_work_says_nothing_and_a_terminal_gets_a_bar(tmp_path, monkeypatch, capsys, small_pieces):
    load(write_text(tmp_path / "a.txt", make_text(100)), "builtin", 16)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(data.progress.sys.stderr, "isatty", lambda: True, raising=False)
    progress = data.progress.Progress("tokenising", 100)
    progress.add(100)
    progress.close()
    err = capsys.readouterr().err
    assert "Tokenising: 100%" in err
    assert "tokenising: " not in err


def test_every_piece_counts_for_the_progress(tmp_path, monkeypatch, capsys, small_pieces):
    monkeypatch.setattr(data.progress, "SECONDS_BETWEEN_LINES", 0)
    text = make_text(200)
    load(write_text(tmp_path / "a.txt", text), "builtin", 16)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 5
    assert all(line.startswith("tokenising: 0 of 0 MB, ") and line.endswith(" left") for line in lines)


# --- the benchmark ----------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(monkeypatch):
    """`benchmarks/data.py`."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("data")


def test_both_ways_of_the_benchmark_prepare_the_same_text(benchmark, tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    source = write_text(tmp_path / "a.txt", make_text(2000))
    asked = (source, str(tmp_path / "tokenizer"), 16, 1)
    ours, theirs = (way(*asked, tmp_path / name) for name, way in benchmark.preparing.WAYS.items())
    assert 0.9 < ours / theirs < 1, "5 % of the rows are held out of ours, the rest of each 1,000 dropped of theirs"


def test_ratios_of_the_benchmark_are_of_the_same_round(benchmark):
    runs = {"seconds": 4.0, "start_seconds": 0.1, "bytes": 100}
    found = {"ours": [runs, runs | {"seconds": 8.0}], "run_clm": [runs | {"seconds": 8.0, "bytes": 400}] * 2}
    row = benchmark.preparing._row(12_000_000, 2, found)
    assert (row["ours_megabytes_per_second"], row["run_clm_megabytes_per_second"]) == (2, 1.5)
    assert (row["speed"], row["memory"], row["start"]) == (1.5, 0.25, 1)
    unknown = {way: [run | {"bytes": 0} for run in each] for way, each in found.items()}
    assert benchmark.preparing._row(12_000_000, 2, unknown)["memory"] is None


@pytest.mark.slow
def test_the_benchmark_of_sizes(benchmark, tmp_path):
    arguments = ["--megabytes", "1", "--block_size", "16", "--batch_size", "4", "--batches", "3", "--processes", "1"]
    arguments += ["--rounds", "1", "--sizes", "1", "2", "--output_dir", str(tmp_path)]
    assert benchmark.main(arguments) == 0
    rows = json.loads((tmp_path / "data.json").read_text())["tables"]["Preparing"]
    assert [round(row["megabytes"]) for row in rows] == [1, 2]
    for row in rows:
        assert row["ours_peak_bytes"] > 50_000_000
        assert min(row["speed"], row["memory"], row["start"]) > 0
    assert "--sizes x: a whole number from 1" in told(benchmark, ["--sizes", "x"])


def told(benchmark, arguments):
    with pytest.raises(benchmark.command_line.UsageError) as caught:
        benchmark.parse(arguments)
    return str(caught.value)
