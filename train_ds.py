"""Train one GPT-2 variant with DeepSpeed: `deepspeed train_ds.py --variant duo_predict` (options: --help)."""

import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit codes: 0 finished, 2 faults in what was asked, 3 loss not finite, 130/143 interrupted."""
    from gpt2_variants.config.command_line import parse
    from gpt2_variants.faults import UsageError
    from gpt2_variants.ranks import main_rank

    try:
        run = parse(argv)
        if run.dry_run:
            from gpt2_variants.dry_run import describe

            print(describe(run))
            return 0
        from gpt2_variants.training.session import train

        trained = train(run)
    except UsageError as err:
        if main_rank():
            print("\n".join(f"error: {line}" for line in err.lines), file=sys.stderr)
        return 2
    if trained.state_dict is not None:
        from gpt2_variants.hub import finish, publish
        from gpt2_variants.report import show

        finish(run, trained)
        show(run)
        if run.push_to_hub:
            return publish(Path(run.output_dir))
    return trained.exit_code


if __name__ == "__main__":
    sys.exit(main())
