"""`list`: the variants that can be trained."""

import argparse

from .command import Command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`list` has no arguments."""


def run(_: argparse.Namespace) -> None:
    """Print a table of the package's variants."""
    from ..registry import VARIANTS

    rows = [("name", "family", "parameters*", "block size", "idea")]
    for v in VARIANTS.values():
        parameters = f"{v.medium_parameters or v.num_parameters():,}"
        rows.append((v.name, v.family, parameters, str(v.block_size), v.summary))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, family, parameters, block_size, idea in rows:
        print(
            f"{name:<{widths[0]}}  {family:<{widths[1]}}  {parameters:>{widths[2]}}  {block_size:>{widths[3]}}  {idea}"
        )
    print("* at GPT-2 Medium size, with GPT-2's vocabulary")


COMMAND = Command("list", "", "the variants that can be trained", add_arguments, run)
