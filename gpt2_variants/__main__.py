"""The small commands: `python -m gpt2_variants list | generate | report`."""

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code: 0, or 2 for a fault in what was asked."""
    parser = argparse.ArgumentParser(prog="python -m gpt2_variants", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | generate | report")
    commands.add_parser("list", help="the variants that can be trained")
    generate = commands.add_parser("generate", help="continue a prompt with an exported model")
    generate.add_argument("--model", type=Path, required=True, help="an exported model, such as runs/duo_predict/model")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max_new_tokens", type=int, default=60)
    generate.add_argument("--seed", type=int, default=0)
    report = commands.add_parser("report", help="a run's figures, and its plot anew")
    report.add_argument("runs", type=Path, nargs="+", help="run folders, such as runs/duo_predict")
    arguments = parser.parse_args(argv)
    try:
        COMMANDS[arguments.command](arguments)
    except (FileNotFoundError, ValueError) as err:
        print(f"error: {' '.join(str(err).split())}", file=sys.stderr)
        return 2
    return 0


def _list(_) -> None:
    from .registry import VARIANTS

    for v in VARIANTS.values():
        print(f"{v.name:<14} {v.family:<12} block size {v.block_size:<5} {v.summary}")


def _generate(arguments) -> None:
    from .report import sample

    if not (arguments.model / "config.json").is_file():
        raise FileNotFoundError(f"--model {arguments.model}: no exported model there (no config.json)")
    print(sample(arguments.model, arguments.prompt, arguments.max_new_tokens, arguments.seed))


def _report(arguments) -> None:
    from .report import plot, summary

    for folder in arguments.runs:
        print(summary(folder))
        print(f"plot        {plot(folder)}")


COMMANDS = {"list": _list, "generate": _generate, "report": _report}

if __name__ == "__main__":
    sys.exit(main())
