"""The figures of the pages are those of `benchmarks/results/`, and of the models themselves."""

import json
import re

import pytest
from conftest import ROOT
from pages import TEXTS

from gpt2_variants import VARIANTS

README = TEXTS["README.md"]
RESULTS = TEXTS["benchmarks/results/README.md"]
# page -> what is said -> heading, first cells of the row, and columns there
MEASURED = {
    "kernels": {
        "time of the loss head over the plain one's, 8,192 x 1,024 x 50,304": ("Loss head", ["ours", "bfloat16"], [5]),
        "its peak memory over the plain one's": ("Loss head", ["ours", "bfloat16"], [9]),
        "speed of duo-predict's step over the same with a dense mask, 512 tokens, dropout 0.1": (
            "Training step of duo_predict",
            ["bfloat16", "0.1"],
            [4, 5, 6],
        ),
    },
    "throughput": {
        "speed of the stock loop over gpt2's, demo size": ("References", ["stock"], [12, 13, 14]),
        "speed of a plain loop over DeepSpeed's, gpt2, demo size": ("References", ["gpt2, plain loop"], [12, 13, 14]),
        "positions/s of the slowest variant over gpt2's, `rotating_head_norm`": (
            "Variants",
            ["rotating_head_norm"],
            [11, 12, 13],
        ),
        "positions/s of the fastest variant over gpt2's, `parallel`": ("Variants", ["parallel"], [11, 12, 13]),
    },
    "data": {
        "milliseconds of the data loader for 64 x 1,024 tokens": ("Data loader", ["64 x 1024"], [2, 3, 4]),
        "MB/s of tokenising with GPT-2's tokenizer, 1 process": ("Tokenising", ["1"], [1]),
        "MB/s of tokenising with GPT-2's tokenizer, 2 processes": ("Tokenising", ["2"], [1]),
        "speed of preparing 2,000 MB over that of Hugging Face's run_clm.py": ("Preparing", ["2,000"], [4]),
        "its memory over that of run_clm.py": ("Preparing", ["2,000"], [7]),
    },
}


def measured_on(name: str) -> str:
    """The page of a measurement, as the program wrote it."""
    return (ROOT / f"benchmarks/results/amd-epyc-2-cores/{name}.md").read_text()


def test_the_table_names_every_variant():
    for name in VARIANTS:
        assert f"| `{name}` |" in README


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the tables under a heading."""
    table = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)[1]
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return cells[2:]


def numbers(cell: str) -> list[float]:
    """The numbers of a cell, with a typographic minus or without."""
    return [float(n.replace("\N{MINUS SIGN}", "-")) for n in re.findall(r"[+\N{MINUS SIGN}]?\d+(?:\.\d+)?", cell)]


def test_the_results_are_those_that_were_measured():
    """Each figure of the table, rounded from the page that `compare` wrote."""
    page = measured_on("compare")
    ladder = measured_on("ladder")
    assert all(
        f"| {' | '.join([f'`{name}`', *cells])} |" in RESULTS for name, *cells in rows(ladder, "Compute multiplier")
    )
    against = {(row[0], row[2]): row for row in rows(page, "Against the baseline")}
    # of several lengths the one at equal data, which stands first
    quality = {row[0].partition(", total_steps")[0]: row for row in reversed(rows(page, "Validation"))}
    rates = {row[0]: float(row[-1]) for row in rows(page, "The learning rate of each, at nano: losses")}
    cost = {row[0]: float(row[2]) for row in rows(page, "Times the baseline's cost")}
    said = {
        row[0].replace("`", ""): row[1:]
        for row in rows(RESULTS, "Is a variant better? Eleven variants and GPT-2, each at its own learning rate")
        if len(row) == 9
    }
    assert {name.split(",")[0] for name in said} == VARIANTS.keys()
    for name, (rate, perplexity, data, at_data, flops, at_flops, per_token, _) in said.items():
        measured = name if name in quality else f"{name}, infill_weight=1.0"
        assert float(rate) == rates[name.replace(", ", ",")]
        assert numbers(perplexity) == pytest.approx(numbers(quality[measured][3])[:2], abs=0.0501)
        if name == "gpt2":
            continue
        for figures, word, measure in ((data, at_data, "tokens"), (flops, at_flops, "FLOPs")):
            row = against[measured, measure]
            assert numbers(figures) == pytest.approx(numbers(row[5]), abs=0.000501)
            assert word == row[8]
            assert not row[3].endswith("cut")
        assert float(per_token) == cost[measured]


def test_the_readmes_results_are_the_pages():
    """The same cells, and one verdict where both are the same."""
    whole = {
        row[0]: row
        for row in rows(RESULTS, "Is a variant better? Eleven variants and GPT-2, each at its own learning rate")
    }
    said = rows(README, "Results so far")
    assert len(said) >= 6
    for name, perplexity, data, flops, word in said:
        _, _, *cells = whole[name]
        assert [perplexity, data, flops] == [cells[0], cells[1], cells[3]]
        assert {word} == {cells[2], cells[4]}


def test_the_benchmarks_are_those_that_were_measured():
    """Each figure of the page on benchmarks, rounded from the page that its line names."""
    pages = {name: measured_on(name) for name in MEASURED}
    said = {row[0]: numbers(row[1]) for row in rows(TEXTS["benchmarks/README.md"], "What was measured")}
    assert len(said) == sum(map(len, MEASURED.values()))
    for page, figures in MEASURED.items():
        for what, (heading, first, columns) in figures.items():
            (row,) = [row for row in rows(pages[page], heading) if row[: len(first)] == first]
            assert said[what] == [pytest.approx(numbers(row[column])[0], abs=0.0051) for column in columns], what


def test_the_slowest_and_the_fastest_variant_are_those_that_are_named():
    measured = rows(measured_on("throughput"), "Variants")
    speed = {row[0]: float(row[11]) for row in measured if row[0] != "gpt2"}
    assert (min(speed, key=speed.get), max(speed, key=speed.get)) == ("rotating_head_norm", "parallel")


def test_the_scores_are_those_that_the_harness_gave():
    page = TEXTS["benchmarks/lm_eval/README.md"]
    scores = json.loads((ROOT / "benchmarks/results/amd-epyc-2-cores/lm_eval.json").read_text())["scores"]
    assert len(scores) == page.count("\n| `")
    for name, of in scores.items():
        accuracy, error = (100 * of[key] for key in ("cloze_accuracy", "cloze_accuracy_stderr"))
        assert f"| `{name}` | {of['bits_per_byte']:.3f} | {accuracy:.1f} ± {error:.2f} % |" in page


def test_what_contradicts_the_results_is_what_was_measured():
    found = {row[0]: row for row in reversed(rows(measured_on("compare-builtin"), "Against the baseline"))}
    told = " ".join(RESULTS.split())
    for name, verdict in (("parallel", "worse"), ("rotating_head", "better")):
        assert (found[name][2], found[name][8]) == ("tokens", verdict)
        mean, _, interval = found[name][5].partition(" ")
        assert f"of `{name}` less GPT-2's is {mean} nats {interval}, {verdict}" in told
    assert "`parallel` worse than GPT-2, and so has a comparison here on another text" in TEXTS["README.md"]


def test_the_kills_are_those_of_the_soak():
    (total,) = (line.split("|") for line in measured_on("soak").splitlines() if line.startswith("| all |"))
    runs, kills = total[4].strip(), total[5].strip()
    assert int(kills) >= 300
    assert f"After {kills} SIGKILLs each of\nthe {runs} runs had" in RESULTS
    assert f"a soak of {kills} SIGKILLs" in TEXTS["gpt2_variants/training/README.md"]


def test_the_parameters_of_the_mathematics_are_the_variants():
    """Those that a variant has more than GPT-2 at Medium's size, as its record counts them, and by the formula."""
    values = {"L": 24, "E": 1024, "D": 64}
    table = rows(TEXTS["gpt2_variants/models/MATHEMATICS.md"], "What each one adds")
    for name, model_type, _, formula, more in table:
        variant = VARIANTS[name.strip("`")]
        count = variant.num_parameters() - VARIANTS["gpt2"].num_parameters()
        assert f"`{variant.config_class.model_type}`" == model_type
        assert int(more.replace(",", "").replace("\N{MINUS SIGN}", "-")) == count
        if variant.name == "duo_predict":
            assert count == 1024 - 512 * 1024
        else:
            formula = formula.replace("E²", "E * E").replace("L (", "L * (")
            assert eval(re.sub(r"(?<=\w) (?=[A-Z])", " * ", formula), values) == count
