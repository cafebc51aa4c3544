"""SIGKILL at random moments, over variants, ranks and ZeRO stages: `python tests/soak.py --kills 300`.

A run is killed anywhere between its start and its end, goes on, and is killed again, until it ends by itself. Then its
metrics and its exported weights must equal, bit for bit, those of the same run that was never killed. Processes begin
with the libraries imported, so that kills fall into the run itself.
"""

import argparse
import datetime
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import conftest
from conftest import finish, launch, metrics, zero

from gpt2_variants.records import device_name, git_commit, versions

VARIANTS = ("duo_predict", "diffusion", "gpt2", "parallel_concat", "rotating_head_norm")
MOMENTS = ("before a step", "between steps", "checkpoint", "export", "closing")


class Broken(AssertionError):
    """A run was not what it would have been, or did not end."""


class Soak:
    """Runs of one kind each: (variant, ranks, ZeRO stage) -> what the kills came to.

    Args:
        work: the folder of all runs.
        rng: draws when to kill, and whom.
        most: how many kills.
    """

    def __init__(self, work: Path, rng: random.Random, most: int):
        self.work, self.rng, self.most = work, rng, most
        self.counts: dict[tuple[str, int, int], Counter[str]] = {}
        self.text = work / "text.txt"
        words = (f"The {rng.choice('abcdefg') * 3} sees the {rng.choice('hijk') * 4}.\n" for _ in range(4000))
        self.text.write_text("".join(words))

    @property
    def kills(self) -> int:
        """All of them so far."""
        return sum(count["kills"] for count in self.counts.values())

    def run(self) -> None:
        """Kill until there were enough. Raises Broken."""
        kinds = list(itertools.product(VARIANTS, (1, 2), (1, 2, 3)))
        self.rng.shuffle(kinds)
        for kind in itertools.cycle(kinds):
            if self.kills >= self.most:
                return
            self._one_run(kind)
            print(f"{self.kills} kills: {kind}, {dict(self.counts[kind])}", file=sys.stderr, flush=True)

    def _one_run(self, kind: tuple[str, int, int]) -> None:
        ranks, count = kind[1], self.counts.setdefault(kind, Counter())
        whole, took = self._whole(kind)  # without plot and report, with which a fifth of the starts ends
        folder = self.work / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        command = [*self._options(kind), "--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
        for _ in range(100):
            closing = self.rng.random() < 0.2
            processes = launch(ranks, command, closing=closing)
            until = time.monotonic() + took * self.rng.uniform(0, 1.5 if closing else 0.7)
            if (folder / "model").is_dir():  # it has been killed after its export: what is left is a moment
                until = math.inf
            while time.monotonic() < until and any(p.poll() is None for p in processes):
                time.sleep(0.002)
            if all(p.poll() is not None for p in processes):
                break
            if any(p.poll() for p in processes):
                raise Broken(f"{kind}: failed by itself: {finish(processes)}")
            # the whole machine, or one rank: then the launcher ends the others
            for p in self.rng.sample(processes, self.rng.choice((1, ranks))):
                p.send_signal(signal.SIGKILL)
            moment = moment_of(folder)
            self._end(processes)
            count["kills"] += 1
            count[moment] += 1
        else:
            raise Broken(f"{kind}: not at its end after 100 starts")
        results = finish(processes)
        if [code for code, _ in results] != [0] * ranks:
            raise Broken(f"{kind}: ended by itself with {results}")
        if metrics(folder) != metrics(whole) or weights(folder) != weights(whole):
            raise Broken(f"{kind}: {folder} is not what {whole} is")
        count["runs"] += 1

    def _end(self, processes: list) -> None:
        """End what ranks are left, as DeepSpeed's launcher does: by SIGTERM, and by SIGKILL where that does not."""
        time.sleep(self.rng.uniform(0, 1))  # it looks once a second
        for p in processes:
            p.terminate()
        until = time.monotonic() + 3
        while time.monotonic() < until and any(p.poll() is None for p in processes):
            time.sleep(0.01)
        for p in processes:
            p.kill()
        finish(processes)

    def _whole(self, kind: tuple[str, int, int]) -> tuple[Path, float]:
        """The folder of the run of this kind that was never killed, and the seconds that it took."""
        folder = self.work / "-".join(map(str, kind))
        began = time.monotonic()
        if not folder.exists():
            results = finish(launch(kind[1], [*self._options(kind), "--output_dir", str(folder)]))
            if [code for code, _ in results] != [0] * kind[1]:
                raise Broken(f"{kind}: {results}")
            (folder / "took").write_text(str(time.monotonic() - began))
        return folder, float((folder / "took").read_text())

    def _options(self, kind: tuple[str, int, int]) -> list[str]:
        variant, _, stage = kind
        config = json.loads((conftest.ROOT / "ds_configs" / "zero1.json").read_text())
        config |= {"train_batch_size": "auto", "zero_optimization": zero(stage)}
        config["optimizer"]["params"] |= {"lr": "auto"}
        file = self.work / f"stage-{stage}.json"
        file.write_text(json.dumps(config))
        return [
            *("--variant", variant, "--preset", "demo", "--dataset", str(self.text), "--report_to", "none"),
            *("--deepspeed_config", str(file), "--train_batch_size", "8", "--block_size", "32", "--max_steps", "120"),
            *("--logging_steps", "1", "--eval_steps", "30", "--save_steps", "3", "--save_total_limit", "2"),
            *("--model_args", "n_layer=2", "n_embd=32", "n_head=2", "n_positions=32"),
            *("resid_pdrop=0.1", "embd_pdrop=0.1", "attn_pdrop=0.1"),
        ]


def moment_of(folder: Path) -> str:
    """What a run was doing, by what it left."""
    if any(folder.glob(".model.*")):
        return "export"
    if any((folder / "checkpoints").glob(".tmp*")):
        return "checkpoint"
    if (folder / "model").is_dir():
        return "closing"
    try:
        started = "seconds_to_first_step" in json.loads((folder / "run.json").read_text())["starts"][-1]
    except FileNotFoundError:
        started = False
    return "between steps" if started else "before a step"


def weights(folder: Path) -> str:
    """The digest of a run's exported weights."""
    return hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def versions_in_words() -> str:
    """Return Python's version and those of the packages that a run hangs on."""
    return ", ".join(f"{name} {version}" for name, version in versions().items() if name != "gpt2_variants")


def table(soak: Soak, seed: int) -> str:
    """The counts, as a page in Markdown."""
    heads = ("variant", "ranks", "ZeRO", "runs", "kills", *MOMENTS)
    rows = [
        (f"`{kind[0]}`", *kind[1:], *(count[name] for name in ("runs", "kills", *MOMENTS)))
        for kind, count in sorted(soak.counts.items())
    ]
    rows.append(("all", "", "", *(sum(row[i] for row in rows) for i in range(3, len(heads)))))
    lines = [
        "# Runs that are killed",
        "",
        f"`python tests/soak.py --kills {soak.most} --seed {seed}`, {datetime.date.today()}, on {device_name()}:",
        f"{versions_in_words()}, commit {git_commit()}.",
        "SIGKILL goes to one rank or to all at a random moment, and to those that are left what DeepSpeed's",
        "launcher sends them then: SIGTERM, and SIGKILL after a while. The same command follows with",
        "`--resume_from_checkpoint auto`, until the run has ended by itself. The metrics and the exported weights",
        "of every run equalled, bit for bit, those of the same run that was never killed. Runs are in bf16 with",
        "dropout, and save a checkpoint after every third of 120 steps. The last columns tell where the kills fell:",
        "before the first step, between steps, while a checkpoint was written or an old one deleted, during the",
        "export, and after it.",
        "",
        f"| {' | '.join(heads)} |",
        f"|{' --- |' * len(heads)}",
        *(f"| {' | '.join(map(str, row))} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main(words: list[str] | None = None) -> None:
    """Run the soak, and write its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="where the table goes; else to stdout")
    arguments = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as work:
        os.environ["GPT2_VARIANTS_CACHE"] = str(Path(work) / "cache")
        soak = Soak(Path(work), random.Random(arguments.seed), arguments.kills)
        soak.run()
    page = table(soak, arguments.seed)
    if arguments.output:
        arguments.output.write_text(page)
    else:
        print(page)


if __name__ == "__main__":
    main()
