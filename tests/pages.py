"""The pages of the repository, in the order in which they are read, and the commands that they show."""

import re
from dataclasses import dataclass

from conftest import ROOT

NAMES = (
    "README.md",
    "gpt2_variants/training/README.md",
    "gpt2_variants/training/CLUSTERS.md",
    "ds_configs/README.md",
    "gpt2_variants/data/README.md",
    "gpt2_variants/compare/README.md",
    "gpt2_variants/report/README.md",
    ".github/USE_A_MODEL.md",
    "gpt2_variants/models/README.md",
    "gpt2_variants/models/MATHEMATICS.md",
    "gpt2_variants/models/duo_predict.md",
    "benchmarks/README.md",
    "benchmarks/results/README.md",
    "benchmarks/lm_eval/README.md",
    "benchmarks/NOTES.md",
    ".github/SECURITY.md",
    ".github/CONTRIBUTING.md",
)
TEXTS = {name: (ROOT / name).read_text() for name in NAMES}


@dataclass(frozen=True)
class Shown:
    """A command that a page shows.

    Attributes:
        page: the page.
        command: as it would be typed.
        needs: what the page says that it needs; empty where it needs nothing but `make install`.
    """

    page: str
    command: str
    needs: str


def _shown() -> list[Shown]:
    found = []
    for page, text in TEXTS.items():
        for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
            for line in block.splitlines():
                command, _, comment = line.partition(" #")
                if command.strip():
                    needs = re.match(r" needs (.+)", comment)
                    found.append(Shown(page, command.strip(), needs[1] if needs else ""))
    return found


SHOWN = _shown()
# a command that stands on two pages is one
COMMANDS = list(dict.fromkeys(one.command for one in SHOWN))


def of(kind: str) -> list[str]:
    """Return the commands that begin as the pattern `kind` says."""
    return [command for command in COMMANDS if re.match(kind, command)]
