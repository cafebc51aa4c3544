"""The page of a report, read as HTML: what is drawn, that it stands alone, that nothing of a run is taken for HTML."""

import base64
import csv
import dataclasses
import io
import json
import math
import re
import urllib.parse
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from made_runs import SKIP, groups_of, make_run, row
from scipy import stats

from gpt2_variants import drawing, report
from gpt2_variants.report import charts as charts_module
from gpt2_variants.report.compared import compared

# --- a second stream stays apart --------------------------------------------------------------------------------------


@pytest.fixture
def charts(monkeypatch):
    """What is drawn: chart's y-label -> all the values of its lines, and their bands."""
    drawn = {}

    def chart(lines, x_label, y_label, log=False, level=None):
        drawn.setdefault(y_label, []).append(lines)
        return original(lines, x_label, y_label, log, level)

    original = drawing.chart
    monkeypatch.setattr(drawing, "chart", chart)
    return drawn


@pytest.mark.parametrize("recorded", [True, False], ids=["declared", "of an older run"])
def test_a_second_stream_is_in_no_next_token_column_and_in_no_next_token_chart(tmp_path, charts, recorded):
    base = make_run(tmp_path / "a")
    absent = {} if recorded else {"streams": "absent"}
    two = make_run(tmp_path / "b", "own", losses={10: 5.5, 20: 4.25}, further={SKIP: 3.125}, **absent)
    written = report.write([base, two])
    title = SKIP.title if recorded else "skip"
    skip = [f"{3.125:.4f}", f"{math.exp(3.125):.2f}", "0.0312"]
    assert row(written.text, title, "own")[2:] == skip
    assert row(written.text, "Validation", "own")[2:5] == ["4.2500", f"{math.exp(4.25):.2f}", "0.0425"]
    before, section = written.text.split(f"## {title}\n")
    section, _, after = section.partition("## ")
    for figure in skip:
        assert figure not in before + after
    assert "not comparable" in section
    page = "".join(Page(written.page.read_text()).text)
    assert page.count(title) >= 2  # of the table and of the chart
    assert (SKIP.caveat in section, SKIP.caveat in page) == (recorded, recorded)
    values = {label: {y for lines in axes for line in lines for y in line.y} for label, axes in charts.items()}
    assert values["perplexity"] == {math.exp(x) for x in (5.0, 4.0, 5.5, 4.25)}
    assert values["skip perplexity"] == {math.exp(3.125)}
    # the training loss of this run is that of both streams: the next token's alone was not logged
    assert {len(lines) for lines in charts["nats per prediction"]} == {1}
    of_training = [lines for lines in charts["nats per token"] if not lines[0].marked]
    assert len(of_training) == 4
    assert {len(lines) for lines in of_training} == {1}
    assert of_training[0][0].style.colour == drawing.INK


def test_each_stream_has_a_table_and_a_chart_of_its_own(tmp_path, charts):
    other = dataclasses.replace(SKIP, name="other", title="<b>Another</b>\n| one")
    one = make_run(tmp_path / "a", "one", further={SKIP: 3.0})
    two = make_run(tmp_path / "b", "two", further={SKIP: 3.5, other: 2.5})
    written = report.write([one, two])
    assert [row(written.text, SKIP.title, name)[2] for name in ("one", "two")] == ["3.0000", "3.5000"]
    assert row(written.text, "&lt;b>Another&lt;/b> | one", "two")[2] == "2.5000"
    assert "b" not in Page(written.page.read_text()).tags
    assert {len(lines) for lines in charts["skip perplexity"]} == {2}
    assert {len(lines) for lines in charts["other perplexity"]} == {1}
    # one chart of losses over two streams, one of losses over three, against four axes each
    assert [len(lines) for lines in charts["nats per prediction"]] == [1] * 8


def test_training_losses_of_the_next_token_are_compared_where_they_were_logged(tmp_path, charts):
    base, duo = make_run(tmp_path / "a"), make_run(tmp_path / "b", "duo_predict", further={SKIP: 3.0})
    records = [json.loads(line) for line in (duo / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if "loss" in record:
            record["next_token_loss"] = record["loss"] + 1
    (duo / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    report.write([base, duo])
    of_training = [lines for lines in charts["nats per token"] if not lines[0].marked]
    ours = {tuple(line.y) for lines in of_training for line in lines if line.label == "duo_predict"}
    assert ours == {(8.4, 8.3)}
    assert {tuple(line.y) for lines in of_training for line in lines if line.label == "gpt2"} == {(7.4, 7.3)}
    assert {tuple(line.y) for lines in charts["nats per prediction"] for line in lines} == {(7.4, 7.3)}


def test_a_curve_of_seeds_is_their_mean_in_a_band_over_common_steps(tmp_path, charts):
    runs = [
        make_run(tmp_path / "a", seed=1, losses={10: 5.0, 15: 4.6, 20: 4.0}),
        make_run(tmp_path / "b", seed=2, losses={10: 5.5, 20: 4.1}),
        make_run(tmp_path / "c", seed=3, losses={10: 5.1, 20: 4.4}),
    ]
    report.write(runs)
    by_axis = [lines for lines in charts["nats per token"] if lines[0].marked]
    places = ([1000, 2000], [10, 20], [20, 40], [1e6, 2e6])  # tokens, steps, seconds, FLOPs
    for (line,), expected in zip(by_axis, places, strict=True):
        assert line.x == pytest.approx(expected)
        assert line.y == pytest.approx([np.mean([5.0, 5.5, 5.1]), np.mean([4.0, 4.1, 4.4])])
        assert (line.low, line.high) == ([5.0, 4.0], [5.5, 4.4])


def test_long_curves_are_averaged_to_a_few_points(tmp_path, charts):
    folder = make_run(tmp_path / "a", losses={1000: 4.0}, every=1)
    report.write([folder])
    ((line,), *_) = (lines for lines in charts["nats per token"] if not lines[0].marked)
    assert len(line.y) == 200
    assert line.y[:2] == pytest.approx([7.5 - 0.03, 7.5 - 0.08])  # of steps 1-5 and 6-10


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Ids, references, links, tags and text of a page, what its scripts hold, and what its titles say."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.references, self.links, self.tags, self.text = [], [], [], [], []
        self.scripts, self.titles, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("script", "title"):
            self.open.append(tag)
            (self.scripts if tag == "script" else self.titles).append("")
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name == "href" and tag == "a":
                self.links.append(value)
            elif name in ("href", "src", "xlink:href", "srcset", "data", "action", "poster"):
                self.references.append(value)
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            (self.scripts if self.open[-1] == "script" else self.titles)[-1] += data
        else:
            self.text.append(data)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of two gpt2, a duo_predict and an unfinished run with hostile names."""
    evil = "<script>alert(1)</script>"
    tmp_path = tmp_path_factory.mktemp("hostile")
    runs = [make_run(tmp_path / f"a{n}", seed=n) for n in (1, 2)]
    runs.append(make_run(tmp_path / "<b onload=x>", "duo_predict", further={SKIP: 3.0}, git_commit='"><img src=x>'))
    runs.append(make_run(tmp_path / "c", evil, status="failed", reason=f"{evil} & | more", data=evil))
    return report.write(runs, tmp_path / "out")


def test_the_page_needs_nothing_outside_of_itself(written):
    text = written.page.read_text()
    page = Page(text)
    assert page.references
    assert not [r for r in page.references if not r.startswith("#")]
    # but for links that are followed on purpose: to the runs beside it, and to what it holds itself
    assert {link.split(":")[0] for link in page.links if ":" in link} == {"data"}
    assert "@import" not in text
    outside = [url for url in re.findall(r"https?://[^\s\"'<)]+", text) if not url.startswith("http://www.w3.org/")]
    assert outside == []
    assert page.tags.count("script") == 2
    assert sorted(p.name for p in written.page.parent.iterdir()) == ["report.html", "report.md"]


def test_ids_are_unique_and_references_lead_to_them(written):
    page = Page(written.page.read_text())
    assert len(page.ids) == len(set(page.ids)) > 100
    assert {r[1:] for r in page.references if r.startswith("#")} <= set(page.ids)


def test_what_comes_from_a_run_is_text_on_the_page_and_in_the_table(written):
    page = Page(written.page.read_text())
    assert "img" not in page.tags
    assert "b" not in page.tags
    text = "".join(page.text)
    assert "failed: <script>alert(1)</script> & | more" in text
    assert "<b onload=x>" in text
    assert [title for title in page.titles if "<script>alert(1)</script>" in title]
    assert "<" not in written.table.read_text()
    assert "&lt;script>alert(1)&lt;/script> & \\| more" in written.table.read_text()


def test_colours_are_the_pages_own_in_light_and_dark(written):
    text = written.page.read_text()
    assert text.count("<style") == 1
    body = text.split("</style>")[1]
    for light, dark in drawing.COLOURS.values():
        assert light not in body
        assert dark not in body
    assert set(re.findall(r"[:\"](#[0-9a-f]{6})\b", body)) <= {"#ffffff", "#000000"}
    assert set(re.findall(r"var\(--(\w+)\)", body)) <= set(drawing.COLOURS)
    assert "prefers-color-scheme:dark" in text


def test_each_chart_is_there_against_each_axis(written):
    page = Page(written.page.read_text())
    for chart in ("loss", "perplexity", "accuracy", "training", "stream-0", "training-together-0"):
        for axis in report.AXES:
            assert f"{chart}-{axis}-figure_1" in page.ids


def test_what_points_say_when_they_are_pointed_at(written):
    titles = Page(written.page.read_text()).titles
    assert "gpt2: 5 nats per token at 1,000 training tokens" in titles
    assert f"duo_predict: {math.exp(4):.5g} perplexity at 40 seconds of training" in titles


def test_the_same_figures_as_json_and_as_csv(written):
    page = Page(written.page.read_text())
    data = json.loads(page.scripts[0])
    assert [run["group"] for run in data["runs"]][:3] == ["gpt2", "gpt2", "duo_predict"]
    assert data["runs"][3]["variant"] == "<script>alert(1)</script>"
    assert "<" not in page.scripts[0]
    first = data["runs"][0]["evaluations"][0]
    assert first == {
        "tokens": 1000,
        "steps": 10,
        "time": 20.0,
        "flops": 1e6,
        "eval_loss": 5.0,
        "eval_perplexity": math.exp(5),
        "eval_accuracy": 0.05,
    }
    by_axis = {found["at_equal"]: found for found in data["differences"]}
    assert by_axis["tokens"]["loss"] == pytest.approx(0.0)
    assert by_axis["flops"]["loss"] == pytest.approx(1.0)  # at duo's first evaluation it stands where gpt2 ended
    files = [link.partition("base64,")[2] for link in page.links if link.startswith("data:")]
    evaluations, differences = (list(csv.DictReader(io.StringIO(base64.b64decode(f).decode()))) for f in files)
    assert [row["seed"] for row in evaluations] == ["1", "1", "2", "2", "42", "42", "42", "42"]
    assert float(evaluations[0]["eval_loss"]) == 5.0
    assert [row["verdict"] for row in differences] == ["too few seeds"] * len(by_axis)


def test_a_figure_that_is_no_number_is_null(tmp_path):
    run = make_run(tmp_path / "a")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "elapsed_seconds": 60.0, "eval_loss": NaN, "eval_perplexity": NaN}\n')
    page = Page(report.write([run]).page.read_text())
    last = json.loads(page.scripts[0], parse_constant=pytest.fail)["runs"][0]["evaluations"][-1]
    assert (last["steps"], last["eval_loss"]) == (30, None)


def test_links_lead_to_the_runs(written):
    page = Page(written.page.read_text())
    folders = [written.page.parent / urllib.parse.unquote(link) for link in page.links if "data:" not in link]
    assert len(folders) == 4
    assert all((folder / "run.json").is_file() for folder in folders)


def test_a_run_on_wandb_is_linked_and_nothing_else_that_calls_itself_a_url(tmp_path):
    urls = ["https://wandb.ai/me/p/runs/1", "javascript:alert(1)", None]
    runs = [make_run(tmp_path / str(n), seed=n, wandb_url=url) for n, url in enumerate(urls)]
    links = [link for link in Page(report.write(runs).page.read_text()).links if "data:" not in link]
    assert [link for link in links if ":" in link] == urls[:1]


# --- the page at a glance ---------------------------------------------------------------------------------------------


@pytest.fixture
def forest_rows(monkeypatch):
    """What forest plots are drawn of, and no curves."""
    drawn = []

    def forest(rows, x_label, zero):
        drawn.append((rows, zero))
        return original(rows, x_label, zero)

    original = drawing.forest
    monkeypatch.setattr(drawing, "forest", forest)
    monkeypatch.setattr(charts_module, "CHARTS", ())
    return drawn


def test_the_forest_plots_show_each_difference_with_its_interval(tmp_path, forest_rows):
    base = [make_run(tmp_path / f"g{n}", seed=n, losses={20: 4.0 + n / 100}) for n in range(3)]
    good = [make_run(tmp_path / f"d{n}", "drift", n, losses={20: 3.5 + n / 90}) for n in range(3)]
    alone = make_run(tmp_path / "p", "parallel", losses={20: 4.5})
    page = Page(report.write([*base, *good, alone]).page.read_text())
    assert len(forest_rows) == 3
    for (rows, zero), axis in zip(forest_rows, ("tokens", "flops", "time"), strict=True):
        assert zero == "gpt2"
        assert f"forest-{axis}-figure_1" in page.ids
        drift, parallel = rows
        losses = [[3.5 + n / 90 for n in range(3)], [4.0 + n / 100 for n in range(3)]]
        difference = np.mean(losses[0]) - np.mean(losses[1])
        interval = stats.ttest_ind(*losses, equal_var=False).confidence_interval()
        assert (drift.label, drift.word) == ("drift", "better")
        assert (drift.value, drift.low, drift.high) == pytest.approx((difference, *interval))
        assert (parallel.label, parallel.word) == ("parallel", "too few seeds")
        assert (parallel.value, parallel.low, parallel.high) == (pytest.approx(0.49), None, None)
    percent = f"{100 * math.expm1(difference):.2f}".replace("-", "\N{MINUS SIGN}")
    (said,) = {title for title in page.titles if title.startswith("drift less gpt2")}
    assert f"perplexity {percent} % (" in said
    assert said.endswith("better")


def test_words_of_a_forest_plot_differ_by_more_than_colour():
    rows = [
        drawing.Row(word, 0.1, *((None, None) if word == "too few seeds" else (0.05, 0.15)), word, "")
        for word in drawing.SIGNS
    ]
    with drawing.look():
        axes = drawing.forest(rows, "nats", "gpt2").figure.axes[0]
    marked = [line for line in axes.get_lines() if line.get_marker() not in ("", "None", None)]
    looks = {(line.get_marker(), line.get_markerfacecolor() == line.get_color()) for line in marked}
    assert len(looks) == len(marked) == len(rows) - 1 == 3  # without an interval there is no mark
    assert {text.get_text() for text in axes.texts} == {"gpt2", *drawing.SIGNS}


def test_what_was_compared_is_told_once_and_what_differs_by_variant(tmp_path, forest_rows):
    common = {"data_fingerprint": "ab" * 32, "versions": {"torch": "2.99"}, "git_commit": "c0ffee"}
    asked = {"preset": "demo", "max_steps": 20, "model_args": {"n_layer": 2}, "bf16": False, "report_to": []}
    base = make_run(tmp_path / "a", **common, asked={"variant": "gpt2", **asked})
    ours = make_run(
        tmp_path / "b",
        "drift",
        **common,
        options={"learning_rate": 0.5},
        asked={"variant": "drift", **asked, "seed": 7},
    )
    box = compared(groups_of(base, ours))
    told = dict(box.common)
    assert told["fingerprint of the data"] == "ab" * 8
    assert told["versions"] == "torch 2.99"
    assert told["git commit"] == "c0ffee"
    assert told["device"] == "1 x A CPU (2 cores)"
    assert box.apart.head == ["run", "learning rate"]
    assert box.apart.rows == [["gpt2", "0.001"], ["drift", "0.5"]]
    words = (
        "python train_ds.py --variant {} --preset demo --max_steps 20 --model_args n_layer=2 --no-bf16 --report_to none"
    )
    assert box.commands == [("gpt2", words.format("gpt2")), ("drift", words.format("drift") + " --seed 7")]
    same = make_run(tmp_path / "c", "parallel", **common, asked={"variant": "parallel", **asked})
    own = make_run(tmp_path / "d", "idea", **common, asked={"variant": "my/idea.py", **asked})
    assert compared(groups_of(base, same, own)).commands == [
        ("gpt2, parallel", words.format("VARIANT")),
        ("idea", words.format("my/idea.py")),
    ]
    text = " ".join(Page(report.write([base, ours]).page.read_text()).text)
    assert text.count("torch 2.99") == 1
    assert words.format("gpt2") in text


def test_a_plan_of_a_run_is_told_in_the_box(tmp_path):
    plan = {
        "size": "nano",
        "model": {"n_layer": 4, "n_head": 6, "n_embd": 192, "vocab_size": 4000, "leak_free": True},
        "block_size": 64,
        "train_batch_size": 16,
        "learning_rate": 0.002,
        "chosen": ["learning_rate=0.002"],
        "total_steps": 20,
        "warmup_steps": 2,
        "schedule": {"type": "WarmupDecayLR", "params": {}},
        "tokenizer": "builtin",
        "precision": "bf16",
        "init_from": None,
        "seed": 3,
    }
    plan["model"] |= {"initializer_range": 0.05, "resid_pdrop": 0.1}
    told = dict(compared(groups_of(make_run(tmp_path / "a", plan=plan))).common)
    assert told["size and shape"] == "nano, 4 layers, 6 heads, 192 wide"
    assert told["batch"] == "16 sequences a step, 1,024 tokens"
    assert told["steps"] == "20, 2 of them warm-up, WarmupDecayLR"
    assert told["learning rate"] == "0.002, the preset's"
    assert told["initialisation"] == "random, initializer_range 0.05"
    assert (told["dropout"], told["precision"]) == ("resid_pdrop 0.1", "bf16, float32 master weights")
    assert told["other fields of the config"] == "leak_free True"


def test_each_variant_is_told_in_a_sentence_and_its_figures_and_notes_below_it(tmp_path, forest_rows):
    base = [make_run(tmp_path / f"g{n}", seed=n, losses={20: 4.0 + n / 100}) for n in range(3)]
    good = [make_run(tmp_path / f"d{n}", "duo_predict", n, losses={20: 3.5 + n / 90}) for n in range(3)]
    lines = [line.strip() for line in Page(report.write([*base, *good]).page.read_text()).text]
    assert "duo_predict: better at equal data and time." in lines  # half the data cost as much: no evaluation yet
    (figures,) = [line for line in lines if line.startswith("duo_predict against gpt2: at equal data")]
    assert lines.index("duo_predict: better at equal data and time.") < lines.index(figures)


# --- many groups, and few ---------------------------------------------------------------------------------------------


def test_fourteen_groups_get_a_panel_each_beside_the_baseline(tmp_path, monkeypatch):
    monkeypatch.setattr(charts_module, "CHARTS", charts_module.CHARTS[:1])
    monkeypatch.setattr(charts_module, "AXES", ("tokens",))
    names = ["gpt2", *(f"idea{n}" for n in range(13))]
    runs = [make_run(tmp_path / name, name, losses={10: 5 + n, 20: 4 + n / 9}) for n, name in enumerate(names)]
    page = Page(report.write(runs).page.read_text())
    for n, name in enumerate(names[1:]):
        assert f"loss-tokens-panel{n}-line0" in page.ids  # the baseline's
        assert f"loss-tokens-panel{n}-line1" in page.ids
        assert f"{name}: {6 + n} nats per token at 1,000 training tokens" in page.titles
        assert page.text.count(name) >= 4  # in the forest plots' rows, the legend and the panel
    assert "loss-tokens-panel13-line0" not in page.ids


def test_panels_have_one_scale_and_show_the_references_in_each():
    styles = drawing.styles([True] + [False] * 8)
    lines = [
        drawing.Line(style, [1e6, 2e6], [n, n + 1], label=str(n), reference=n == 0) for n, style in enumerate(styles)
    ]
    with drawing.look():
        figure = drawing.chart(lines, "tokens", "nats").figure
        figure.canvas.draw()
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 8
    assert {axes.get_ylim() for axes in panels} == {panels[0].get_ylim()}
    for number, axes in enumerate(panels, start=1):
        assert [list(line.get_ydata()) for line in axes.get_lines()] == [[0, 1], [number, number + 1]]
    ticks = {label.get_text() for label in panels[-1].get_xticklabels()}
    assert ticks >= {"0", "800\N{THIN SPACE}k", "1.6\N{THIN SPACE}M"}


def test_an_svg_is_the_pages_own():
    with drawing.look():
        figure, axes = drawing.new_axes()
        axes.plot([1, 2], [3, 4], marker="o", color=drawing.PALETTE[0], gid="mine")
        axes.plot([1, 2], [4, 5], color=drawing.PALETTE[1], gid="other")
        axes.imshow([[0, 1]])
    text = drawing.svg(figure, "name", 'a <"label">', {"mine": ["first & <b>", "second"], "other": "all of it"})
    root = ElementTree.fromstring(text)
    assert root.tag == "svg"
    assert root.get("aria-label") == 'a <"label">'
    assert not {"width", "height"} & set(root.keys())
    assert not {element.tag for element in root.iter()} & {"metadata", "style"}
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert all(one.startswith("name-") for one in ids)
    assert [title.text for title in root.iter("title")] == ["first & <b>", "second", "all of it"]
    (image,) = root.iter("image")
    assert base64.b64decode(image.get("href").removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert image.get("id") in ids
    assert {use.get("href") for use in root.iter("use")} <= {f"#{one}" for one in ids}
    (mine,) = [element for element in root.iter() if element.get("id") == "name-mine"]
    assert "stroke:var(--c0)" in mine.find("path").get("style")
    with pytest.raises(ValueError, match="no artist"):
        drawing.svg(figure, "name", "", {"nothing": "x"})
    with pytest.raises(ValueError, match="2 markers, and 1 texts"):
        drawing.svg(figure, "name", "", {"mine": ["x"]})


def test_styles_tell_many_groups_apart():
    found = drawing.styles([True, True] + [False] * 20)
    assert len(set(found)) == len(found)
    assert {style.colour for style in found[:2]} == {drawing.INK}
    assert drawing.INK not in {style.colour for style in found[2:]}
    assert {style.variable for style in found} < set(drawing.COLOURS)


def test_a_command_adds_sections_and_rows_of_its_own(tmp_path):
    with drawing.look():
        figure, axes = drawing.new_axes()
        axes.plot([1, 2], [3, 4], color=drawing.PALETTE[0], label="of <i>drift")
    table = report.Table("Tried", "lr", ("rate", "loss"), [["<i>1", "2"]], "How to read it.")
    section = report.Section("Tuning", ["The rate <b>won</b>."], [table], [("tuning-loss", "Rates", "A cap.", figure)])
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", "drift")]
    written = report.write(runs, sections=[section], about=[("Rates tried", "1 & 2")])
    page = Page(written.page.read_text())
    text = "".join(page.text)
    for part in (
        "Tuning",
        "The rate <b>won</b>.",
        "<i>1",
        "How to read it.",
        "Rates",
        "A cap.",
        "Rates tried",
        "1 & 2",
    ):
        assert part in text
    assert "of <i>drift" in text  # a figure without a legend of its own gets one beside it
    assert "tuning-loss-figure_1" in page.ids
    places = ("Is it better?", "Rates tried", "Tuning", "Curves", "Against the baseline", "\nRuns")
    assert sorted(places, key=text.index) == list(places)
    for part in ("## Tuning", "- Rates tried: 1 & 2", "| &lt;i>1 | 2 |", "Rates. A cap."):
        assert part in written.text


def test_the_same_runs_give_the_same_page(tmp_path):
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", "drift")]
    pages = [report.write(runs, tmp_path / out).page.read_bytes() for out in "xy"]
    assert pages[0] == pages[1]
