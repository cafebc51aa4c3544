"""Speed of inference, variant by variant: reading a prompt (prefill), and decoding token by token with the cache.

    python benchmarks/decode.py                                  # GPT-2 Medium on a CUDA device, else nano
    python benchmarks/decode.py --size gpt2 --variants parallel rotating_head --dtype bfloat16

Writes decode.json and decode.md under benchmarks/results/<device>/. Exit codes: 0 measured, 2 faults in what was asked.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import command_line
import results_page
from gpt2_variants.models.modeling_base import CACHE_NAME
from gpt2_variants.registry import GPT2_VOCABULARY, SIZES, VARIANTS
from gpt2_variants.variant_code import find
from results_page import Column, Table

REFERENCE = "gpt2"
NANO_VOCABULARY = 4_000  # of the tokenizer that the demo trains
NUMBERS = {"prompt_length": 128, "new_tokens": 32, "rounds": 7}


@dataclass(frozen=True)
class Plan:
    """What is to be measured, in tokens, sequences and rounds; `output_dir` None: the device's folder."""

    variants: list[str]
    size: str
    dtype: torch.dtype
    batch_sizes: list[int]
    prompt_length: int
    new_tokens: int
    rounds: int
    output_dir: Path | None


@dataclass(frozen=True)
class Case:
    """A model, and what it is called on the page."""

    name: str
    model: torch.nn.Module


def make_parser() -> argparse.ArgumentParser:
    """Return the command line. Numbers stay strings, so that `parse` can tell all faults at once."""
    parser = command_line.Parser(__doc__)
    add = parser.add_argument
    cuda = torch.cuda.is_available()
    add("--variants", nargs="+", default=list(VARIANTS), metavar="NAME", help="which (default: all)")
    add("--size", default="gpt2-medium" if cuda else "nano", help="(default: gpt2-medium on CUDA, else nano)")
    add("--dtype", default="bfloat16" if cuda else "float32", help="(default: bfloat16 on CUDA, else float32)")
    add("--batch_sizes", nargs="+", default=["1", "8"], metavar="N", help="sequences at once (default: 1 8)")
    add("--prompt_length", default=NUMBERS["prompt_length"], help="tokens of each prompt (default: 128)")
    add("--new_tokens", default=NUMBERS["new_tokens"], help="tokens decoded after it (default: 32)")
    add("--rounds", default=NUMBERS["rounds"], help="how often a variant and gpt2 are timed in turn (default: 7)")
    add("--output_dir", type=Path, help="where the results go (default: benchmarks/results/<device>)")
    return parser


def parse(argv: list[str] | None = None) -> Plan:
    """Return what the command line asks for. Raises `UsageError` with every fault at once."""
    given = make_parser().parse_args(argv)
    checks = command_line.Checks()
    variants = checks.variants(given.variants)
    if given.size not in SIZES:
        checks.lines.append(f"--size {given.size}: not known; one of {', '.join(SIZES)}")
    if given.dtype not in ("bfloat16", "float32"):
        checks.lines.append(f"--dtype {given.dtype}: bfloat16 or float32 is allowed")
    batch_sizes = [checks.whole("batch_sizes", text) for text in given.batch_sizes]
    numbers = {option: checks.whole(option, getattr(given, option)) for option in NUMBERS}
    checks.folder("output_dir", given.output_dir)
    checks.done()
    return Plan(
        variants=variants,
        size=given.size,
        dtype=getattr(torch, given.dtype),
        batch_sizes=batch_sizes,
        output_dir=given.output_dir,
        **numbers,
    )


def make_model(plan: Plan, variant: str, device: str) -> torch.nn.Module:
    """Return the variant with random weights, in eval mode."""
    vocabulary = NANO_VOCABULARY if plan.size == "nano" else GPT2_VOCABULARY
    positions = plan.prompt_length + plan.new_tokens
    record = find(variant)
    config = record.make_config(plan.size, vocabulary, positions, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    return record.model_class._from_config(config).to(device, plan.dtype).eval()


@torch.inference_mode()
def take(case: Case, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float, torch.Tensor]:
    """Return seconds of the prefill of `prompt` (B, P), seconds of the decoding after it, and the new tokens (B, N).

    The prefill gives the first token, each of N steps one more, the most probable. As `generate()` does it, without
    that method's own work between the steps.
    """
    start = _now()
    out = case.model(prompt, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    prefilled = _now()
    tokens = []
    for _ in range(new_tokens):
        out = case.model(token, **{CACHE_NAME: out[CACHE_NAME]}, use_cache=True)
        token = out.logits.argmax(-1)
        tokens.append(token)
    return prefilled - start, _now() - prefilled, torch.cat(tokens, 1)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(plan: Plan) -> list[dict[str, Any]]:
    """Return a row per batch size and case; gpt2 takes turns with each variant, and its own row is of all rounds."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference = Case(REFERENCE, make_model(plan, REFERENCE, device))
    rows, of_reference = [], {batch: ([], []) for batch in plan.batch_sizes}
    for variant in [name for name in plan.variants if name != REFERENCE] or [REFERENCE]:
        cases = [reference]
        if variant != REFERENCE:
            cases.append(Case(variant, make_model(plan, variant, device)))
        for batch in plan.batch_sizes:
            seconds = _in_turn(plan, cases, batch, device)
            for own, new in zip(of_reference[batch], seconds[REFERENCE], strict=True):
                own.extend(new)
            rows += [_row(plan, case.name, batch, seconds) for case in cases[1:]]
        for row in rows[-len(plan.batch_sizes) * (len(cases) - 1) :]:
            _say(row)
    for batch in plan.batch_sizes:
        row = _row(plan, REFERENCE, batch, {REFERENCE: of_reference[batch]})
        rows.append(row)
        _say(row)
    order = [REFERENCE, *(row["case"] for row in rows)]
    return sorted(rows, key=lambda row: (row["batch"], order.index(row["case"])))


def _in_turn(plan: Plan, cases: list[Case], batch: int, device: str) -> dict[str, tuple[list[float], list[float]]]:
    """Case -> seconds of the prefills and of the decodings, one each a round; a first round is warm-up."""
    prompt = torch.randint(0, NANO_VOCABULARY, (batch, plan.prompt_length), generator=torch.Generator().manual_seed(1))
    prompt = prompt.to(device)
    seconds = {case.name: ([], []) for case in cases}
    for round_ in range(plan.rounds + 1):
        for case in cases if round_ % 2 else reversed(cases):
            prefill, decode, _ = take(case, prompt, plan.new_tokens)
            if round_:
                seconds[case.name][0].append(prefill)
                seconds[case.name][1].append(decode)
    return seconds


def _row(plan: Plan, name: str, batch: int, seconds: dict[str, tuple[list[float], list[float]]]) -> dict[str, Any]:
    prefill, decode = seconds[name]
    row = {
        "case": name,
        "batch": batch,
        "prefill_tokens_per_second": batch * plan.prompt_length / statistics.median(prefill),
        "decode_seconds_per_step": statistics.median(decode) / plan.new_tokens,
        "decode_tokens_per_second": batch * plan.new_tokens / statistics.median(decode),
        "prefill_seconds": prefill,
        "decode_seconds": decode,
    }
    for part, own, theirs in zip(("prefill", "decode"), seconds[name], seconds[REFERENCE], strict=True):
        row[f"{part}_relative"] = statistics.median(b / a for a, b in zip(own, theirs, strict=True))
    return row


def _say(row: dict[str, Any]) -> None:
    command_line.say(
        f"{row['case']}, batch {row['batch']}: prefill {row['prefill_tokens_per_second']:,.0f} tokens/s "
        f"({row['prefill_relative']:.2f} of gpt2), decoding {1000 * row['decode_seconds_per_step']:.2f} ms a token "
        f"({row['decode_relative']:.2f} of gpt2)"
    )


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Return the tables of the page."""
    columns = (
        Column("case", "variant"),
        Column("batch", "batch"),
        Column("prefill_tokens_per_second", "prefill tokens/s", ",.0f"),
        Column("prefill_relative", "prefill over gpt2's", ".3f"),
        Column("decode_seconds_per_step", "decoding ms a step", ",.2f", 1000),
        Column("decode_tokens_per_second", "decoding tokens/s", ",.0f"),
        Column("decode_relative", "decoding over gpt2's", ".3f"),
    )
    legend = (
        "Medians over the rounds. A step decodes one token of every sequence. Over gpt2's: the speed as a multiple of "
        "gpt2's in the same round, the median; above 1 is faster."
    )
    return [Table("Variants", columns, rows, legend)]


def notes(plan: Plan) -> list[str]:
    """Return how the figures were taken, in words."""
    return [
        f"Size {plan.size}, {str(plan.dtype).removeprefix('torch.')}, attention sdpa, not compiled, random weights. "
        f"Prompts of {plan.prompt_length} tokens, {plan.new_tokens} tokens decoded after them, greedily, with the "
        f"cache; forward passes as generate() makes them, without its own work between them. {plan.rounds} rounds "
        "after one of warm-up; in each, gpt2 and the variant take turns."
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure and write; the exit code."""
    return command_line.carry_out(parse, argv, carry_out)


def carry_out(plan: Plan) -> int:
    """Measure, and write the results; the exit code."""
    facts = results_page.facts()
    rows = measure(plan)
    folder = plan.output_dir or results_page.folder(facts["device"])
    results_page.write(folder, "decode", "Inference speed", facts, tables(rows), notes(plan))
    print(folder / "decode.md")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
