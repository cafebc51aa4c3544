"""What a run says of itself at its end: its figures, its curves and a sample."""

import importlib.util
import math
import os
import shlex
from pathlib import Path
from typing import Any

from ..config.options import Options
from ..evaluation import describe
from ..faults import RunError, UsageError
from ..reasons import disk_fault
from .page import write
from .runs import read_run
from .tables import number

COLOURS = ("#c55a11", "#548235", "#7030a0")  # of the streams beside the next-token one
DEMO_PROMPT = "The following statement"  # the built-in corpus is Python's language reference


def summary(folder: Path) -> str:
    """Return the run's figures in a few lines.

    Raises:
        UsageError: `folder` holds no run, or one that cannot be read.
    """
    run = read_run(folder)
    parameters = "-" if run.num_parameters is None else f"{run.num_parameters:,}"
    lines = [f"{run.variant}, {parameters} parameters, {run.status}: {folder}"]
    lines += [text for text in (run.facts.get("data"), run.facts.get("reason")) if text]
    lines += [run.damage] if run.damage else []
    if run.training:
        train = run.training[-1]
        lines.append(
            f"training    loss {train['loss']:.4f} at step {train['step']}, {number(train.get('tokens'), ',')} tokens "
            f"in {number(train.get('elapsed_seconds'), '.0f')} s, "
            f"{number(train.get('tokens_per_second'), ',.0f')} tokens/s"
        )
    if run.evaluations:
        final = run.evaluations[-1]
        next_token, *further = describe(final, run.streams)
        lines.append(f"validation  {next_token} at step {final['step']}")
        if unigram := run.unigram_perplexity:
            part = final["eval_perplexity"] / unigram
            lines.append(
                f"            unigram perplexity of the same text {unigram:.2f}; the model's is {part:.3f} of it"
            )
        lines += further
    return "\n".join(lines)


def plot(folder: Path) -> Path:
    """Draw loss and perplexity against steps as `curves.png` in the run's folder. Needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    run = read_run(folder)
    evaluations = run.evaluations
    fig = Figure(figsize=(11, 4), layout="constrained")
    left, right = fig.subplots(1, 2)
    steps = [r["step"] for r in run.training]
    of_training: dict[str, Any] = {"color": "#8aa9c9", "linewidth": 1, "marker": "." if len(steps) == 1 else None}
    left.plot(steps, [r["loss"] for r in run.training], label="training", **of_training)
    steps = [r["step"] for r in evaluations]
    left.plot(steps, [r["eval_loss"] for r in evaluations], label="validation", color="#1f4e79", marker="o")
    right.plot(steps, [r["eval_perplexity"] for r in evaluations], label="next token", color="#1f4e79", marker="o")
    for n, stream in enumerate(run.streams):
        of_stream: dict[str, Any] = {"color": COLOURS[n % len(COLOURS)], "marker": "s"}
        losses, perplexities = (
            [r.get(f"eval_{stream.name}_{figure}", math.nan) for r in evaluations] for figure in ("loss", "perplexity")
        )
        left.plot(steps, losses, label=f"validation, {stream.name}", **of_stream)
        right.plot(steps, perplexities, label=stream.title.replace("$", r"\$"), **of_stream)
    if run.unigram_perplexity:
        right.axhline(run.unigram_perplexity, color="gray", linestyle=":", label="unigram model")
    left.set(xlabel="optimizer steps", ylabel="loss, nats a token", title=f"{run.variant}: loss")
    right.set(xlabel="optimizer steps", ylabel="perplexity", yscale="log", title="validation perplexity")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    lowest, highest = right.get_ylim()
    few_decades = highest < 10 * lowest
    right.yaxis.set_major_locator(MaxNLocator(nbins=6) if few_decades else LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_minor_locator(NullLocator())
    right.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 100 else f"{value:g}")
    path, aside = folder / "curves.png", folder / ".curves.png.tmp"
    try:
        fig.savefig(aside, dpi=120, format="png")
        os.replace(aside, path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    return path


def sample(model_folder: Path, prompt: str) -> str:
    """Return a continuation of `prompt`, sampled from an exported model, with the prompt. Raises `UsageError`."""
    from ..inference import SavedModel

    saved = SavedModel(model_folder)
    return saved.decode(saved.generate(saved.encode(prompt))[0])


def show(run: Options) -> None:
    """Print what a finished `run` came to, with its plot and its report; the demo ends with a sample too."""
    folder = Path(run.output_dir)
    command = f"python -m gpt2_variants report {shlex.quote(str(folder))}"
    print(summary(folder))
    if importlib.util.find_spec("matplotlib"):
        try:
            print(f"plot        {plot(folder)}")
            print(f"report      {write([folder]).page}")
        except (OSError, RunError, UsageError) as err:  # the run is finished all the same
            print(f"report      none: {disk_fault(err) or err}; then {command}")
    else:
        print(f"plot        none: pip install matplotlib, then {command}")
    print(f"model       {folder / 'model'}")
    if run.preset == "demo":
        try:
            print(f"sample      {sample(folder / 'model', DEMO_PROMPT)!r}")
        except UsageError as err:  # of a tokenizer that cannot encode the prompt; the run is finished all the same
            print(f"sample      none: {'; '.join(err.lines)}")
    print(f"compare     {command} OTHER_RUN ...")
    print(f"try         python -m gpt2_variants generate --model {folder / 'model'} --prompt {DEMO_PROMPT!r}")
