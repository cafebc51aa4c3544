"""The tasks for the lm-evaluation-harness: what is written, and what the harness makes of an exported model."""

import importlib.util
import json
import math
import os
import re
import sys
from collections import Counter

import pytest
import torch
from conftest import run_to_end, script, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2_variants import VARIANTS
from gpt2_variants.config.command_line import parse
from gpt2_variants.config.options import Options
from gpt2_variants.config.resolve import load_data
from gpt2_variants.hub import export
from gpt2_variants.records import RunRecord

write_tasks = script("benchmarks/lm_eval/write_tasks.py")


@pytest.fixture(scope="module")
def run_folder(corpus, tmp_path_factory):
    """What a run on the tests' corpus leaves of itself: run.json."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ["--variant", "gpt2", "--preset", "demo", "--dataset", str(corpus), "--block_size", "32"]
    run = parse([*options, "--report_to", "none", "--output_dir", str(folder)])
    RunRecord(folder, writes=True).update(options=vars(run), data_fingerprint=load_data(run).fingerprint)
    return folder


@pytest.fixture(scope="module")
def tasks(run_folder, tmp_path_factory):
    """The folder of both tasks."""
    folder = tmp_path_factory.mktemp("tasks") / "made"
    assert write_tasks.main([str(run_folder), "--output_dir", str(folder)]) == 0
    return folder


def rows(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_documents_are_the_lines_that_were_held_out(tasks, corpus):
    lines = corpus.read_text().splitlines(keepends=True)
    held_out = "".join(lines[-len(lines) // 20 :])
    documents = [row["text"] for row in rows(tasks / "held_out_text.jsonl")]
    written = "\n".join(documents)
    assert held_out.startswith(written)
    assert len(held_out) - len(written) < 32 * 12  # less than a block of tokens lacks
    assert all(4000 <= len(document) + 1 < 4100 for document in documents[:-1])


def test_each_cloze_is_a_place_in_the_documents_with_words_as_frequent_as_its_own(tasks, corpus):
    documents = [row["text"] for row in rows(tasks / "held_out_text.jsonl")]
    lines = corpus.read_text().splitlines()
    counts = Counter(re.findall(r"[a-z]{4,}", "\n".join(lines[: -len(lines) // 20])))
    ordered = [word for word, _ in counts.most_common()]
    questions = rows(tasks / "held_out_cloze.jsonl")
    assert len(questions) > 100
    assert {question["label"] for question in questions} == {0, 1, 2, 3}
    for question in questions:
        answer = question["choices"][question["label"]]
        assert any(f"{question['context']} {answer}" in document for document in documents)
        assert 130 < len(question["context"]) < 150
        assert len(set(question["choices"])) == 4
        ranks = [ordered.index(word) for word in question["choices"]]
        assert max(ranks) - min(ranks) < 8 + 2  # bins of 8; the last training block's few words are not counted
        assert min(ranks) >= 8 - 2


def test_another_text_can_be_scored_and_the_files_are_the_same_each_time(run_folder, tmp_path, capsys):
    text = "the man sees " * 400 + "\n\n\nan end \n"
    (tmp_path / "mine.txt").write_text(text)
    for folder in ("a", "b"):
        arguments = [str(run_folder), "--output_dir", str(tmp_path / folder), "--text", str(tmp_path / "mine.txt")]
        assert write_tasks.main(arguments) == 0
    assert [row["text"] for row in rows(tmp_path / "a" / "held_out_text.jsonl")] == [
        text.split("\n")[0].strip(),
        "an end",
    ]
    for file in ("held_out_text.jsonl", "held_out_cloze.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert "2 documents" in capsys.readouterr().out


def test_faults_are_one_line_and_exit_code_2(run_folder, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "latin1.txt").write_bytes("für".encode("latin1"))
    other = tmp_path / "other"
    facts = json.loads((run_folder / "run.json").read_text())
    RunRecord(other, writes=True).update(**{**facts, "data_fingerprint": "0"})
    lost = tmp_path / "lost"
    RunRecord(lost, writes=True).update(**{**facts, "options": {**facts["options"], "dataset": "/nowhere.txt"}})
    out = ["--output_dir", str(tmp_path / "out")]
    for arguments, message in (
        (["nowhere", *out], "nowhere: holds no run"),
        ([str(other), *out], "was trained on other data"),
        ([str(lost), *out], "--dataset /nowhere.txt: no such file"),
        ([str(run_folder), *out, "--text", str(tmp_path / "short.txt")], "too little text for a cloze"),
        ([str(run_folder), *out, "--text", str(tmp_path / "latin1.txt")], "cannot be read"),
        ([str(run_folder), *out, "--text", str(tmp_path / "none.txt")], "cannot be read"),
        ([str(run_folder), "--output_dir", str(tmp_path / "short.txt")], "is a file"),
    ):
        assert write_tasks.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line
    assert not (tmp_path / "out").exists()


HARNESS = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

exports, tasks = sys.argv[1].split(","), sys.argv[2]
manager = TaskManager(include_path=tasks, include_defaults=False)
for folder in exports:
    for batch_size in (1, 8):
        out = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": folder, "trust_remote_code": True, "device": "cpu"},
            tasks=["held_out_text", "held_out_cloze"],
            task_manager=manager,
            batch_size=batch_size,
            bootstrap_iters=0,
            limit=6,
        )
        print("figures", json.dumps({task: out["results"][task] for task in out["results"]}))
assert "gpt2_variants" not in sys.modules
"""


@pytest.mark.slow
def test_the_harness_scores_every_variant_as_plain_pytorch_does_at_any_batch_size(run_folder, tasks, tmp_path):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm_eval is not installed: pip install -e '.[lm-eval]'")
    options = json.loads((run_folder / "run.json").read_text())["options"]
    tokenizer = load_data(Options(**options)).tokenizer
    for name, record in VARIANTS.items():
        size = len(tokenizer) + record.extra_vocabulary
        # a wide initialisation: predictions that are all alike would hide an error of one position
        model = tiny(name, vocab_size=size, initializer_range=0.5)
        weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
        export(record, model.config, weights, tokenizer, options["block_size"], tmp_path / name)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_DATASETS_OFFLINE": "1"}
    folders = ",".join(str(tmp_path / name) for name in VARIANTS)
    command = [sys.executable, "-c", HARNESS, folders, str(tasks)]
    done = run_to_end(command, 900, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    figures = [json.loads(line[8:]) for line in done.stdout.splitlines() if line.startswith("figures ")]
    assert len(figures) == 2 * len(VARIANTS)
    documents = [row["text"] for row in rows(tasks / "held_out_text.jsonl")][:6]
    questions = rows(tasks / "held_out_cloze.jsonl")[:6]
    for index, name in enumerate(VARIANTS):
        bits, accuracy = by_hand(tmp_path / name, documents, questions)
        for batch in figures[2 * index : 2 * index + 2]:
            assert batch["held_out_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5), name
            assert batch["held_out_cloze"]["acc,none"] == accuracy, name


def by_hand(folder, documents: list[str], questions: list[dict]) -> tuple[float, float]:
    """Bits per byte of the documents and the part of the questions answered rightly; one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    window = model.config.n_positions

    @torch.no_grad()
    def log_likelihood(given: list[int], ids: list[int]) -> float:
        log_probs = model(torch.tensor([given + ids[:-1]])).logits[0, -len(ids) :].double().log_softmax(-1)
        return log_probs.gather(1, torch.tensor(ids)[:, None]).sum().item()

    nats = 0.0
    for document in documents:
        ids = tokenizer(document)["input_ids"]
        for begin in range(0, len(ids), window):
            end = min(begin + window, len(ids))
            # a full window sees the token before it, a short last one as many as fit, the first <|endoftext|>
            given = ids[end - window - 1 : begin] if begin else [tokenizer.bos_token_id]
            nats -= log_likelihood(given, ids[begin:end])
    answers = []
    for question in questions:
        context = tokenizer(question["context"])["input_ids"]
        choices = [tokenizer(f" {choice}")["input_ids"] for choice in question["choices"]]
        scores = [log_likelihood(context[-(window + 1 - len(ids)) :], ids) for ids in choices]
        answers.append(max(range(4), key=scores.__getitem__))
    right = sum(answer == question["label"] for answer, question in zip(answers, questions))
    return nats / math.log(2) / sum(len(d.encode()) for d in documents), right / len(questions)
