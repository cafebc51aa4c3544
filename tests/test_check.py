"""The contract: all variants keep it, the page's examples too, and each promise is broken by a variant made for it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import variant_examples
from bad_variants import BAD
from conftest import FAMILIES, ROOT, python_program, run_to_end

from gpt2_variants import VARIANTS
from gpt2_variants.contract import BROKEN, PROMISES, Subject, ask, keeps_all, listed
from gpt2_variants.registry import Variant
from gpt2_variants.variant_code import find

# Those that take long are asked in the slow tests; the quick ones of all variants in every run.
LONG = ("random-stays-random", "compile", "trainer", "zero", "export")
QUICK = [name for name in PROMISES if name not in LONG]


def faults(answers) -> str:
    return "\n".join(listed(answer) for answer in answers if answer.state == BROKEN)


def test_no_family_is_left_out():
    assert {VARIANTS[name].family for name in FAMILIES} == {record.family for record in VARIANTS.values()}


@pytest.mark.parametrize("promise", QUICK)
@pytest.mark.parametrize("variant", FAMILIES)
def test_every_family_keeps_it(variant, promise):
    assert not faults(ask(Subject(VARIANTS[variant], quick=True), [PROMISES[promise]]))


@pytest.mark.slow
@pytest.mark.parametrize("promise", PROMISES)
def test_every_variant_keeps_it_asked_thoroughly(variant, promise):
    assert not faults(ask(Subject(VARIANTS[variant]), [PROMISES[promise]]))


@pytest.mark.parametrize("name", ["idea", pytest.param("second_stream", marks=pytest.mark.slow)])
def test_the_pages_examples_keep_the_quick_promises(name, tmp_path):
    """The others are among the slow tests, in full."""
    subject = Subject(find(str(variant_examples.write(tmp_path, name))), quick=True)
    wanted = "no-leak-by-gradient padding-unseen cache generation parameters-learn saved-whole checkpointing".split()
    assert not faults(ask(subject, [PROMISES[promise] for promise in wanted]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["idea", *variant_examples.NAMES])
def test_the_pages_examples_keep_all_promises(name, tmp_path):
    assert not faults(ask(Subject(find(str(variant_examples.write(tmp_path, name))))))


def bad(folder: Path, name: str) -> Variant:
    """A variant that breaks a promise, from a file, as a user's."""
    (folder / "step.txt").write_text("2")
    path = folder / f"{name}.py"
    path.write_text(variant_examples.with_part(name, BAD[name][2]))
    return find(str(path))


def long(name: str):
    """`name` as a parameter; a leak in bf16 alone is looked for last, after all of evaluation and of training."""
    late = BAD[name][0] in LONG or name == "leak_in_bf16"
    return pytest.param(name, marks=[pytest.mark.slow] if late else [])


@pytest.mark.parametrize("name", [long(name) for name in BAD])
def test_a_bad_variant_breaks_its_promise_in_its_words(name, tmp_path):
    promise, words, _ = BAD[name]
    fewer_places = name == "leak_in_training"  # those of evaluation are looked at before it
    subject = Subject(bad(tmp_path, name), quick=fewer_places)
    (answer,) = ask(subject, [PROMISES[promise]])
    assert answer.state == BROKEN
    assert re.search(words, answer.finding), answer.finding


def test_every_promise_has_a_variant_that_breaks_it():
    assert {promise for promise, *_ in BAD.values()} == PROMISES.keys()


def test_the_leak_of_the_published_duo_predict_is_found():
    """It gave a perplexity of 13.46 that was an artefact: m_k read the token that it is to predict."""
    import dataclasses

    published = dataclasses.replace(VARIANTS["duo_predict"], overrides={"leak_free": False})
    (answer,) = ask(Subject(published, quick=True), [PROMISES["no-leak-by-gradient"]])
    assert re.fullmatch(
        r"infill: the prediction of token (\d+) depends on token \1 itself, in evaluation mode", answer.finding
    )


def test_the_reference_is_stock_gpt2():
    """The small models of the baseline compute what transformers' own GPT-2 does."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = Subject(VARIANTS["gpt2"]).model(tokens=64)
    stock = GPT2LMHeadModel(GPT2Config(**model.config.to_dict())).eval()
    stock.load_state_dict(model.state_dict())
    ids = Subject(VARIANTS["gpt2"]).ids(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, stock(ids).logits, atol=1e-6, rtol=0)


def check(*words: str) -> subprocess.CompletedProcess:
    return python_program("-m", "gpt2_variants", "check", *words)


def test_the_command_names_the_leak_and_ends_with_1(tmp_path):
    bad(tmp_path, "long_leak")
    out = check(str(tmp_path / "long_leak.py"), "--quick")
    assert out.returncode == 1, out.stderr
    assert re.search(
        r"BROKEN +no prediction depends .*\n +the prediction of token \d+ depends on token \d+", out.stdout
    )
    assert re.search(r"^kept +", out.stdout, flags=re.MULTILINE)
    assert re.search(r"^not applicable +", out.stdout, flags=re.MULTILINE)


@pytest.mark.slow
def test_the_command_as_json_of_a_good_one(monkeypatch):
    """Nothing is said beside it, such as DeepSpeed's warning that it finds no GPU."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    out = run_to_end([sys.executable, "-m", "gpt2_variants", "check", "gpt2", "--quick", "--json"], cwd=ROOT)
    assert (out.returncode, out.stderr) == (0, ""), out.stdout
    found = json.loads(out.stdout)
    assert (found["variant"], found["quick"], found["kept"]) == ("gpt2", True, True)
    assert [answer["promise"] for answer in found["promises"]] == list(PROMISES)


def test_the_command_of_a_file_that_cannot_be_asked(tmp_path):
    out = check(str(tmp_path / "nothing.py"))
    assert (out.returncode, out.stdout) == (2, "")
    assert out.stderr.startswith(f"error: {tmp_path}/nothing.py: cannot be read")


def test_an_error_on_the_way_is_a_finding(tmp_path):
    text = variant_examples.with_part(
        "broken", BAD["noise_in_evaluation"][2].replace("out = out +", "raise IndexError")
    )
    (tmp_path / "broken.py").write_text(
        text.replace("raise IndexError 1e-3 * torch.randn_like(out)", "raise IndexError('no')")
    )
    answers = list(ask(Subject(find(str(tmp_path / "broken.py")), quick=True), [PROMISES["cache"]]))
    assert not keeps_all(answers)
    assert answers[0].finding == "IndexError: no"
