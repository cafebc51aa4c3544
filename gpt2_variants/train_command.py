"""Training as a command: `train_ds.py`, and `train` of `python -m gpt2_variants` and of `gpt2-variants`."""

import functools
import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .steady_output import goes_on_unheard

if TYPE_CHECKING:
    from .config.options import Options
    from .training.outcome import Trained


def main(argv: list[str] | None = None, program: str | None = None) -> int:
    """Run the command. Exit codes: 0 finished, 2 faults in what was asked, 3 loss not finite, 128 + n for signal n.

    Args:
        argv: the options; None: this process's.
        program: what the user typed before them, for the help; None: train_ds.py under DeepSpeed's launcher.
    """
    from .config.command_line import PROGRAM, parse, split_num_gpus
    from .faults import UsageError
    from .ranks import RankZeroFailed, main_rank

    try:
        ranks, words = split_num_gpus(sys.argv[1:] if argv is None else argv)
        # a dry run starts no ranks, and says so below
        if ranks is not None and not any(word.startswith(("-h", "--help", "--dry_run")) for word in words):
            from .launch import launch

            return launch(ranks, words)
        run = parse(argv, program or PROGRAM)
        if run.dry_run:
            from .dry_run import describe
            from .training.trial import try_out

            try_out(run)
            print(describe(run), flush=True)
            return 0
        from .training.session import train

        with goes_on_unheard():
            trained = train(run)
    except UsageError as err:
        if main_rank():
            print("\n".join(f"error: {line}" for line in err.lines), file=sys.stderr)
        return 2
    except RankZeroFailed:  # which has said why
        return 1
    except KeyboardInterrupt:
        if main_rank():
            print("interrupted before the first step", file=sys.stderr)
        return 130
    except Exception as err:
        return _failed(err)
    return _hand_on(run, trained) if trained.finished else trained.exit_code


def _failed(err: Exception) -> int:
    """Say in a line what failed though nothing was wrong with what was asked; raise `err` where it is not that."""
    from .faults import RunError
    from .ranks import main_rank
    from .reasons import disk_fault, reason_of

    if isinstance(err, RunError):
        line = str(err)
    elif disk_fault(err):
        line = f"{reason_of(err)}, then go on with --resume_from_checkpoint auto"
    elif isinstance(err, RuntimeError) and re.search(r"Connection (closed|reset) by peer", str(err)):
        line = "another rank has ended, which says why; then go on with --resume_from_checkpoint auto"
    else:
        raise err
    rank = "" if main_rank() else f"rank {os.environ['RANK']}: "
    print(f"error: {rank}{line}", file=sys.stderr)
    return 1


@goes_on_unheard()
def _hand_on(run: "Options", trained: "Trained") -> int:
    """Export a finished run, show what came out, and push it if asked to. On rank 0; the others wait for the export."""
    from .hub import finish, publish
    from .ranks import RankZeroFailed, main_rank, while_others_wait
    from .report import show

    folder = shlex.quote(run.output_dir)
    missing = f"the model of the finished training was not exported; --resume_from_checkpoint {folder} does that"
    try:
        while_others_wait(functools.partial(finish, run, trained))
        if trained.state_dict is None:
            return 0
        missing = f"the model is exported; python -m gpt2_variants report {folder} shows the run"
        show(run)
        return publish(Path(run.output_dir)) if run.push_to_hub else 0
    except RankZeroFailed:
        return 1
    except KeyboardInterrupt:
        if main_rank():
            print(f"interrupted: {missing}", file=sys.stderr)
        return 130
    except Exception as err:
        return _failed(err)
