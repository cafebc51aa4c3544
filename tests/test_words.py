"""Numbers with their nouns."""

import ast
import re

import pytest
from conftest import ROOT

from gpt2_variants.words import counted


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 GPUs"), (1, "1 GPU"), (2, "2 GPUs"), (1024, "1,024 GPUs"), (21, "21 GPUs")]
)
def test_one_is_one(number, said):
    assert counted(number, "GPU") == said


def test_no_number_of_gpus_or_ranks_has_a_plural_written_beside_it():
    """In an f-string, "{n} GPUs" is "1 GPUs" one day."""
    found = []
    for file in (ROOT / "gpt2_variants").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                for value, text in zip(node.values, node.values[1:], strict=False):
                    if isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant):
                        plural = re.match(r" (GPUs|ranks|weights|sequences)\b", text.value)
                        found += [f"{file.name}:{node.lineno}"] if plural else []
    several = ("dry_run.py", "loading.py", "blocks.py")  # of constants, types, and products of several numbers
    assert [place for place in found if not place.startswith(several)] == []
