"""The pages' commands: those that need nothing are run, in their order; of the others a page says what they need."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, finish, launch, script
from pages import COMMANDS, SHOWN, TEXTS, of

import train_ds
from gpt2_variants import VARIANTS, __main__
from gpt2_variants.config.command_line import make_parser

README = TEXTS["README.md"]
RESULTS = TEXTS["benchmarks/results/README.md"]
BENCHMARK = r"python benchmarks/(throughput|kernels|decode|data|on_gpu)\.py"
INSTALLED = r"(gpt2-variants|deepspeed .*--module gpt2_variants) train "
NEED_SOMETHING = {one.command for one in SHOWN if one.needs}
RUNNABLE = [command for command in COMMANDS if command not in NEED_SOMETHING]


def test_every_page_is_named_here():
    """All but the changelog and the tables that the programs write."""
    tracked = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    written = re.compile(r"benchmarks/results/[^/]+/|\.github/CHANGELOG.md")
    assert {name for name in tracked.stdout.split() if not written.match(name)} == TEXTS.keys()


@pytest.mark.parametrize("page", TEXTS)
def test_what_a_page_links_to_exists(page):
    for link in re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)):
        if not link.startswith(("https://", "http://", "#")):
            assert ((ROOT / page).parent / link.partition("#")[0]).exists(), link


def test_every_command_is_of_a_kind_that_is_tested_here():
    known = of("make ") + of(".*train_ds.py") + of("python -m gpt2_variants") + of("source .venv/bin/activate")
    known += of("pip install ") + of("python benchmarks/lm_eval/write_tasks.py") + of("lm_eval ")
    known += of(BENCHMARK) + of("wandb sync ") + of(INSTALLED)
    assert sorted(known) == sorted(COMMANDS)


def test_what_needs_nothing_does_what_it_says(tmp_path, monkeypatch, corpus, in_process, capfd):
    """In one folder, one after the other, as a reader would; the trainings cut short."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(corpus, "my.txt")
    before: set[Path] = set()
    for command in RUNNABLE:
        words = shlex.split(command)
        if "train_ds.py" in words:
            arguments = words[words.index("train_ds.py") + 1 :]
            steps = "3" if "--resume_from_checkpoint" in words else "2"
            arguments += ["--max_steps", steps, "--report_to", "none"]
            if "--num_gpus" in words:
                ranks = int(words[words.index("--num_gpus") + 1])
                arguments += ["--output_dir", str(tmp_path / "runs" / "ranks")]
                assert [code for code, _ in finish(launch(ranks, arguments))] == [0] * ranks, command
            else:
                assert train_ds.main(arguments) == 0, (command, capfd.readouterr().err)
        elif words[3:4] == ["compare"]:
            continue  # its runs have tests of their own
        elif words[:3] == ["python", "-m", "gpt2_variants"]:
            assert __main__.main(words[3:]) == 0, (command, capfd.readouterr().err)
            assert capfd.readouterr().out, command
        else:  # installation and benchmarks, which have tests of their own
            continue
        made = {path for path in tmp_path.rglob("*") if path.is_file()}
        if words[-1] != "--dry_run" and words[3:4] not in (["list"], ["generate"], ["evaluate"], ["data"]):
            assert made - before, f"{command} left nothing"
        before = made
    for run in ("gpt2", "duo_predict", "ranks", "drift-43", "drift", "my-blocks", "rotating_head"):
        assert json.loads(Path("runs", run, "run.json").read_text())["status"] == "finished"
    assert {"exported", "my-blocks", "runs"} <= {path.name for path in tmp_path.iterdir()}
    assert Path("runs/report/report.html").is_file()


@pytest.mark.parametrize("command", of("make "))
def test_make_targets_exist(command):
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("command", of(".*train_ds.py") + of(INSTALLED))
def test_training_commands_parse(command):
    arguments = shlex.split(re.split(r"train_ds\.py| train ", command)[1])
    parsed = make_parser().parse_args(arguments)
    assert parsed.variant in (*VARIANTS, "path/to/idea.py") or parsed.resume_from_checkpoint


@pytest.mark.parametrize("command", of("python -m gpt2_variants"))
def test_small_commands_parse(command):
    known, of_training = __main__.make_parser().parse_known_args(shlex.split(command)[3:])
    assert known.command in __main__.COMMANDS
    if of_training:
        assert __main__.COMMANDS[known.command].takes_options_of_training
        assert make_parser().parse_args(of_training)


@pytest.mark.parametrize("command", of(BENCHMARK))
def test_benchmark_commands_parse(command, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    _, path, *arguments = shlex.split(command)
    parsed = script(path.replace("kernels.py", "kernel_speed.py")).make_parser().parse_args(arguments)
    assert set(getattr(parsed, "variants", VARIANTS)) == set(VARIANTS)


@pytest.mark.parametrize("command", of("pip install -e "))
def test_extras_exist(command):
    extra = re.fullmatch(r"pip install -e '\.\[(\w+)\]'", command)[1]
    assert f'"{extra}": [' in (ROOT / "setup.py").read_text()


def test_the_harness_is_given_tasks_that_exist_where_they_were_written():
    ((command,), (scoring,)) = of("python benchmarks/lm_eval/write_tasks.py"), of("lm_eval ")
    written = script("benchmarks/lm_eval/write_tasks.py").make_parser().parse_args(shlex.split(command)[2:])
    words = shlex.split(scoring)[1:]
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options.keys() == {"--model", "--model_args", "--include_path", "--tasks", "--device", "--batch_size"}
    model_args = dict(pair.split("=") for pair in options["--model_args"].split(","))
    assert (options["--model"], model_args["trust_remote_code"]) == ("hf", "True")
    assert model_args["pretrained"] == str(written.run / "model")
    assert options["--include_path"] == str(written.output_dir)
    for task in options["--tasks"].split(","):
        assert f"task: {task}\n" in (ROOT / "benchmarks" / "lm_eval" / f"{task}.yaml").read_text()


def test_the_table_names_every_variant():
    for name in VARIANTS:
        assert f"| `{name}` |" in README


def test_the_results_are_those_that_were_measured():
    """Each figure of the table, rounded from the page that `compare` wrote."""
    page = (ROOT / "benchmarks/results/amd-epyc-2-cores/compare.md").read_text()

    def rows(text: str, heading: str) -> list[list[str]]:
        table = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)[1]
        cells = [[c.strip() for c in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
        return cells[2:]

    def numbers(cell: str) -> list[float]:
        return [float(n.replace("\N{MINUS SIGN}", "-")) for n in re.findall(r"[+\N{MINUS SIGN}]?\d+(?:\.\d+)?", cell)]

    ladder = (ROOT / "benchmarks/results/amd-epyc-2-cores/ladder.md").read_text()
    assert all(
        f"| {' | '.join([f'`{name}`', *cells])} |" in RESULTS for name, *cells in rows(ladder, "Compute multiplier")
    )
    against = {(row[0], row[2]): row for row in rows(page, "Against the baseline")}
    # of several lengths the one at equal data, which stands first
    quality = {row[0].partition(", total_steps")[0]: row for row in reversed(rows(page, "Validation"))}
    rates = {row[0]: float(row[-1]) for row in rows(page, "The learning rate of each, at nano: losses")}
    cost = {row[0]: float(row[2]) for row in rows(page, "Times the baseline's cost")}
    said = {row[0].replace("`", ""): row[1:] for row in rows(RESULTS, "Results so far") if len(row) == 9}
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
