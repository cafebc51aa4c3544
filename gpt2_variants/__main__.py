"""The commands, as `gpt2-variants COMMAND` or `python -m gpt2_variants COMMAND`: train, list, generate and others."""

import argparse
import sys
from typing import NoReturn

from .commands import COMMANDS
from .config.command_line import Parser
from .data import DataError
from .ending import end_with
from .faults import RunError, UsageError
from .reasons import disk_fault, reason_of
from .train_command import main as train

_PROGRAM = "python -m gpt2_variants"

EPILOG = """\
examples:
  python -m gpt2_variants train --variant duo_predict
  deepspeed --module gpt2_variants train --variant duo_predict
  python -m gpt2_variants generate --model runs/duo_predict/model --prompt "The following statement"
  python -m gpt2_variants evaluate --model runs/duo_predict/model --dataset my.txt

`python -m gpt2_variants COMMAND --help` lists a command's options.
`gpt2-variants` is the same command. exit codes: 0 done; 2 faults in what was asked, one line each;
130 stopped by Ctrl-C; 1 a push or a run of compare that failed, or anything else.
`train` has two more: see its help."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser. Numbers stay strings: the commands convert them, so that all faults are told at once."""
    parser = Parser(prog=_PROGRAM, usage=f"{_PROGRAM} COMMAND [options]", epilog=EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    def add(name: str, usage: str, help: str) -> argparse.ArgumentParser:
        usage = f"{_PROGRAM} {name} {usage}".rstrip()
        return commands.add_parser(name, usage=usage, help=help, description=f"{help[0].upper()}{help[1:]}.")

    add("train", "--variant NAME [options]", help="train a variant, as train_ds.py does")  # `main` hands it on
    for command in COMMANDS.values():
        command.add_arguments(add(command.name, command.usage, command.help))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; its exit code: 0; 1: a push or a run failed; 2: faults in what was asked; 130: Ctrl-C.

    `train` has the exit codes of `train_command.main`.
    """
    words = sys.argv[1:] if argv is None else argv
    # `deepspeed --module gpt2_variants train` puts its --local_rank=N before the command; the environment has it too.
    told = next((i for i, word in enumerate(words) if not word.startswith("--local_rank=")), len(words))
    if words[told : told + 1] == ["train"]:
        return train(words[told + 1 :], f"{_PROGRAM} train")
    try:
        parser = make_parser()
        arguments, rest = parser.parse_known_args(words)
        command = COMMANDS[arguments.command]
        if command.takes_options_of_training:
            arguments.words, arguments.rest = words, rest
        elif rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        code = command.run(arguments)
        sys.stdout.flush()
    except (UsageError, DataError, FileNotFoundError) as err:
        print("\n".join(f"error: {line}" for line in str(err).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as err:
        if isinstance(err, RunError) or disk_fault(err):
            print(f"error: {reason_of(err)}", file=sys.stderr)
            return 1
        raise
    return code or 0


def script() -> NoReturn:
    """`gpt2-variants` and `python -m gpt2_variants`: run one command and end the process."""
    end_with(main)


if __name__ == "__main__":
    script()
