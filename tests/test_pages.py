"""The pages' commands: those that need nothing are run, in their order; of the others a page says what they need."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, finish, launch, script
from pages import COMMANDS, SHOWN, TEXTS, of

import train_ds
from gpt2_variants import VARIANTS, __main__
from gpt2_variants.config.command_line import make_parser, split_num_gpus

BENCHMARK = r"python benchmarks/(throughput|kernels|decode|data|on_gpu|picture)\.py"
INSTALLED = r"(gpt2-variants|deepspeed .*--module gpt2_variants) train "
NEED_SOMETHING = {one.command for one in SHOWN if one.needs}
RUNNABLE = [command for command in COMMANDS if command not in NEED_SOMETHING]
AT_FULL_SIZE = [command for command in RUNNABLE if command.endswith("--preset seed --dry_run")]


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
        if link.startswith(("https://", "http://")):
            continue
        path, _, heading = link.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), link
        if heading:
            words = re.findall(r"^#+ (.+)$", linked.read_text(), flags=re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in words], link


def test_every_command_is_of_a_kind_that_is_tested_here():
    known = of("make ") + of(".*train_ds.py") + of("python -m gpt2_variants") + of("source .venv/bin/activate")
    known += of("pip install ") + of("python benchmarks/lm_eval/write_tasks.py") + of("lm_eval ")
    known += of(BENCHMARK) + of("wandb sync ") + of(INSTALLED) + of("git clone ")
    assert sorted(known) == sorted(COMMANDS)


def test_what_needs_nothing_does_what_it_says(tmp_path, monkeypatch, corpus, in_process, capfd):
    """In one folder, one after the other, as a reader would; trainings cut short."""
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text("".join(corpus.read_text().splitlines(keepends=True)[:800]))
    before: set[Path] = set()
    for command in RUNNABLE:
        words = shlex.split(command)
        if command in AT_FULL_SIZE:
            continue  # has a test of its own, which is slow
        if "train_ds.py" in words:
            arguments = words[words.index("train_ds.py") + 1 :]
            steps = "3" if "--resume_from_checkpoint" in words else "2"
            arguments += ["--max_steps", steps, "--report_to", "none"]
            ranks, arguments = split_num_gpus(arguments)
            if ranks is not None:
                arguments += ["--output_dir", str(tmp_path / "runs" / "ranks")]
                assert [code for code, _ in finish(launch(int(ranks), arguments))] == [0] * int(ranks), command
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
        if words[3:4] not in (["list"], ["generate"], ["evaluate"], ["data"]):
            assert made - before, f"{command} left nothing"
        before = made
    for run in ("gpt2", "duo_predict", "ranks", "drift-43", "drift", "my-blocks", "rotating_head"):
        assert json.loads(Path("runs", run, "run.json").read_text())["status"] == "finished"
    assert {"exported", "my-blocks", "runs"} <= {path.name for path in tmp_path.iterdir()}
    assert Path("runs/report/report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", AT_FULL_SIZE)
def test_a_dry_run_at_full_size_says_what_the_page_says(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train_ds.main([*shlex.split(command)[2:], "--report_to", "none"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^steps +17,815 of 64 x 512 tokens, ", printed, flags=re.MULTILINE)
    assert re.search(r"^ +1,024 ", printed, flags=re.MULTILINE)


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
    """Their names are spelled as metadata spell them: the pip that comes with Python 3.11 finds no other."""
    extra = re.fullmatch(r"pip install -e '\.\[([a-z0-9-]+)\]'", command)[1]
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
