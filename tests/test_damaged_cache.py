"""Prepared data that were damaged are noticed, said and prepared anew; a disk that refuses is named as that."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_to_end
from test_data_scale import pieces_of
from test_tokenizers import saved, words

from gpt2_variants import data
from gpt2_variants.data import DataError, digests, load, pieces
from gpt2_variants.data.names import is_prepared

UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]
can_mount = pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*UNSHARE, "true"], capture_output=True).returncode != 0,
    reason="needs the right to mount in a namespace of its own",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[str, str]:
    """A text and a tokenizer of its words."""
    place = tmp_path_factory.mktemp("source")
    text = "".join(f"one two three w{n % 50}\n" for n in range(400))
    (place / "a.txt").write_text(text)
    vocabulary = {word: n for n, word in enumerate(["one", "two", "three", *(f"w{n}" for n in range(50))])}
    return str(place / "a.txt"), saved(words(vocabulary, eos_token="one"), place / "tokenizer")


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory) -> Path:
    """The cache in which that is prepared."""
    cache = tmp_path_factory.mktemp("prepared")
    load(*source, 8, cache_dir=cache)
    return cache


@pytest.fixture
def cache(prepared, tmp_path) -> Path:
    return shutil.copytree(prepared, tmp_path / "cache")


def folder_in(cache: Path) -> Path:
    (info,) = cache.glob("*/info.json")
    return info.parent


def content(loaded: data.Data) -> tuple:
    return loaded.fingerprint, loaded.train.tokens().tolist(), loaded.validation.tokens().tolist(), loaded.summary


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])  # more than a newline


def flip(file: Path, place: float = 0.5) -> None:
    """Flip a bit, and set the time of the last change back."""
    status, found = file.stat(), bytearray(file.read_bytes())
    found[int(place * (len(found) - 1))] ^= 1
    file.write_bytes(found)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


DAMAGE = {"cut off": cut_off, "emptied": lambda file: file.write_bytes(b""), "deleted": Path.unlink, "flipped": flip}
FILES = (
    *(f"{part}/{name}" for part in ("train", "validation") for name in ("*.arrow", "state.json", "dataset_info.json")),
    *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "info.json"),
)


@pytest.mark.parametrize("name", FILES)
def test_damage_is_noticed_and_the_data_are_prepared_anew(name, source, prepared, cache, capfd):
    expected = content(load(*source, 8, cache_dir=prepared))
    folder = folder_in(cache)
    for kind, damage in DAMAGE.items():
        (file,) = folder.glob(name)
        damage(file)
        capfd.readouterr()
        assert content(load(*source, 8, cache_dir=cache)) == expected, kind
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"{folder}: the prepared data are damaged: {file.relative_to(folder)} ")
        assert line.endswith("; they are prepared anew")
        assert content(load(*source, 8, cache_dir=cache)) == expected
        assert capfd.readouterr().err == "", "once"
    assert sorted(path.suffix for path in cache.iterdir() if path.suffix not in (".verified", ".stamps")) == [
        "",
        ".lock",
    ]


@pytest.mark.parametrize("place", np.linspace(0, 1, 9))
def test_any_bit_of_info_json_counts(place, source, prepared, cache, capfd):
    expected = content(load(*source, 8, cache_dir=prepared))
    flip(folder_in(cache) / "info.json", place)
    loaded = load(*source, 8, cache_dir=cache)
    assert content(loaded) == expected
    # one within the spaces between two entries changes nothing that it says
    assert "damaged: info.json" in capfd.readouterr().err or place == 1


@pytest.mark.parametrize("text", ["null", "[]", "{}", "3", '{"files": {}}', "[" * 100_000])
def test_an_info_json_of_something_else_is_damage(text, source, cache, capfd):
    (folder_in(cache) / "info.json").write_text(text)
    assert is_prepared(*source) is False
    load(*source, 8, cache_dir=cache)
    assert "damaged: info.json" in capfd.readouterr().err


def test_a_file_is_read_once_as_long_as_it_stays_as_it_was(source, cache, monkeypatch):
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    read, original = [], digests.file_digest

    def counted(file):
        read.append(Path(file).name)
        return original(file)

    monkeypatch.setattr(digests, "file_digest", counted)
    load(*source, 8, cache_dir=cache)
    assert "state.json" in read
    assert any(name.endswith(".arrow") for name in read)
    read.clear()
    for _ in range(3):
        load(*source, 8, cache_dir=cache)
    assert not [name for name in read if name != Path(source[0]).name]
    (arrow,) = folder_in(cache).glob("train/*.arrow")
    os.utime(arrow)  # as a copy has another time
    load(*source, 8, cache_dir=cache)
    assert [name for name in read if name.endswith(".arrow")] == [arrow.name]


def as_an_older_version_left_it(folder: Path) -> None:
    info = json.loads((folder / "info.json").read_text())
    (folder / "info.json").write_text(json.dumps({k: v for k, v in info.items() if k not in ("files", "checksum")}))


def test_data_of_an_older_version_are_verified_by_their_fingerprint(source, cache, capfd):
    folder = folder_in(cache)
    before = (folder / "info.json").read_text()
    as_an_older_version_left_it(folder)
    load(*source, 8, cache_dir=cache)
    assert (folder / "info.json").read_text() == before, "the checksums are there now"
    assert capfd.readouterr().err == ""
    for name in ("train/*.arrow", "train/state.json", "tokenizer/tokenizer.json", "validation/*.arrow"):
        for kind in ("cut off", "deleted", *(["flipped"] if name == "train/*.arrow" else [])):
            as_an_older_version_left_it(folder)
            (file,) = folder.glob(name)
            DAMAGE[kind](file)
            load(*source, 8, cache_dir=cache)
            assert "are damaged" in capfd.readouterr().err, (name, kind)
            assert (folder / "info.json").read_text() == before


def test_damaged_data_stay_until_others_are_there(source, cache, monkeypatch):
    """A source that cannot be had at the moment, such as one of the Hub."""
    folder = folder_in(cache)
    flip(next(folder.glob("train/*.arrow")))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def unreachable(*_):
        raise DataError("--dataset x: the Hub cannot be reached")

    monkeypatch.setattr(data.cache, "read_source", unreachable)
    with pytest.raises(DataError, match="cannot be reached"):
        load(*source, 8, cache_dir=cache)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", [None, *DAMAGE])
def test_a_complete_build_that_was_not_moved_is_verified_too(damage, source, prepared, cache):
    expected = content(load(*source, 8, cache_dir=prepared))
    folder = folder_in(cache)
    building = folder.rename(folder.with_name(folder.name + ".building"))
    if damage is not None:
        DAMAGE[damage](next(building.glob("train/*.arrow")))
    assert content(load(*source, 8, cache_dir=cache)) == expected
    assert not building.exists()


@pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
def test_a_damaged_piece_of_a_killed_build_is_not_used(place, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "BYTES_PER_PIECE", 500)
    tokenizer = words({"one": 0, "two": 1, "three": 2})
    texts = ["one two three two one"] * 300
    first = pieces_of(texts, tmp_path / "pieces", tokenizer).dataset()["input_ids"][:]
    files = sorted((tmp_path / "pieces").glob("*.arrow"))
    flip(files[0], place)
    cut_off(files[1])
    assert pieces_of(texts, tmp_path / "pieces", tokenizer).dataset()["input_ids"][:] == first
    assert sorted((tmp_path / "pieces").glob("*.arrow")) == files


REFUSALS = [
    (OSError(errno.ENOSPC, "x", "{cache}/f"), "the disk is full"),
    (OSError(errno.ENOSPC, "x"), "the disk is full"),
    (OSError(errno.EDQUOT, "x", "{cache}/f"), "the disk quota is used up"),
    (OSError(errno.EROFS, "x", "{cache}/f"), "the disk can only be read"),
    (PermissionError(errno.EACCES, "x", "{cache}/f"), "permission was denied"),
    (RuntimeError("IOError: [errno 28] No space left on device"), "the disk is full"),
]


@pytest.mark.parametrize(("error", "said"), REFUSALS)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_a_disk_refuses_is_not_blamed_on_the_data(error, said, wrapped, source, tmp_path, monkeypatch):
    """Also not where a library, or a message of our own, wraps it."""
    cache = tmp_path / "cache"
    if getattr(error, "filename", None):
        error = type(error)(error.errno, "x", error.filename.format(cache=cache))

    def refuse(*_):
        if wrapped:
            raise DataError("--dataset x: cannot be read; give another") from error
        raise error

    monkeypatch.setattr(data.cache, "cut_blocks", refuse)
    with pytest.raises(DataError) as caught:
        load(*source, 8, cache_dir=cache)
    message = str(caught.value)
    assert message.startswith(f"the prepared data cannot be written to {cache}: {said}")
    assert "set GPT2_VARIANTS_CACHE to a folder on another disk" in message
    assert "--dataset" not in message
    assert len(message.splitlines()) == 1


def test_what_is_refused_elsewhere_is_blamed_there(source, tmp_path, monkeypatch):
    raised = []
    monkeypatch.setattr(data.cache, "cut_blocks", lambda *_: (_ for _ in ()).throw(raised[0]))
    raised[:] = [OSError(errno.ENOSPC, "x", "/other/hub/blob")]
    with pytest.raises(DataError, match=r"^/other/hub/blob: cannot be written: the disk is full"):
        load(*source, 8, cache_dir=tmp_path / "cache")
    raised[:] = [PermissionError(errno.EACCES, "x", "/other/text.txt")]
    with pytest.raises(PermissionError):
        load(*source, 8, cache_dir=tmp_path / "cache")


ON_A_DISK = """
import sys
from gpt2_variants import data
try:
    print(len(data.load(sys.argv[1], sys.argv[2], 8).train))
except data.DataError as error:
    print(error)
"""


@can_mount
def test_a_real_disk_that_is_full_or_only_read(source, prepared, tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    env = {**os.environ, "GPT2_VARIANTS_CACHE": str(place / "cache"), "PYTHONPATH": str(ROOT)}

    def on_disk(prepare: str) -> str:
        script = f'mount -t tmpfs -o size=300k none "$1" && {prepare} && exec "$2" -c "$3" "$4" "$5"'
        command = [*UNSHARE, "sh", "-c", script, "-", str(place), sys.executable, ON_A_DISK, *source]
        out = run_to_end(command, env=env, cwd=ROOT)
        assert out.returncode == 0, out.stderr
        return out.stdout.strip()

    read_only = 'mount -o remount,ro "$1"'
    there = f'cp -r {prepared} "$1/cache"'
    damaged = f"truncate -s 100 {place}/cache/*/train/*.arrow"
    full = on_disk('head -c 250k /dev/zero > "$1/filler"')
    assert full.startswith(f"the prepared data cannot be written to {place / 'cache'}: the disk is full"), full
    assert "GPT2_VARIANTS_CACHE" in full
    assert "--dataset" not in full
    nothing = on_disk(read_only)
    assert nothing.startswith(f"the cache of prepared data, {place / 'cache'}: it cannot be written")
    whole = on_disk(f"{there} && {read_only}")
    assert whole == str(len(load(*source, 8, cache_dir=prepared).train))
    broken = on_disk(f"{there} && {damaged} && {read_only}")
    assert broken.startswith(f"the cache of prepared data, {place / 'cache'}: the prepared data in")
    assert "it are damaged (train/" in broken
    assert "set GPT2_VARIANTS_CACHE to a folder that can" in broken
