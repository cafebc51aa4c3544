"""What a run says of itself when it is over: figures, a plot, a sample."""

import importlib.util
from pathlib import Path
from typing import Any

from .evaluation import describe
from .metrics import read_metrics
from .run import Run, RunRecord

DEMO_PROMPT = "The following statement"  # the built-in corpus is Python's language reference


def summary(folder: Path) -> str:
    """The run's figures in a few lines.

    Raises:
        FileNotFoundError: `folder` holds no run.
    """
    facts = RunRecord(folder, writes=False).facts
    if not facts:
        raise FileNotFoundError(f"{folder}: holds no run (no run.json)")
    records = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    lines = [f"{facts['variant']}, {facts['num_parameters']:,} parameters, {facts['status']}: {folder}", facts["data"]]
    if reason := facts.get("reason"):
        lines.append(reason)
    if train := _last(records, "loss"):
        lines.append(
            f"training    loss {train['loss']:.4f} at step {train['step']}, {train['tokens']:,} tokens in "
            f"{train['elapsed_seconds']:.0f} s, {train['tokens_per_second']:,.0f} tokens/s"
        )
    if final := _last(records, "eval_loss"):
        next_token, *infill = describe(final)
        lines.append(f"validation  {next_token} at step {final['step']}")
        unigram = facts["unigram_perplexity"]
        part = final["eval_perplexity"] / unigram
        lines.append(f"            unigram perplexity of the same text {unigram:.2f}; the model's is {part:.3f} of it")
        lines += infill
    return "\n".join(lines)


def _last(records: list[dict[str, Any]], key: str) -> dict[str, Any] | None:
    return next((r for r in reversed(records) if key in r), None)


def plot(folder: Path) -> Path:
    """Draw loss and perplexity against steps as `curves.png` in the run's folder. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    facts = RunRecord(folder, writes=False).facts
    records = read_metrics(folder / "metrics.jsonl")
    training = [(r["step"], r["loss"]) for r in records if "loss" in r]
    evaluations = [r for r in records if "eval_loss" in r]
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.plot(*zip(*training), label="training", color="#8aa9c9", linewidth=1)
    steps = [r["step"] for r in evaluations]
    left.plot(steps, [r["eval_loss"] for r in evaluations], label="validation", color="#1f4e79", marker="o")
    right.plot(steps, [r["eval_perplexity"] for r in evaluations], label="next token", color="#1f4e79", marker="o")
    if evaluations and "eval_infill_loss" in evaluations[-1]:
        left.plot(
            steps, [r["eval_infill_loss"] for r in evaluations], label="validation, infill", color="#c55a11", marker="s"
        )
        right.plot(
            steps,
            [r["eval_infill_perplexity"] for r in evaluations],
            label="infill (sees the right neighbour)",
            color="#c55a11",
            marker="s",
        )
    right.axhline(facts["unigram_perplexity"], color="gray", linestyle=":", label="unigram model")
    left.set(xlabel="optimizer steps", ylabel="loss, nats a token", title=f"{facts['variant']}: loss")
    right.set(xlabel="optimizer steps", ylabel="perplexity", yscale="log", title="validation perplexity")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    path = folder / "curves.png"
    fig.savefig(path, dpi=120)
    plt.close(fig)
    return path


def sample(model_folder: Path, prompt: str) -> str:
    """A continuation of `prompt`, sampled from an exported model, with the prompt. Raises `Faults`."""
    from .inference import SavedModel

    saved = SavedModel(model_folder)
    return saved.decode(saved.generate(saved.encode(prompt))[0])


def show(run: Run) -> None:
    """Print what a finished `run` came to, and draw its plot; the demo ends with a sample too."""
    folder = Path(run.output_dir)
    print(summary(folder))
    if importlib.util.find_spec("matplotlib"):
        print(f"plot        {plot(folder)}")
    else:
        print("plot        none: pip install matplotlib, then python -m gpt2_variants report " + str(folder))
    print(f"model       {folder / 'model'}")
    if run.preset == "demo":
        print(f"sample      {sample(folder / 'model', DEMO_PROMPT)!r}")
    print(f"try         python -m gpt2_variants generate --model {folder / 'model'} --prompt {DEMO_PROMPT!r}")
