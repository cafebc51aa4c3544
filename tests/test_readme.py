"""The README's commands exist, and say what they are said to do."""

import re
import shlex

import pytest
from conftest import ROOT

from gpt2_variants import VARIANTS, __main__
from gpt2_variants.run import make_parser

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


def of(kind: str) -> list[str]:
    return [c for c in COMMANDS if re.match(kind, c)]


def test_every_command_is_of_a_kind_that_is_tested_here():
    known = of("make ") + of(".*train_ds.py") + of("python -m gpt2_variants") + of("source .venv/bin/activate")
    assert sorted(known) == sorted(COMMANDS)


@pytest.mark.parametrize("command", of("make "))
def test_make_targets_exist(command):
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("command", of(".*train_ds.py"))
def test_training_commands_parse(command):
    arguments = shlex.split(command.split("train_ds.py")[1])
    parsed = make_parser().parse_args(arguments)
    assert parsed.variant in VARIANTS


@pytest.mark.parametrize("command", of("python -m gpt2_variants"))
def test_small_commands_parse(command):
    assert __main__.make_parser().parse_args(shlex.split(command)[3:]).command in __main__.COMMANDS


def test_the_table_names_every_variant():
    for name in VARIANTS:
        assert f"| `{name}` |" in README
