"""Write two tasks for EleutherAI's lm-evaluation-harness from text that a run was not trained on.

    python benchmarks/lm_eval/write_tasks.py runs/gpt2 --output_dir runs/tasks

`held_out_text` asks for the perplexity of documents, `held_out_cloze` which of four words comes next. The wrong words
are about as frequent in the training text as the right one, so that knowing the frequencies alone does not help.
The folder written holds a YAML and a JSONL file for each, and `lm_eval --include_path` takes it. Equal data give equal
questions.
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from string import Template

from gpt2_variants.config.options import Options
from gpt2_variants.config.resolve import load_data
from gpt2_variants.data import BlockDataset
from gpt2_variants.faults import UsageError
from gpt2_variants.records import RunRecord

DOCUMENT_CHARACTERS = 4_000  # at least, but for the last: long enough that a document's cold start weighs little
CONTEXT_CHARACTERS = 150  # of a cloze, at most: with the demo's tokenizer about 40 of the 64 tokens it is trained on
TRAINING_TOKENS = 1_000_000  # word frequencies are taken from so many
MIN_COUNT = 5  # a word met less often in these is neither asked for nor offered
BIN = 8  # the words, most frequent first, are cut into bins of so many; wrong words come from the right one's bin
NUM_CHOICES = 4
NUM_CLOZES = 500
SEED = 0

WORD = re.compile(r"(?<=\S )[a-z]{4,}(?![\w'-])")  # a whole lower-case word behind a single space


@dataclass(frozen=True)
class Cloze:
    """A question: which of `choices` follows `context` and a space? `choices[label]` does."""

    context: str
    choices: list[str]
    label: int


def documents(text: str) -> list[str]:
    """Cut `text` at line ends into documents of at least `DOCUMENT_CHARACTERS`; no white space at their ends.

    The harness counts words by splitting at white space, and would count an empty one at such an end.
    """
    found, lines, size = [], [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= DOCUMENT_CHARACTERS:
            found.append("".join(lines))
            lines, size = [], 0
    found.append("".join(lines))
    return [document.strip() for document in found if document.strip()]


def clozes(docs: list[str], counts: Counter[str]) -> list[Cloze]:
    """Ask for up to `NUM_CLOZES` words of `docs`, chosen at random, in the order of the text.

    `counts` says how often each word occurs in training.
    """
    by_frequency = sorted(
        (word for word in counts if counts[word] >= MIN_COUNT), key=lambda word: (-counts[word], word)
    )
    # Without the first bin, whose words differ most in frequency, and without a last one that is not full.
    bins = [by_frequency[first : first + BIN] for first in range(BIN, len(by_frequency) - BIN + 1, BIN)]
    others = {word: [other for other in words if other != word] for words in bins for word in words}
    found = [
        (document, match)
        for document in docs
        for match in WORD.finditer(document)
        if match[0] in others and match.start() > CONTEXT_CHARACTERS
    ]
    rng = random.Random(SEED)
    questions = []
    for index in sorted(rng.sample(range(len(found)), min(NUM_CLOZES, len(found)))):
        document, match = found[index]
        end = match.start() - 1  # the harness puts the space between context and choice
        before = document[end - CONTEXT_CHARACTERS : end]
        context = before[before.find(" ") + 1 :]  # not from within a word
        choices = [match[0], *rng.sample(others[match[0]], NUM_CHOICES - 1)]
        rng.shuffle(choices)
        questions.append(Cloze(context, choices, choices.index(match[0])))
    return questions


def write(folder: Path, name: str, rows: list[dict]) -> None:
    """Write the task `name`: `rows` as JSONL, and beside them the YAML that names their place."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = Template(Path(__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8"))
    # A path in the YAML counts from where lm_eval is started, hence an absolute one; a JSON string is a YAML string.
    filled = task.safe_substitute(data=json.dumps(str(data.resolve())))
    (folder / f"{name}.yaml").write_text(filled, encoding="utf-8")


def load_run(folder: Path):
    """Return the data that the run in `folder` was trained on.

    Raises:
        ValueError: no run is there, its data cannot be had, or are others by now.
    """
    facts = RunRecord(folder, writes=False).facts
    if not facts:
        raise ValueError(f"{folder}: holds no run (no run.json)")
    run = Options(**facts["options"])
    data = load_data(run)
    if data.fingerprint != facts["data_fingerprint"]:
        raise ValueError(
            f"{folder}: was trained on other data than --dataset {run.dataset} --tokenizer {run.tokenizer} gives now; "
            "what is held out now may have been trained on"
        )
    return data


def decode(blocks: BlockDataset, num_blocks: int, tokenizer) -> str:
    """Return the text of the first `num_blocks` blocks."""
    ids = blocks.__getitems__(list(range(num_blocks)))["input_ids"]
    return tokenizer.decode(ids.flatten().tolist(), clean_up_tokenization_spaces=False)


def read(file: Path) -> str:
    """Return the text in `file`. Raises ValueError if there is none."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ValueError(f"--text {file}: cannot be read ({err}); give a UTF-8 text file") from err


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("run", type=Path, help="a run's folder, such as runs/gpt2")
    parser.add_argument("--output_dir", type=Path, required=True, help="where to write the tasks")
    parser.add_argument("--text", type=Path, help="a UTF-8 file to score instead of what the run held out")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; the exit code: 0, or 2 for a fault in what was asked."""
    arguments = make_parser().parse_args(argv)
    try:
        data = load_run(arguments.run)
        held_out = (
            read(arguments.text) if arguments.text else decode(data.validation, len(data.validation), data.tokenizer)
        )
        docs = documents(held_out)
        sampled = min(len(data.train), -(-TRAINING_TOKENS // data.train.block_size))
        counts = Counter(WORD.findall(decode(data.train, sampled, data.tokenizer)))
        questions = clozes(docs, counts)
        if not questions:
            raise ValueError(
                f"{arguments.text or arguments.run}: too little text for a cloze: a word of at least 4 letters, met "
                f"{MIN_COUNT} times in training, must stand behind {CONTEXT_CHARACTERS} characters of a document"
            )
        if arguments.output_dir.exists() and not arguments.output_dir.is_dir():
            raise ValueError(f"--output_dir {arguments.output_dir}: is a file; a folder is needed")
        arguments.output_dir.mkdir(parents=True, exist_ok=True)
        write(arguments.output_dir, "held_out_text", [{"text": document} for document in docs])
        write(arguments.output_dir, "held_out_cloze", [vars(question) for question in questions])
    except UsageError as err:
        print("\n".join(f"error: {line}" for line in err.lines), file=sys.stderr)
        return 2
    except (OSError, ValueError) as err:
        print(f"error: {' '.join(str(err).split())}", file=sys.stderr)
        return 2
    hits = sum(max(q.choices, key=counts.__getitem__) == q.choices[q.label] for q in questions)
    print(f"held_out_text   {len(docs):,} documents, {sum(map(len, docs)):,} characters")
    print(
        f"held_out_cloze  {len(questions):,} questions; the choice that is most frequent in training is right in "
        f"{hits / len(questions):.1%}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
