"""What preparing text costs, by its size: `load` beside the way of Hugging Face's example run_clm.py."""

import itertools
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import command_line
from gpt2_variants.data import load, quiet

MB = 10**6


def write_text(megabytes: int, path: Path) -> int:
    """Write the built-in corpus to `path` over and over, with a word put into each line, until it has `megabytes`.

    Returns the bytes that it became. The words are the corpus's own, drawn from a fixed seed, so that no two rounds of
    the corpus are alike.
    """
    from pydoc_data.topics import topics

    lines = [f"{line}\n" for _, text in sorted(topics.items()) for line in text.splitlines()]
    words = sorted({word for line in lines for word in line.split()})
    rng = random.Random(0)
    size = 0
    with path.open("wb") as file:
        while size < megabytes * MB:
            size += file.write("".join(f"{rng.choice(words)} {line}" for line in lines).encode())
    return size


def prepare_ours(text: str, tokenizer: str, block_size: int, processes: int, cache: Path) -> int:
    """Prepare with `load`; how many training blocks there are."""
    return len(load(text, tokenizer, block_size, cache_dir=cache, num_proc=processes).train)


def prepare_as_run_clm(text: str, tokenizer: str, block_size: int, processes: int, cache: Path) -> int:
    """Prepare as Hugging Face's example run_clm.py does, with `datasets.map` twice; how many blocks there are."""
    import datasets
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(tokenizer)
    options = {"batched": True, "num_proc": processes if processes > 1 else None}

    def tokenise(rows):
        return opened(rows["text"])

    def group(rows):
        joined = {key: list(itertools.chain(*rows[key])) for key in rows}
        whole = len(joined["input_ids"]) // block_size * block_size
        cut = {key: [ids[i : i + block_size] for i in range(0, whole, block_size)] for key, ids in joined.items()}
        return cut | {"labels": cut["input_ids"].copy()}

    with quiet():
        rows = datasets.load_dataset("text", data_files=text, cache_dir=str(cache), keep_linebreaks=True)["train"]
        return len(rows.map(tokenise, remove_columns=["text"], **options).map(group, **options))


WAYS: dict[str, Callable[[str, str, int, int, Path], int]] = {"ours": prepare_ours, "run_clm": prepare_as_run_clm}


def _in_a_new_process(way: str, asked: tuple[Any, ...], sender: Connection) -> None:
    """Send the seconds that a way takes, and those that it takes once more, with all in its cache."""
    import datasets  # noqa: F401  # what every run has imported is not counted
    import transformers  # noqa: F401

    times = [time.perf_counter()]
    for _ in range(2):
        WAYS[way](*asked)
        times.append(time.perf_counter())
    sender.send((times[1] - times[0], times[2] - times[1]))


def _proportional_set(process: int) -> int:
    """Return the bytes that a process and its children hold, what they share counted once; 0 without /proc."""
    total = 0
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total = 1024 * int(line.split()[1])
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it has ended, or this is no Linux
        return total
    return total + sum(_proportional_set(int(child)) for child in children)


def run_way(way: str, *asked: Any) -> dict[str, float]:
    """Prepare in a new process, twice: the seconds of both, and the bytes of the largest resident set."""
    context = multiprocessing.get_context("spawn")  # a fork would share this process's memory
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_a_new_process, args=(way, asked, sender))
    process.start()
    sender.close()
    most = 0
    while not receiver.poll(0.05):
        most = max(most, _proportional_set(process.pid))
    seconds, again = receiver.recv()
    process.join()
    return {"seconds": seconds, "start_seconds": again, "bytes": most}


def measure(
    sizes: Sequence[int], tokenizer: Path, folder: Path, *, block_size: int, processes: int, rounds: int
) -> list[dict[str, Any]]:
    """Return a row per size of text in MB: ours and run_clm's way in turn, from nothing and once more."""
    rows = []
    for megabytes in sizes:
        text = folder / f"{megabytes}.txt"
        size = write_text(megabytes, text)
        time.sleep(2.1)  # a file that has just been written may be written again: its stamp would not be trusted
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(rounds):
            for way in WAYS if number % 2 else reversed(WAYS):
                with tempfile.TemporaryDirectory(dir=folder) as cache:
                    run = run_way(way, str(text), str(tokenizer), block_size, processes, Path(cache))
                found[way].append(run)
                command_line.say(
                    f"{size / MB:.0f} MB, {way}: {run['seconds']:.1f} s, {run['bytes'] / MB:.0f} MB of memory; "
                    f"once more {run['start_seconds']:.2f} s"
                )
        text.unlink()
        rows.append(_row(size, processes, found))
    return rows


def _row(size: int, processes: int, found: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    row: dict[str, Any] = {"megabytes": size / MB, "processes": processes}
    for way, runs in found.items():
        seconds, start, most = (statistics.median(run[what] for run in runs) for what in runs[0])
        row |= {
            f"{way}_megabytes_per_second": size / MB / seconds,
            f"{way}_start_seconds": start,
            f"{way}_peak_bytes": most or None,  # 0: /proc tells nothing here
            f"{way}_runs": runs,
        }
    pairs = list(zip(found["ours"], found["run_clm"], strict=True))
    row["speed"] = statistics.median(theirs["seconds"] / ours["seconds"] for ours, theirs in pairs)
    row["start"] = statistics.median(ours["start_seconds"] / theirs["start_seconds"] for ours, theirs in pairs)
    known = [ours["bytes"] / theirs["bytes"] for ours, theirs in pairs if theirs["bytes"]]
    row["memory"] = statistics.median(known) if known else None
    return row
