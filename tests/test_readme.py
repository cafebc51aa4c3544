"""The README's commands exist, and say what they are said to do."""

import re
import shlex

import pytest
from conftest import ROOT, script

from gpt2_variants import VARIANTS, __main__
from gpt2_variants.run import make_parser

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
BENCHMARK = r"python benchmarks/(throughput|kernels|decode|data)\.py"
COMMANDS = [line.split(" #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


def of(kind: str) -> list[str]:
    return [c for c in COMMANDS if re.match(kind, c)]


def test_every_command_is_of_a_kind_that_is_tested_here():
    known = of("make ") + of(".*train_ds.py") + of("python -m gpt2_variants") + of("source .venv/bin/activate")
    known += of("pip install ") + of("python benchmarks/lm_eval/write_tasks.py") + of("lm_eval ")
    known += of(BENCHMARK)
    assert sorted(known) == sorted(COMMANDS)


@pytest.mark.parametrize("command", of("make "))
def test_make_targets_exist(command):
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("command", of(".*train_ds.py"))
def test_training_commands_parse(command):
    arguments = shlex.split(command.split("train_ds.py")[1])
    parsed = make_parser().parse_args(arguments)
    assert parsed.variant in VARIANTS


@pytest.mark.parametrize("command", of("python -m gpt2_variants"))
def test_small_commands_parse(command):
    assert __main__.make_parser().parse_args(shlex.split(command)[3:]).command in __main__.COMMANDS


@pytest.mark.parametrize("command", of(BENCHMARK))
def test_benchmark_commands_parse(command, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    _, path, *arguments = shlex.split(command)
    parsed = script(path.replace("kernels.py", "kernel_speed.py")).make_parser().parse_args(arguments)
    assert set(getattr(parsed, "variants", VARIANTS)) == set(VARIANTS)


@pytest.mark.parametrize("command", of("pip install "))
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
