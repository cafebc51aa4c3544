"""Whole runs of train_ds.py: whether they repeat and go on bit for bit, are exported and generate; and curves.

Every run is a process of its own. Where DeepSpeed is not installed they are left out, and curves are trained by the
plain loop; where `datasets` is missing there are no data either.
"""

import functools
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gpu_items import Day, Item, Row, Skipped
from results_page import ROOT
from training_case import Trainer

DETERMINISTIC = "--deterministic"
CURVES = ("gpt2", "duo_predict")


def needs(*packages: str) -> None:
    """Raise `Skipped` where one of the packages is not installed."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise Skipped(f"not installed: {', '.join(missing)}")


def python(*words: str | Path, seconds: int = 240) -> str:
    """Run Python in the checkout's folder; what it prints.

    Raises:
        RuntimeError: its exit code is not 0; with the end of what it said.
    """
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-1:]
        raise RuntimeError(f"{' '.join(map(str, words[:3]))} ... ended with exit code {done.returncode}: {said}")
    return done.stdout


def train(day: Day, variant: str, folder: Path, *more: str | Path) -> Path:
    """Return a short run; its folder."""
    python("train_ds.py", "--variant", variant, *day.scale.run, "--output_dir", folder, *more)
    return folder


def losses(folder: Path) -> dict[int, float]:
    """Step -> training loss of a run, as its metrics.jsonl has it."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the exported weights of a run."""
    return load_file(folder / "model" / "model.safetensors")


def equal_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Return whether the same names have the same values, bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def compared(what: str, first: Path, second: Path) -> Row:
    """Return whether two runs have the same losses and the same weights at their end, bit for bit."""
    ours, theirs = losses(first), losses(second)
    both = sorted(ours.keys() & theirs.keys())
    equal = equal_weights(weights(first), weights(second))
    steps = [step for step in both if ours[step] == theirs[step]]
    return {
        "what": what,
        "steps": len(both),
        "equal_losses": len(steps),
        "first_difference": min(set(both) - set(steps), default=None),
        "equal_weights": equal,
        "ok": bool(both) and len(steps) == len(both) and equal,
    }


def repeated_and_resumed(variant: str, day: Day) -> list[Row]:
    """A run again; gone on with from its step 4; and what went on, gone on with from its step 8: each as the first."""
    needs("deepspeed", "datasets")
    with tempfile.TemporaryDirectory(prefix="on-gpu-") as place:
        first, again, once, twice = (Path(place, name) for name in ("first", "again", "once", "twice"))
        train(day, variant, first, DETERMINISTIC)
        train(day, variant, again, DETERMINISTIC)
        train(day, variant, once, DETERMINISTIC, "--resume_from_checkpoint", first / "checkpoints" / "step-00000004")
        train(day, variant, twice, DETERMINISTIC, "--resume_from_checkpoint", once / "checkpoints" / "step-00000008")
        return [
            compared(f"{variant}, {DETERMINISTIC}, again", again, first),
            compared(f"{variant}, {DETERMINISTIC}, gone on with at step 4", once, first),
            compared(f"{variant}, {DETERMINISTIC}, and again at step 8", twice, first),
        ]


def exported_and_generating(variant: str, day: Day) -> list[Row]:
    """A run's last checkpoint, exported, has the weights that the run exported itself; and generates a text."""
    needs("deepspeed", "datasets")
    with tempfile.TemporaryDirectory(prefix="on-gpu-") as place:
        run, out = train(day, variant, Path(place, "run")), Path(place, "exported")
        python("-m", "gpt2_variants", "export", "--checkpoint", run, "--output_dir", out)
        equal = equal_weights(weights(run), load_file(out / "model.safetensors"))
        asked = ("--prompt", "The", "--max_new_tokens", "8")
        text = python("-m", "gpt2_variants", "generate", "--model", out, *asked).strip()
    row = {"what": f"{variant}, exported, generating", "equal_weights": equal, "text": " ".join(text.split())}
    return [{**row, "ok": equal and text.startswith("The") and len(text) > len("The")}]


def curve(variant: str, day: Day) -> list[Row]:
    """Return the training losses of a run, by train_ds.py or, without DeepSpeed, by the plain loop."""
    needs("datasets")
    options: list[str] = [*day.scale.curve, "--report_to", "none"]
    for name, given in (("--dataset", day.dataset), ("--tokenizer", day.tokenizer)):
        options += [name, given or "builtin"]
    if importlib.util.find_spec("deepspeed") is None:
        return plain_curve(variant, options)
    with tempfile.TemporaryDirectory(prefix="on-gpu-") as place:
        python("train_ds.py", "--variant", variant, *options, "--output_dir", place, seconds=500)
        lines = list(map(json.loads, Path(place, "metrics.jsonl").read_text(encoding="utf-8").splitlines()))
        evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
    trained = [(line["step"], line["loss"], line.get("tokens_per_second")) for line in lines if "loss" in line]
    return curve_rows(variant, "train_ds.py", trained, evaluated[-1] if evaluated else None)


def plain_curve(variant: str, options: Sequence[str]) -> list[Row]:
    """Return what `curve` does, but by a plain loop over the same batches, without DeepSpeed."""
    from gpt2_variants.config.command_line import parse
    from gpt2_variants.data import GlobalBatchSampler, data_loader, load
    from training_case import Case

    run = parse(["--variant", variant, *options, "--dry_run"])
    data = load(run.dataset, run.tokenizer, run.block_size)
    case = Case(variant, run, data.vocab_size, "bfloat16", loop="plain")
    trainer, plan = Trainer(case), case.plan
    sampler = GlobalBatchSampler(
        *(len(data.train), plan.train_batch_size, plan.per_device_train_batch_size),
        *(0, 1, plan.seed),
        num_steps=plan.total_steps,
    )
    batches = iter(data_loader(data.train, sampler))
    found: list[tuple[int, float, None]] = []
    for step in range(plan.total_steps):
        micro = [next(batches)["input_ids"] for _ in range(plan.gradient_accumulation_steps)]
        loss = trainer.step([ids.to(trainer.device or "cpu") for ids in micro])
        if (step + 1) % plan.logging_steps == 0:
            found.append((step + 1, float(loss), None))
    return curve_rows(variant, "plain loop", found, None)


def curve_rows(variant: str, how: str, trained: Sequence[tuple[int, float, Any]], eval_loss: float | None) -> list[Row]:
    """Return a row per logged step, the last with the validation loss. `ok`: the loss fell, and is finite."""
    rows = [
        {"what": variant, "how": how, "step": step, "loss": loss, "tokens_per_second": speed}
        for step, loss, speed in trained
    ]
    if not rows:
        raise RuntimeError(f"{variant}: no losses were recorded")
    rows[-1] |= {"eval_loss": eval_loss, "ok": rows[-1]["loss"] < rows[0]["loss"]}
    return rows


def correctness_items(day: Day) -> list[Item]:
    """Return the items that ask whether runs are right."""
    return [
        *(Item(f"{n}, repeated", functools.partial(repeated_and_resumed, n), 120, 400) for n in CURVES),
        *(Item(f"{n}, exported", functools.partial(exported_and_generating, n), 60) for n in CURVES),
    ]


def curve_items(day: Day) -> list[Item]:
    """Return the items that train a curve each."""
    return [Item(name, functools.partial(curve, name), 200, 520) for name in CURVES]
