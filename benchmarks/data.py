"""What the data cost: the share of a training step that reading batches takes, and how fast text is prepared.

    python benchmarks/data.py                                   # with a tokenizer trained on the text itself
    python benchmarks/data.py --tokenizer path/to/gpt2          # with that one
    python benchmarks/data.py --sizes 20 200 2000               # memory and start of a run by the size of the text

Writes data.json and data.md under benchmarks/results/<device>/. The text is Python's own documentation, over and over
with another word put into each line.
Exit codes: 0 measured, 2 faults in what was asked.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import command_line
import preparing
import results_page
from gpt2_variants.data import Data, GlobalBatchSampler, check_source, data_loader, load, quiet, tokenise_rows
from preparing import MB
from results_page import Column, Table


@dataclass(frozen=True)
class Plan:
    """What is to be measured, and where the results go (None: the device's folder)."""

    tokenizer: str
    megabytes: int
    sizes: tuple[int, ...]
    block_size: int
    batch_size: int
    batches: int
    processes: int
    rounds: int
    output_dir: Path | None


def make_parser() -> argparse.ArgumentParser:
    """Return the command line. Numbers stay strings, so that `parse` can tell all faults at once."""
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    add("--tokenizer", default="builtin", help="what train_ds.py takes (default: builtin, 4,000 entries)")
    add("--megabytes", default="20", help="least megabytes of text (default: 20)")
    add("--sizes", nargs="+", metavar="MB", help="megabytes of text to prepare beside run_clm's way (default: none)")
    add("--block_size", default="1024", help="tokens per sequence (default: 1024)")
    add("--batch_size", default="64", help="sequences of a batch (default: 64)")
    add("--batches", default="100", help="batches that are read in a round (default: 100)")
    add(
        "--processes",
        default=str(_cores()),
        help="most processes that tokenise; from 1 by powers of 2 (default: cores)",
    )
    add("--rounds", default="3", help="how often the numbers of processes take turns (default: 3)")
    add("--output_dir", type=Path, help="where the results go (default: benchmarks/results/<device>)")
    return parser


def parse(argv: list[str] | None = None) -> Plan:
    """Return what the command line asks for. Raises `UsageError` with every fault at once."""
    given = make_parser().parse_args(argv)
    checks = command_line.Checks()
    checks.lines += check_source("builtin", given.tokenizer)
    numbers = ("megabytes", "batch_size", "batches", "processes", "rounds")
    sizes = tuple(checks.whole("sizes", size) for size in given.sizes or ())
    plan = Plan(
        tokenizer=given.tokenizer,
        sizes=sizes,
        block_size=checks.whole("block_size", given.block_size, least=2),
        output_dir=checks.folder("output_dir", given.output_dir),
        **{option: checks.whole(option, getattr(given, option)) for option in numbers},
    )
    checks.done()
    return plan


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure_tokenising(plan: Plan, text: Path, folder: Path) -> tuple[list[dict[str, Any]], Data]:
    """Return a row for each number of processes, which take turns; and what `load` made of the text."""
    from datasets import Dataset

    counts = sorted({*itertools.takewhile(lambda n: n < plan.processes, (2**i for i in range(16))), plan.processes})
    seconds: dict[int, dict[str, list[float]]] = {count: {"load": [], "tokenise": []} for count in counts}
    with quiet():
        rows = Dataset.from_text(str(text), cache_dir=str(folder / "rows"), keep_linebreaks=True)
    data = None
    for number in range(plan.rounds):
        for count in counts if number % 2 else reversed(counts):
            cache = folder / f"cache-{number}-{count}"  # new each time, so that nothing is read from it
            start = time.perf_counter()
            data = load(str(text), plan.tokenizer, plan.block_size, cache_dir=cache, num_proc=count)
            seconds[count]["load"].append(time.perf_counter() - start)
            with tempfile.TemporaryDirectory(dir=folder) as scratch, quiet():
                start = time.perf_counter()
                tokenise_rows(rows, data.tokenizer, plan.tokenizer, Path(scratch), count)
                seconds[count]["tokenise"].append(time.perf_counter() - start)
            load_seconds, alone = (taken[-1] for taken in seconds[count].values())
            command_line.say(f"{count} processes: load {load_seconds:.1f} s, tokenising alone {alone:.1f} s")
    return [_tokenising_row(count, seconds, text.stat().st_size) for count in counts], data


def _tokenising_row(count: int, seconds: dict[int, dict[str, list[float]]], size: int) -> dict[str, Any]:
    row: dict[str, Any] = {"processes": count}
    for part, own in seconds[count].items():
        ratios = [one / mine for one, mine in zip(seconds[1][part], own, strict=True)]
        row |= {
            f"{part}_megabytes_per_second": size / MB / statistics.median(own),
            f"{part}_scaling": statistics.median(ratios),
            f"{part}_scaling_min": min(ratios),
            f"{part}_scaling_max": max(ratios),
            f"{part}_seconds": own,
        }
    return row


def measure_loader(plan: Plan, data: Data) -> dict[str, Any]:
    """Return seconds a batch of the loader, in this process and in the order of training, after one for warm-up."""
    sampler = GlobalBatchSampler(
        num_blocks=len(data.train),
        batch_size=plan.batch_size,
        micro_batch_size=plan.batch_size,
        rank=0,
        world_size=1,
        seed=0,
        num_steps=plan.batches + 1,
    )
    seconds = []
    batches = iter(data_loader(data.train, sampler, pin_memory=torch.cuda.is_available()))
    next(batches)
    for _ in range(plan.batches):
        start = time.perf_counter()
        batch = next(batches)
        seconds.append(time.perf_counter() - start)
    tokens = batch["input_ids"].numel()
    return {
        "batch": f"{plan.batch_size} x {plan.block_size}",
        "blocks": len(data.train),
        "tokens": tokens,
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "tokens_per_second": tokens / statistics.median(seconds),
    }


def shares(loader: dict[str, Any], throughput: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return what part of gpt2's step in `throughput.json` the loader would take; nothing where there is none.

    The loader's time is taken by the token: a step may have another number of them.
    """
    return [
        {
            "step": f"gpt2 of size {row['size']} on this device, by throughput.json",
            "tokens_per_step": row["tokens_per_step"],
            "step_seconds": row["seconds_per_step"],
            "loader_seconds": row["tokens_per_step"] / loader["tokens_per_second"],
            "share": row["tokens_per_step"] / loader["tokens_per_second"] / row["seconds_per_step"],
        }
        for row in (throughput or {"tables": {"Variants": []}})["tables"]["Variants"]
        if row["case"] == "gpt2"
    ]


def tables(
    loader: dict[str, Any],
    parts: Sequence[dict[str, Any]],
    tokenising: Sequence[dict[str, Any]],
    by_size: Sequence[dict[str, Any]],
) -> list[Table]:
    """Return the tables of the page."""
    page = [
        Table(
            "Data loader",
            (
                Column("batch", "batch"),
                Column("blocks", "blocks on disk", ",.0f"),
                Column("seconds", "ms a batch", ".3f", 1000),
                Column("seconds_min", "least", ".3f", 1000),
                Column("seconds_max", "most", ".3f", 1000),
                Column("tokens_per_second", "tokens/s", ",.0f"),
            ),
            [loader],
            "From blocks on disk, which the page cache holds, to int64 tensors; the median over the batches. In the "
            "training process itself, between the steps, as training reads them.",
        ),
        Table(
            "Share of a step",
            (
                Column("step", "step"),
                Column("tokens_per_step", "tokens", ",.0f"),
                Column("step_seconds", "ms a step", ",.1f", 1000),
                Column("loader_seconds", "ms of the loader", ".3f", 1000),
                Column("share", "share %", ".3f", 100),
            ),
            parts,
            "The loader's time for the step's tokens over the step's.",
        ),
        Table(
            "Tokenising",
            (
                Column("processes", "processes"),
                Column("tokenise_megabytes_per_second", "tokenising MB/s", ",.2f"),
                Column("tokenise_scaling", "over one process", ".2f"),
                Column("tokenise_scaling_min", "least", ".2f"),
                Column("tokenise_scaling_max", "most", ".2f"),
                Column("load_megabytes_per_second", "all of load() MB/s", ",.2f"),
                Column("load_scaling", "over one process", ".2f"),
                Column("load_scaling_min", "least", ".2f"),
                Column("load_scaling_max", "most", ".2f"),
            ),
            tokenising,
            "MB: 10^6 bytes of text. load() also reads the text, trains a built-in tokenizer, cuts blocks and takes "
            "their fingerprint, in one process. Medians over the rounds; over one process: of the same round.",
        ),
        Table(
            "Preparing",
            (
                Column("megabytes", "MB of text", ",.0f"),
                Column("processes", "processes"),
                Column("ours_megabytes_per_second", "MB/s", ",.2f"),
                Column("run_clm_megabytes_per_second", "run_clm MB/s", ",.2f"),
                Column("speed", "speed over run_clm's", ".2f"),
                Column("ours_peak_bytes", "memory, MB", ",.0f", 1 / MB),
                Column("run_clm_peak_bytes", "run_clm's memory, MB", ",.0f", 1 / MB),
                Column("memory", "of run_clm's", ".2f"),
                Column("ours_start_seconds", "once more, s", ".2f"),
                Column("run_clm_start_seconds", "run_clm once more, s", ".2f"),
                Column("start", "of run_clm's", ".2f"),
            ),
            by_size,
            "load() beside the way of Hugging Face's example run_clm.py (`datasets.map` twice: tokenise, then "
            "group_texts) on the same text, each in a new process and from nothing. Both are given the same tokenizer, "
            "ready. Memory: the most that the process and its children held at a time, libraries and mapped files "
            "included, what they share counted once. Once more: in the same process, with all in the cache; no "
            "imports are counted. Medians over the rounds; ratios are of the same round.",
        ),
    ]
    return [table for table in page if table.rows]


def notes(plan: Plan, size: int, data: Data) -> list[str]:
    """Return how the figures were taken, in words."""
    name = plan.tokenizer if plan.tokenizer == "builtin" else Path(plan.tokenizer).name
    return [
        f"{size / MB:.1f} MB of text: Python's own documentation, over and over with a word of its own put into each "
        f"line, so that the tokenizer meets few new words. Tokenizer {name}, {data.vocab_size:,} entries; blocks of "
        f"{plan.block_size}. Rounds: {plan.rounds}, "
        "each into a new cache folder; the numbers of processes take turns."
    ]


def carry_out(plan: Plan) -> int:
    """Measure and write; the exit code."""
    facts = results_page.facts()
    with tempfile.TemporaryDirectory(prefix="data-") as name:
        text = Path(name, "text.txt")
        size = preparing.write_text(plan.megabytes, text)
        tokenising, data = measure_tokenising(plan, text, Path(name))
        loader = measure_loader(plan, data)
        text.unlink()
        data.tokenizer.save_pretrained(str(Path(name, "tokenizer")))
        by_size = preparing.measure(
            plan.sizes,
            Path(name, "tokenizer"),
            Path(name),
            block_size=plan.block_size,
            processes=plan.processes,
            rounds=plan.rounds,
        )
    command_line.say(f"loader: {1000 * loader['seconds']:.3f} ms a batch of {loader['batch']}")
    folder = plan.output_dir or results_page.folder(facts["device"])
    measured = results_page.folder(facts["device"]) / "throughput.json"
    throughput = json.loads(measured.read_text(encoding="utf-8")) if measured.is_file() else None
    page = tables(loader, shares(loader, throughput), tokenising, by_size)
    results_page.write(folder, "data", "Reading and tokenising data", facts, page, notes(plan, size, data))
    print(folder / "data.md")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Measure and write; the exit code."""
    return command_line.carry_out(parse, argv, carry_out)


if __name__ == "__main__":
    raise SystemExit(main())
