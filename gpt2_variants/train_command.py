"""Training as a command: `train_ds.py`, and `train` of `python -m gpt2_variants` and of `gpt2-variants`."""

import atexit
import os
import sys
from pathlib import Path
from typing import NoReturn


def main(argv: list[str] | None = None, program: str | None = None) -> int:
    """Run the command. Exit codes: 0 finished, 2 faults in what was asked, 3 loss not finite, 130/143 interrupted.

    Args:
        argv: the options; None: this process's.
        program: what the user typed before them, for the help; None: train_ds.py under DeepSpeed's launcher.
    """
    from .config.command_line import PROGRAM, parse
    from .faults import UsageError
    from .ranks import main_rank

    try:
        run = parse(argv, program or PROGRAM)
        if run.dry_run:
            from .dry_run import describe
            from .training.trial import try_out

            try_out(run)
            print(describe(run))
            return 0
        from .training.session import train

        trained = train(run)
    except UsageError as err:
        if main_rank():
            print("\n".join(f"error: {line}" for line in err.lines), file=sys.stderr)
        return 2
    if trained.state_dict is not None:
        from .hub import finish, publish
        from .report import show

        finish(run, trained)
        show(run)
        if run.push_to_hub:
            return publish(Path(run.output_dir))
    return trained.exit_code


def leave(code: int) -> NoReturn:
    """End the process with an exit code, after all that is registered for its end; of a rank without a teardown.

    Where Python takes the libraries' threads apart, a rank on a CPU aborted now and then ("terminate called without an
    active exception") after all its work, most at ZeRO stage 3: with an exit code that looked like a failure.
    """
    if "torch.distributed" not in sys.modules:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
