"""The variant files that the page on variants shows, as they would stand on a user's disk."""

import re
from pathlib import Path

from conftest import ROOT

PAGE = (ROOT / "gpt2_variants/models/README.md").read_text()
FILE, *PARTS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
NAMES = (
    "rms_norm",
    "swiglu",
    "parallel_block",
    "qk_norm",
    "grouped_keys",
    "alibi",
    "embedding_head",
    "second_stream",
    "pictures",
)


def example(name: str) -> str:
    """Return the whole file of an example: the page's first one, or with one of its parts in place of the attention."""
    return FILE if name == "idea" else with_part(name, PARTS[NAMES.index(name)])


def with_part(name: str, part: str) -> str:
    """Return the page's first example, named `name`, with `part` in place of its attention.

    Lines of the part as `# IdeaModel: norm_class = X` are put into that class; `# IdeaModel: (X)` is its base class.
    """
    text = FILE.replace("    attention_class = IdeaAttention\n", "").replace('name="idea"', f'name="{name}"')
    start, end = text.index("class IdeaAttention"), text.index("class IdeaModel")
    code = re.sub(r"^# Idea.*\n", "", part, flags=re.MULTILINE).strip()
    text = text[:start] + code + "\n\n\n" + text[end:]
    for owner, line in re.findall(r"^# (Idea\w+): (.+)$", part, flags=re.MULTILINE):
        head, tail = re.split(rf"(?=class {owner}\()", text)
        if line.startswith("("):
            tail = re.sub(r"\(\w+\)", line, tail, count=1)
        else:
            mark = "    config_class = IdeaConfig\n"
            tail = tail.replace(mark, f"{mark}    {line}\n", 1)
        text = head + tail
    return text


def write(folder: Path, name: str) -> Path:
    """Write an example to `folder`; its path."""
    path = folder / f"{name}.py"
    path.write_text(example(name))
    return path
