"""The README: short, its picture of the figures that were measured, its output as the programs print it."""

import json
import re
from xml.etree import ElementTree

import pytest
import torch
from conftest import ROOT, from_benchmarks
from pages import TEXTS
from test_page_numbers import measured_on, numbers, rows

import train_ds
from gpt2_variants import report
from gpt2_variants.contract import PROMISES, Subject, ask, keeps_all, listed
from gpt2_variants.report.terminal import terminal_table
from gpt2_variants.variant_code import find

README = TEXTS["README.md"]
PAGE = ROOT / "benchmarks/results/amd-epyc-2-cores/compare.html"
SVG = "{http://www.w3.org/2000/svg}"
picture = from_benchmarks("picture")


def shown(first: str) -> list[str]:
    """The lines of the block without a language that begins so."""
    (block,) = re.findall(rf"```\n({re.escape(first)}.*?)```", README, flags=re.DOTALL)
    return block.splitlines()


def test_it_is_short_and_begins_with_a_picture_and_the_command_that_draws_it():
    assert len(README.splitlines()) <= 150
    link = "benchmarks/results/amd-epyc-2-cores/compare.svg"
    before, after = README.split(f"]({link})")
    assert before.count("\n## ") == 0
    assert after.lstrip().startswith(
        "```bash\npython benchmarks/picture.py benchmarks/results/amd-epyc-2-cores/compare.html"
    )
    assert (ROOT / link).is_file()


# --- the picture ------------------------------------------------------------------------------------------------------


def drawn() -> ElementTree.Element:
    return ElementTree.parse(PAGE.with_suffix(".svg")).getroot()


def texts(root: ElementTree.Element) -> list[str]:
    return [text for element in root.iter(f"{SVG}text") if (text := "".join(element.itertext()).strip())]


def test_the_picture_is_what_the_command_draws_today(picture, tmp_path, capsys):
    assert picture.main([str(PAGE), "--output", str(tmp_path / "now.svg")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "now.svg")
    now = ElementTree.parse(tmp_path / "now.svg").getroot()
    assert texts(now) == texts(drawn())
    assert [element.get("id") for element in now.iter()] == [element.get("id") for element in drawn().iter()]


def test_each_interval_of_the_picture_lies_where_the_measured_one_does():
    """All on one scale, which the first and the last give, from the table that `compare` wrote."""
    measured = [row for row in rows(measured_on("compare"), "Against the baseline") if row[2] == "FLOPs"]
    found = {group.get("id"): group for group in drawn().iter(f"{SVG}g")}
    ends = []
    for number in range(len(measured)):
        path = found[f"forest-interval{number}"].find(f"{SVG}path").get("d")
        (low, high) = re.findall(r"[ML] ([\d.]+) [\d.]+", path)
        ends.append((float(low), float(high)))
    wanted = [numbers(row[5])[1:] for row in measured]
    scale = (ends[-1][0] - ends[0][0]) / (wanted[-1][0] - wanted[0][0])
    for interval, (low, high) in zip(ends, wanted, strict=True):
        places = [ends[0][0] + (value - wanted[0][0]) * scale for value in (low, high)]
        assert interval == pytest.approx(places, abs=0.1)  # of 374 points
    said = texts(drawn())
    assert [text for text in said if text in ("better", "worse", "undecided")] == [row[8] for row in measured]
    assert {re.sub(", total_steps=.*", "", row[0]) for row in measured} <= set(said)


def test_the_curves_of_the_picture_are_means_over_the_seeds(picture):
    """Their last points, from the table that `compare` wrote; with them the best variant, the worst, and gpt2."""
    by_axis = picture.curves_of(picture.figures_of(PAGE))
    quality = {row[0]: row for row in rows(measured_on("compare"), "Validation") if row[7] == "163,840"}
    final = {picture.name_of(name): numbers(row[2])[0] for name, row in quality.items()}
    for lines in by_axis.values():
        assert lines[0].label == "gpt2"
        assert {line.label: pytest.approx(line.y[-1], abs=5e-5) for line in lines}.items() <= final.items()
        assert all(low <= y <= high for line in lines for low, y, high in zip(line.low, line.y, line.high, strict=True))
    others = [line.label for line in by_axis["tokens"][1:]]
    del final["gpt2"]
    assert (others[0], others[-1]) == (min(final, key=final.get), max(final, key=final.get))
    assert [line.x[-1] for line in by_axis["tokens"]] == [163_840] * 6


@pytest.mark.parametrize(
    "text", [None, "<html></html>", '<script type="application/json" id="data">{"differences": []}</script>']
)
def test_a_page_without_figures_is_refused(picture, text, tmp_path, capsys):
    if text is not None:
        (tmp_path / "x.html").write_text(text)
    assert picture.main([str(tmp_path / "x.html")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'x.html'}: ")
    assert not (tmp_path / "x.svg").exists()


# --- what the programs print ------------------------------------------------------------------------------------------


def test_the_verdict_is_what_a_report_on_these_runs_prints(picture, tmp_path):
    """The runs as the committed page holds them, judged anew."""
    folders = []
    for run in picture.figures_of(PAGE)["runs"]:
        weight = re.search(r"infill_weight=([\d.]+)", run["group"])
        evaluations = run["evaluations"]
        plan = {"variant": run["variant"], "seed": run["seed"], "train_batch_size": 16, "block_size": 64}
        plan |= {"total_steps": evaluations[-1]["steps"], "model": {"infill_weight": weight[1]} if weight else {}}
        facts = {"status": "finished", "variant": run["variant"], "plan": plan, "data_fingerprint": "one"}
        facts |= {"flops_per_token": evaluations[-1]["flops"] / evaluations[-1]["tokens"]}
        facts |= {"starts": [{"world_size": 1, "device": "AMD EPYC (2 cores)"}]}
        lines = []
        for record in evaluations:
            at = {"step": record["steps"], "elapsed_seconds": record["time"]}
            lines += [{**at, "loss": 0.0, "tokens": record["tokens"]}]
            lines += [{**at, **{key: value for key, value in record.items() if key.startswith("eval_")}}]
        folder = tmp_path / run["folder"]
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(facts))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folders.append(folder)
    groups = report.make_groups([report.read_run(folder) for folder in folders])
    printed = terminal_table(groups, report.judge(groups)).splitlines()
    (place,) = [n for n, line in enumerate(printed) if line.startswith("parallel_add ")]
    assert shown("run ") == [printed[0], printed[2], *printed[place : place + 3]]
    assert f"Of the picture's {len(folders)} runs" in README


LEAK = """
from torch import nn
from gpt2_variants.models.modeling_base import VariantLMHeadModel, VariantModel
from gpt2_variants.registry import Variant

class CentredNorm(nn.LayerNorm):
    def forward(self, hidden):
        return super().forward(hidden - hidden.mean(dim=1, keepdim=True))

class LeakModel(VariantModel):
    norm_class = CentredNorm

class LeakLMHeadModel(VariantLMHeadModel):
    transformer_class = LeakModel

VARIANT = Variant(name="leak", family="leak", summary="leaks", model=LeakLMHeadModel)
"""


def test_the_check_prints_this_of_a_norm_that_subtracts_the_mean_over_the_text(tmp_path):
    (tmp_path / "leak.py").write_text(LEAK)
    subject = Subject(find(str(tmp_path / "leak.py")), quick=True)
    first = [PROMISES[name] for name in ("no-leak-by-gradient", "no-leak-by-change", "sees-its-past")]
    printed = "\n".join(listed(answer) for answer in ask(subject, first))
    assert printed.splitlines() == shown("BROKEN")


@pytest.fixture
def idea(tmp_path, monkeypatch) -> str:
    """The file that the README shows."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(from torch import nn.*?)```", README, flags=re.DOTALL)
    (tmp_path / "idea.py").write_text(code)
    return "idea.py"


def test_the_idea_is_what_its_lines_say(idea):
    variant = find(idea)
    printed = dict(line.split(maxsplit=1) for line in shown("variant "))
    assert printed["variant"] == f"{variant.name}: {variant.summary}"
    model = variant.on_meta(variant.make_config("nano", 4000, 64))
    assert printed["parameters"] == f"{model.num_parameters():,}"
    assert {type(block.ln_1) for block in model.transformer.h} == {torch.nn.RMSNorm}


@pytest.mark.slow
def test_a_dry_run_of_the_idea_begins_as_shown(idea, capsys):
    assert train_ds.main(["--variant", idea, "--preset", "demo", "--dry_run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    places = [printed.index(line) for line in shown("variant ")]
    assert places[0] == 0
    assert places == sorted(places)


@pytest.mark.slow
def test_the_idea_keeps_the_quick_promises(idea):
    assert keeps_all(list(ask(Subject(find(idea), quick=True))))
