"""Speed and memory of training, variant by variant, and against references, on one device.

    python benchmarks/throughput.py --preset seed --compare      # on a CUDA device: the recipe at full size
    python benchmarks/throughput.py --compare                    # without one: a small model, some minutes

Writes throughput.json, throughput.md and throughput.png under benchmarks/results/<device>/. Exit codes: 0 all measured,
1 some case could not be (its row says why), 2 faults in what was asked.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import command_line
import results_page
from gpt2_variants.config.command_line import parse as parse_run
from gpt2_variants.faults import UsageError
from gpt2_variants.ranks import world_size
from gpt2_variants.registry import VARIANTS
from throughput_cases import Plan, make_case, references
from throughput_page import chart, notes, tables
from throughput_rounds import measure
from training_case import Case

# What `--preset` fills in. seed: the recipe, in one micro-batch, duo_predict with its own 512 tokens. demo: steps of
# half a second or more on 2 CPU cores; in shorter ones, what a step costs whatever its size would decide.
PRESETS: dict[str, dict[str, Any]] = {
    "seed": {"per_device_train_batch_size": 64, "steps": 10, "warmup_steps": 5, "rounds": 2},
    "demo": {"per_device_train_batch_size": 16, "block_size": 256, "steps": 1, "warmup_steps": 2, "rounds": 5},
}
# Sequences of a step that stock GPT-2, not compiled, has memory for on a GPU of 80 GB: by a dry run of the CUDA path it
# wants 129 GiB for 64, and 67 GiB for 32.
FITTING = {"seed": 32}
PASSED_ON = ("size", "block_size", "per_device_train_batch_size", "attn_implementation", "deepspeed_config")


def make_parser() -> argparse.ArgumentParser:
    """Return the command line. Numbers stay strings, so that `parse` can tell all faults at once."""
    parser = command_line.Parser(
        __doc__, epilog="Every case runs in a process of its own on one device; several GPUs are not measured."
    )
    add = parser.add_argument
    add("--preset", default="auto", help=f"auto (seed where there is a CUDA device, else demo), {', '.join(PRESETS)}")
    add("--variants", nargs="+", default=list(VARIANTS), metavar="NAME", help="which (default: all)")
    add("--size", help="the models' size, as for train_ds.py (default: the preset's)")
    add("--model_args", nargs="*", metavar="FIELD=VALUE", help="config fields, as for train_ds.py")
    add("--block_size", help="tokens per sequence (seed: the variant's own; demo: 256)")
    add("--per_device_train_batch_size", help="sequences in a micro-batch; a step takes one (seed: 64, demo: 16)")
    add("--steps", help="timed optimizer steps a round (seed: 10, demo: 1)")
    add("--warmup_steps", help="steps before, of which the first is reported by itself (seed: 5, demo: 2)")
    add("--rounds", help="how often a case and its reference are timed in turn (seed: 2, demo: 5)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile of the blocks (default: on CUDA only)")
    add("--gradient_checkpointing", action="store_true", help="recompute the blocks in the backward pass")
    add("--attn_implementation", help="the attention backend (default: sdpa)")
    add("--dtype", help="bfloat16 or float32 (default: what the DeepSpeed JSON says)")
    add("--compare", action="store_true", help="also the references: plain loop, stock GPT-2, as published, dense mask")
    add("--deepspeed_config", help="a DeepSpeed JSON (default: ds_configs/zero1.json)")
    add("--output_dir", type=Path, help="where the results go (default: benchmarks/results/<device>)")
    return parser


def parse(argv: list[str] | None = None) -> Plan:
    """Return what the command line asks for. Raises `UsageError` with every fault at once."""
    given = make_parser().parse_args(argv)
    preset = given.preset
    if preset == "auto":
        preset = "seed" if torch.cuda.is_available() else "demo"
    if preset not in PRESETS:
        raise UsageError([f"--preset {preset}: not known; one of auto, {', '.join(PRESETS)}"])
    checks = command_line.Checks()
    lines = checks.lines
    if preset == "seed" and not torch.cuda.is_available():
        lines.append("--preset seed: there is no CUDA device, and a CPU takes minutes a step; use demo, or auto")
    if world_size() > 1:
        lines.append(f"WORLD_SIZE {world_size()}: one device is measured; start it with python, without a launcher")
    variants = checks.variants(given.variants)
    if given.compare and not {"gpt2", "duo_predict"} & set(given.variants):
        lines.append("--compare: the references are those of gpt2 and duo_predict; name one of them in --variants")
    if given.dtype not in (None, "bfloat16", "float32"):
        lines.append(f"--dtype {given.dtype}: bfloat16 or float32 is allowed")
    checks.folder("output_dir", given.output_dir)
    filled = {key: getattr(given, key, None) or value for key, value in PRESETS[preset].items()}
    numbers = {key: checks.whole(key, filled[key]) for key in ("steps", "warmup_steps", "rounds")}
    # No data are read and no folder is made, so a dry run of the built-in corpus is what is asked for.
    options = ["--preset", preset, "--dataset", "builtin", "--tokenizer", "builtin", "--report_to", "none", "--dry_run"]
    options += ["--max_steps", str(numbers["warmup_steps"] + numbers["steps"] * numbers["rounds"] * len(VARIANTS) * 2)]
    for key in PASSED_ON:
        if (value := filled.get(key, getattr(given, key))) is not None:
            options += [f"--{key}", str(value)]
    options += ["--gradient_checkpointing"] * given.gradient_checkpointing
    if given.compile is not None:
        options.append("--compile" if given.compile else "--no-compile")
    if given.model_args is not None:
        options += ["--model_args", *given.model_args]
    cases: list[Case] = []
    of_runs: dict[str, str] = {}  # what is wrong -> the line that says so; of several variants' lines the first
    for name in variants:
        try:
            cases.append(make_case(parse_run([*options, "--variant", name]), given.dtype))
        except UsageError as err:
            of_runs = {line.split(": ")[0]: line for line in err.lines} | of_runs
    if lines := lines + list(of_runs.values()):
        raise UsageError(lines)
    if any(case.name == "gpt2" for case in cases):
        cases = [case if case.name == "gpt2" else replace(case, reference="gpt2") for case in cases]
        cases.sort(key=lambda case: case.name != "gpt2")  # a reference comes before what is set against it
    if given.compare:
        cases += [reference for case in cases for reference in references(case, FITTING.get(preset))]
    return Plan(preset=preset, cases=cases, output_dir=given.output_dir, **numbers)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; its exit code."""
    return command_line.carry_out(parse, argv, carry_out)


def carry_out(plan: Plan) -> int:
    """Measure, and write and print the results; the exit code."""
    facts = results_page.facts()
    rows = [measured.row() for measured in measure(plan)]
    folder = plan.output_dir or results_page.folder(facts["device"])
    page = tables(rows)
    results_page.write(folder, "throughput", "Throughput and memory of training", facts, page, notes(plan, rows))
    chart(rows, folder / "throughput.png")
    print((folder / "throughput.md").read_text())
    return 1 if any(row["failure"] is not None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
