"""The loss head and duo-predict's attention alone, each against what else computes the same.

    python benchmarks/kernels.py                                        # some minutes on 2 CPU cores
    python benchmarks/kernels.py --rows 2048 --head_rounds 3 --dtypes bfloat16

Writes kernels.json and kernels.md under benchmarks/results/<device>/. Exit codes: 0 all measured, 1 something could not
be (its row says why), 2 faults in what was asked.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import command_line
import duo_attentions
import loss_heads
import results_page
from results_page import Column, Table

MIB = 1024**2
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Plan:
    """What is to be measured, and where the results go (None: the device's folder)."""

    head: loss_heads.Shape
    head_rounds: int
    compile: bool
    attention: list[duo_attentions.Shape]
    dropouts: list[float]
    dtypes: list[torch.dtype]
    rounds: int
    output_dir: Path | None
    step: duo_attentions.StepShape = field(default_factory=duo_attentions.StepShape)


def make_parser() -> argparse.ArgumentParser:
    """Return the command line. Numbers stay strings, so that `parse` can tell all faults at once."""
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    add("--rows", default="8192", help="predictions that the loss head scores (default: 8192)")
    add("--channels", default="1024", help="channels of the loss head's input (default: 1024)")
    add("--vocabulary", default="50304", help="entries of the loss head's vocabulary (default: 50304)")
    add(
        "--head_rounds",
        default="20" if cuda else "1",
        help="how often the loss heads take a step in turn (default: 20 on CUDA, 1 on a CPU: 2 minutes of 2 cores)",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure our loss head by torch.compile too",
    )
    add("--batch", default="1", help="sequences that attend (default: 1)")
    add("--heads", default="16", help="heads of the attention (default: 16)")
    add("--head_size", default="64", help="channels of a head (default: 64)")
    add("--tokens", nargs="+", default=["512", "1024"], metavar="S", help="tokens that attend (default: 512 1024)")
    add(
        "--dropouts",
        nargs="+",
        default=["0", "0.1"],
        metavar="P",
        help="dropout of attention and step (default: 0 0.1)",
    )
    add(
        "--dtypes", nargs="+", default=list(DTYPES), metavar="NAME", help=f"dtypes of all (default: {' '.join(DTYPES)})"
    )
    add("--rounds", default="10" if cuda else "3", help="rounds of attention and step (default: 10 on CUDA, else 3)")
    add("--output_dir", type=Path, help="where the results go (default: benchmarks/results/<device>)")
    return parser


def parse(argv: list[str] | None = None) -> Plan:
    """Return what the command line asks for. Raises `UsageError` with every fault at once."""
    given = make_parser().parse_args(argv)
    checks = command_line.Checks()

    def whole(option: str) -> int:
        return checks.whole(option, getattr(given, option))

    head = loss_heads.Shape(whole("rows"), whole("channels"), checks.whole("vocabulary", given.vocabulary, least=2))
    batch, heads, head_size = whole("batch"), whole("heads"), whole("head_size")
    plan = Plan(
        head=head,
        head_rounds=whole("head_rounds"),
        compile=given.compile,
        attention=[
            duo_attentions.Shape(batch, heads, checks.whole("tokens", text, least=2), head_size)
            for text in given.tokens
        ],
        dropouts=list(dict.fromkeys(checks.probability("dropouts", text) for text in given.dropouts)),
        dtypes=[getattr(torch, name, None) for name in checks.of("dtypes", given.dtypes, DTYPES)],
        rounds=whole("rounds"),
        output_dir=checks.folder("output_dir", given.output_dir),
    )
    checks.done()
    return plan


def tables(
    heads: Sequence[dict[str, Any]], attention: Sequence[dict[str, Any]], steps: Sequence[dict[str, Any]]
) -> list[Table]:
    """Return the tables of the page."""
    memory = (
        "by torch's allocator"
        if torch.cuda.is_available()
        else "growth of the process's resident set (RSS) to its high-water mark during the step"
    )
    head = Table(
        "Loss head",
        (
            Column("alternative", "head"),
            Column("dtype", "dtype"),
            Column("seconds", "ms", ",.1f", 1000),
            Column("seconds_min", "least", ",.1f", 1000),
            Column("seconds_max", "most", ",.1f", 1000),
            Column("relative", "time over plain's", ".3f"),
            Column("relative_min", "least", ".3f"),
            Column("relative_max", "most", ".3f"),
            Column("peak_bytes", "peak MiB", ",.0f", 1 / MIB),
            Column("peak_relative", "peak over plain's", ".3f"),
            Column("loss", "loss", ".4f"),
            Column("loss_error", "error of the loss", ".1e"),
            Column("grad_hidden_error", "error of the input's gradient", ".1e"),
            Column("grad_weight_error", "error of the weight's gradient", ".1e"),
            Column("not_measured", "not measured"),
        ),
        heads,
        "Forward and backward. ms: the median over the rounds, then the least and the most; over plain's: of the same "
        f"round. plain: all logits, the cross-entropy of them in float32. peak: above the inputs, {memory}; each head "
        "has a process of its own. loss: nats a row; its error against float64. Errors of gradients: the norm of the "
        "difference from the plain float32 head's, over that head's.",
    )
    duo = Table(
        "Duo attention",
        (
            Column("way", "way"),
            Column("shape", "shape"),
            Column("dtype", "dtype"),
            Column("dropout", "dropout"),
            Column("forward_seconds", "ms forward", ",.2f", 1000),
            Column("both_seconds", "ms forward and backward", ",.2f", 1000),
            Column("forward_speed", "forward: speed over dense", ".2f"),
            Column("both_speed", "both: speed over dense", ".2f"),
            Column("both_speed_min", "least", ".2f"),
            Column("both_speed_max", "most", ".2f"),
            Column("error", "error of the output", ".1e"),
            Column("grad_error", "error of the gradients", ".1e"),
            Column("not_measured", "not measured"),
        ),
        attention,
        "ours: what the model calls; it takes one of the two ways below it. dense mask: SDPA over the (2S-1)^2 mask. "
        "Medians over the rounds; speed: of the same round, above 1 is faster. Errors: the largest difference from the "
        "dense mask in float64.",
    )
    step = Table(
        "Training step of duo_predict",
        (
            Column("dtype", "dtype"),
            Column("dropout", "dropout"),
            Column("ours_seconds", "ms ours", ",.1f", 1000),
            Column("dense_seconds", "ms dense mask", ",.1f", 1000),
            Column("speed", "speed over the dense mask's", ".2f"),
            Column("speed_min", "least", ".2f"),
            Column("speed_max", "most", ".2f"),
            Column("loss_difference", "difference of the first losses", ".1e"),
        ),
        steps,
        "The same model, loss head and AdamW, in plain PyTorch; the attention alone differs.",
    )
    return [head, duo, step]


def notes(plan: Plan) -> list[str]:
    """Return how the figures were taken, in words."""
    head, step = plan.head, plan.step
    return [
        f"Loss head: {head.rows:,} rows x {head.channels:,} x {head.vocabulary:,}; {plan.head_rounds} round(s) of one "
        f"step, after a warm-up on the first {loss_heads.checked_rows(head):,} rows, on which the errors are measured; "
        "in each round all heads take turns, in processes that live side by side.",
        f"Attention and step: {plan.rounds} rounds after one of warm-up, taking turns in one process, not compiled "
        f"(FlexAttention is). The step: {step.sequences} sequences of {step.tokens} tokens, {step.layers} layers, "
        f"{step.channels} channels, {step.heads} heads, vocabulary {step.vocabulary:,}, leak-free, as it is trained.",
    ]


def carry_out(plan: Plan) -> int:
    """Measure, and write the results; the exit code."""
    facts = results_page.facts()
    heads = loss_heads.measure(plan.head, plan.dtypes, plan.compile, plan.head_rounds, command_line.say)
    attention = duo_attentions.measure(plan.attention, plan.dtypes, plan.dropouts, plan.rounds, command_line.say)
    steps = duo_attentions.measure_steps(plan.step, plan.dtypes, plan.dropouts, plan.rounds, command_line.say)
    folder = plan.output_dir or results_page.folder(facts["device"])
    title = "Loss head and duo-predict's attention"
    results_page.write(folder, "kernels", title, facts, tables(heads, attention, steps), notes(plan))
    print(folder / "kernels.md")
    return 1 if any("failed" in row for row in heads) else 0


def main(argv: list[str] | None = None) -> int:
    """Measure and write; the exit code."""
    return command_line.carry_out(parse, argv, carry_out)


if __name__ == "__main__":
    raise SystemExit(main())
