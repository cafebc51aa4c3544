"""Runs' folders as training leaves them, for the tests of the report."""

import dataclasses
import json
import math

from gpt2_variants import report
from gpt2_variants.models.streams import Stream

DATA = "builtin: topics; blocks of {} tokens; train 9 rows, 900 tokens, 9 blocks; tokenizer builtin, 400 entries"
FLOPS = {"gpt2": 1000.0, "duo_predict": 2000.0}
SKIP = Stream("skip", "Two ahead", "Each token given its past but for the last of it: not comparable.")
PAIRED = {"train_batch_size": 8}  # the data order of a seed is known


def make_run(folder, variant="gpt2", seed=42, losses=None, further=None, tokens_per_step=100, every=10, **facts):
    """A run's folder as training leaves it. Options go by "options", facts by name; "absent" ones are left out.

    Args:
        losses: step -> eval_loss.
        further: a stream beside the next-token one as the run declares it -> its eval loss at every step.
    """
    further = further or {}
    losses = losses or {10: 5.0, 20: 4.0}
    block_size = facts.get("options", {}).get("block_size", 64)
    options = {"variant": variant, "seed": seed, "block_size": block_size, "learning_rate": 0.001, "model_args": {}}
    options |= {"output_dir": str(folder), **facts.pop("options", {})}
    record = {
        "status": "finished",
        "reason": None,
        "variant": variant,
        "options": options,
        "data": DATA.format(block_size),
        "data_fingerprint": f"print of blocks of {block_size}",
        "unigram_perplexity": 800.0,
        "num_parameters": 1234,
        "flops_per_token": FLOPS.get(variant, 1000.0),
        "starts": [{"world_size": 1, "device": "A CPU (2 cores)"}],
        "streams": [dataclasses.asdict(stream) for stream in further],
        **facts,
    }
    lines = []
    last = max(losses)
    for step in sorted({*range(every, last + 1, every), *losses}):
        speed = {"tokens": step * tokens_per_step, "tokens_per_second": 50.0, "peak_memory_bytes": 2**30}
        lines.append({"step": step, "elapsed_seconds": step * 2.0, "loss": 7.5 - step / 100, **speed})
        if step in losses:
            loss = losses[step]
            figures = {"eval_loss": loss, "eval_perplexity": math.exp(loss), "eval_accuracy": loss / 100}
            for stream, value in further.items():
                of_stream = {"loss": value, "perplexity": math.exp(value), "accuracy": value / 100}
                figures |= {f"eval_{stream.name}_{figure}": number for figure, number in of_stream.items()}
            lines.append({"step": step, "elapsed_seconds": step * 2.0, **figures})
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({k: v for k, v in record.items() if v != "absent"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make_seeds(folder, variant, ends, first=1, **facts):
    """Runs of the seeds from `first` on, that end at these losses."""
    options = PAIRED | facts.pop("options", {})
    return [
        make_run(folder / f"{variant}-{n}", variant, n, losses={10: 5.0, 20: end}, options=dict(options), **facts)
        for n, end in enumerate(ends, first)
    ]


def groups_of(*folders):
    return report.make_groups([report.read_run(folder) for folder in folders])


def judged(*folders):
    (verdict,) = report.judge(groups_of(*folders))
    return verdict


def row(text: str, title: str, name: str) -> list[str]:
    """The cells of the row that begins with `name` in the Markdown table `title`."""
    section = text.split(f"## {title}")[1].split("\n## ")[0]
    (line,) = [line for line in section.splitlines() if line.startswith(f"| {name} |")]
    return line.strip("| ").split(" | ")
