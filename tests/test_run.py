"""What is asked, what it resolves to, and what is wrong with it."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, python_program

import train_ds
from gpt2_variants import VARIANTS
from gpt2_variants import __main__ as commands
from gpt2_variants.config import checks
from gpt2_variants.config.command_line import make_parser, parse
from gpt2_variants.config.deepspeed_json import compiles, resolve_ds_config
from gpt2_variants.config.options import Options, option_fields
from gpt2_variants.config.presets import PRESETS
from gpt2_variants.config.resolve import resolve
from gpt2_variants.faults import UsageError
from gpt2_variants.training.outcome import Trained


@pytest.fixture
def ask(corpus, tmp_path):
    """Parse a run on the test corpus in an empty folder."""

    def parsed(*more: str, variant: str = "duo_predict"):
        given = ["--variant", variant, "--preset", "demo", "--dataset", str(corpus), "--report_to", "none"]
        out = [] if "--output_dir" in more else ["--output_dir", str(tmp_path / "run")]
        return parse([*given, *out, *more])

    return parsed


def faults(ask, *more: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        ask(*more)
    for line in caught.value.lines:
        assert "\n" not in line
    return caught.value.lines


def test_the_seed_preset_is_the_recipe():
    """The recipe of gpt2_variants/training/README.md, field by field."""
    asked = resolve(Options(variant="gpt2", preset="seed"))
    assert (asked.dataset, asked.size, asked.num_train_epochs, asked.warmup_ratio) == (
        "wikitext-103",
        "gpt2-medium",
        5,
        0.1,
    )
    assert (asked.eval_steps, asked.save_steps, asked.logging_steps, asked.save_total_limit, asked.seed) == (
        500,
        500,
        100,
        5,
        42,
    )
    assert asked.report_to == ("wandb",)
    config = resolve_ds_config(asked, world=1, total_steps=8910)
    assert config["train_batch_size"] == config["train_micro_batch_size_per_gpu"] == 64
    assert config["bf16"]["enabled"] is True
    assert config["gradient_clipping"] == 1.0
    assert config["optimizer"]["type"] == "AdamW"
    assert config["optimizer"]["params"]["lr"] == 1e-4
    assert config["optimizer"]["params"]["weight_decay"] == 0.01
    schedule = config["scheduler"]["params"]
    assert schedule["warmup_type"] == "linear"
    assert (schedule["warmup_num_steps"], schedule["total_num_steps"], schedule["warmup_max_lr"]) == (891, 8910, 1e-4)
    model = asked.make_config(50257)
    assert (model.n_layer, model.n_embd, model.n_head, model.n_positions, model.resid_pdrop) == (
        24,
        1024,
        16,
        1024,
        0.1,
    )


@pytest.mark.parametrize(("variant", "block_size"), [("gpt2", 1024), ("duo_predict", 512)])
def test_block_size_is_the_variants_and_the_model_has_the_positions_that_are_trained(variant, block_size):
    asked = resolve(Options(variant=variant, preset="seed"))
    assert asked.block_size == asked.make_config(50257).n_positions == block_size
    shorter = resolve(Options(variant=variant, preset="seed", block_size=64))
    assert shorter.make_config(50257).n_positions == 64


@pytest.mark.parametrize("world", [1, 2, 8, 64])
def test_the_global_batch_is_the_same_on_any_number_of_gpus(world, ask):
    config = resolve_ds_config(ask("--train_batch_size", "64"), world, total_steps=10)
    assert config["train_batch_size"] == 64
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * world == 64


def test_the_batch_per_device_scales_the_global_one_or_is_accumulated(ask):
    scaled = resolve_ds_config(ask("--per_device_train_batch_size", "4"), 8, total_steps=10)
    # the demo preset fixes the global batch; an explicit size per device alone replaces it
    assert (scaled["train_batch_size"], scaled["gradient_accumulation_steps"]) == (32, 1)
    both = resolve_ds_config(ask("--per_device_train_batch_size", "4", "--train_batch_size", "64"), 8, total_steps=10)
    assert (both["train_batch_size"], both["gradient_accumulation_steps"]) == (64, 2)


def test_a_number_of_gpus_that_does_not_divide_the_batch_is_told_which_do(ask):
    with pytest.raises(UsageError, match=r"train_batch_size 64 does not divide over 3 GPUs.*: 1, 2, 4, 8, 16, 32, 64$"):
        resolve_ds_config(ask("--train_batch_size", "64"), 3, total_steps=10)
    with pytest.raises(UsageError, match=r"--per_device_train_batch_size 5.*sizes that do: 1, 2, 4, 8, 16, 32"):
        resolve_ds_config(ask("--train_batch_size", "64", "--per_device_train_batch_size", "5"), 2, total_steps=10)


def test_an_option_wins_over_the_json_and_an_explicit_json_over_the_preset(ask, tmp_path):
    given = json.loads((ROOT / "ds_configs/zero1.json").read_text())
    given["train_batch_size"] = 24
    given["optimizer"]["params"]["lr"] = 5e-4
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(given))
    config = resolve_ds_config(ask("--deepspeed_config", str(path)), 1, 10)
    assert (config["train_batch_size"], config["optimizer"]["params"]["lr"]) == (24, 5e-4)
    config = resolve_ds_config(
        ask("--deepspeed_config", str(path), "--train_batch_size", "6", "--learning_rate", "1"), 1, 10
    )
    assert (
        config["train_batch_size"],
        config["optimizer"]["params"]["lr"],
        config["scheduler"]["params"]["warmup_max_lr"],
    ) == (6, 1, 1)
    config = resolve_ds_config(ask(), 1, 10)
    assert config["train_batch_size"] == PRESETS["demo"]["train_batch_size"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--block_size", "513", "--model_args", "n_positions=512"), "--block_size 513: the model has 512 positions"),
        (("--block_size", "1"), "--block_size 1: at least 2 is needed"),
        (("--block_size", "x"), "--block_size x: not a whole number"),
        (("--max_steps", "0"), "--max_steps 0: at least 1"),
        (("--learning_rate", "-1"), "--learning_rate -1: at least 0 is needed"),
        (("--learning_rate", "nan"), "--learning_rate nan"),
        (("--warmup_ratio", "2"), "--warmup_ratio 2: at most 1 is allowed"),
        (("--size", "huge"), "--size huge: not known; one of pico, nano, micro, mini, gpt2,"),
        (
            ("--model_args", "layers=3"),
            "--model_args layers: duo_predict has no such config field; it has vocab_size, ",
        ),
        (("--model_args", "n_layer"), "--model_args n_layer: not of the form FIELD=VALUE"),
        (("--model_args", "n_layer=two"), "--model_args: Validation error for field 'n_layer'"),
        (("--model_args", "n_embd=100", "n_head=3"), "n_embd=100: not a multiple of n_head=3"),
        (("--model_args", "resid_pdrop=1.5"), "resid_pdrop=1.5"),
        (("--model_args", "activation_function=foo"), "activation_function=foo: one of "),
        (("--model_args", "add_cross_attention=true"), "duo_predict has no such config field"),
        (("--model_args", "leak_free=maybe"), "leak_free='maybe': true or false"),
        (("--model_args", "n_head=0"), "n_head=0: at least 1"),
        (("--warmup_ratio", "nan"), "--warmup_ratio nan: at most 1 is allowed"),
        (("--train_batch_size", "0"), "--train_batch_size 0: at least 1"),
        (("--deepspeed_config", "nowhere.json"), "--deepspeed_config nowhere.json: no such file"),
        (("--resume_from_checkpoint", "nowhere"), "--resume_from_checkpoint nowhere: no such folder"),
        (("--dataset", "nowhere.txt"), "--dataset nowhere.txt"),
        (
            ("--report_to", "tensorbord"),
            "--report_to tensorbord: not known (did you mean tensorboard?); any of wandb, ",
        ),
        (("--report_to", "wandb", "none"), "--report_to wandb none: none means no tracker"),
        (("--frobnicate", "1"), "unrecognized arguments: --frobnicate"),
        (("--learning_rte", "1"), "unrecognized arguments: --learning_rte; did you mean --learning_rate?"),
        (("--fp16",), "--fp16: not an option here; give --bf16, or --no-bf16 for float32"),
        (("--lr=1e-3",), "--lr: not an option here; give --learning_rate"),
        (("--evaluation_strategy", "steps"), "--evaluation_strategy: not an option here; give --eval_steps"),
        (("--overwrite_output_dir",), "a run is never overwritten"),
        (("stray",), "unrecognized arguments: stray; options begin with --"),
        (("--compile", "perhaps"), "--compile perhaps: true or false is needed"),
        (("--gradient_accumulation_steps", "3"), "gradient_accumulation_steps 3 does not divide 16 sequences"),
        (("--adam_beta2", "1"), "--adam_beta2 1: less than 1 is needed"),
        (("--lr_scheduler_type", "cosin"), "--lr_scheduler_type cosin: not known (did you mean cosine?)"),
    ],
)
def test_one_fault_is_one_line(options, message, ask):
    lines = faults(ask, *options)
    assert len(lines) == 1
    assert message in lines[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"train_batch_size": 8,}', "not valid JSON: line 1, column"),
        ("[1]", "a DeepSpeed config is a JSON object, not a list"),
        ('{"train_batch_size": 8, "zero_optimisation": {}}', "section 'zero_optimisation' has no effect"),
        ('{"train_batch_size": 8, "zero_optimization": {"stage": "auto"}}', '"auto" at zero_optimization.stage'),
        ('{"train_batch_size": 8, "fp16": {"enabled": true}}', "fp16 and amp are not supported"),
        ('{"train_batch_size": 8.5}', "batch sizes are whole numbers"),
        ('{"train_batch_size": 8, "optimizer": "AdamW"}', "'optimizer' must be a JSON object"),
        ('{"optimizer": {"type": "AdamW", "params": {}}, "train_batch_size": -1}', "batch sizes are whole numbers"),
        ('{"train_batch_size": 8, "fp16": true}', "'fp16' must be a JSON object"),
        ('{"train_batch_size": 8, "fp16": null}', "'fp16' must be a JSON object"),
        ('{"train_batch_size": 8, "amp": true}', "'amp' must be a JSON object"),
        ('{"train_batch_size": 8, "timers": []}', "'timers' must be a JSON object"),
        (
            '{"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": null}}',
            "'optimizer.params' must be a JSON",
        ),
        (
            '{"train_batch_size": 8, "scheduler": {"type": "WarmupDecayLR", "params": null}}',
            "'scheduler.params' must be a JSON object",
        ),
        ('{"train_batch_size": 8, "train_batch_size": 16}', "'train_batch_size' stands there more than once"),
        ('{"train_batch_size": 8, "bf16": {"enabled": true, "enabled": false}}', "'enabled' stands there more than"),
        ('{"train_batch_size": 8, "activation_checkpointing": {}}', "no effect in this training; use --gradient_check"),
        ('{"train_batch_size": 8, "tensor_parallel": {"autotp_size": 2}}', "section 'tensor_parallel' has no effect"),
        ('{"train_batch_size": 8, "zero_optimization": {"stagee": 1}}', "DeepSpeedZeroConfig.stagee: Extra inputs"),
        ('{"train_batch_size": 8, "zero_optimization": {"stage": 5}}', "DeepSpeedZeroConfig.stage: Input should be 0"),
        (
            '{"train_batch_size": 8, "zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}',
            "zero_optimization.offload_param has no effect at stage 2; from stage 3 on",
        ),
        (
            '{"train_batch_size": 8, "zero_optimization": {"stage": 1, "stage3_max_live_parameters": 1}}',
            "zero_optimization.stage3_max_live_parameters has no effect at stage 1",
        ),
        ('{"train_batch_size": 8, "gradient_clipping": "1"}', "gradient_clipping '1': 0 (none) or a positive number"),
        (
            '{"train_batch_size": 8, "optimizer": {"type": "AdamW", "params": {"torch_adam": true, "epsilon": 1}}}',
            "optimizer.params: AdamW.__init__() got an unexpected keyword argument 'epsilon'",
        ),
        (
            '{"train_batch_size": 8, "scheduler": {"type": "WarmupDecayLR", "params": {"last_batch_iteration": 0}}}',
            "scheduler.params: last_batch_iteration is counted by the run",
        ),
    ],
)
def test_a_malformed_deepspeed_json_is_one_line(text, message, ask, tmp_path):
    (tmp_path / "ds.json").write_text(text)
    lines = faults(ask, "--deepspeed_config", str(tmp_path / "ds.json"))
    assert len(lines) == 1
    assert message in lines[0]
    assert "ds.json" in lines[0]


def test_an_unknown_variant_lists_those_there_are():
    with pytest.raises(UsageError) as caught:
        parse(["--variant", "quadro"])
    known = ", ".join(VARIANTS)
    assert caught.value.lines == [
        f"--variant quadro: not known; one of {known}, or a file of your own: path/to/idea.py"
    ]


def test_a_folder_with_a_run_or_with_other_files_is_refused(ask, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "run.json").write_text("{}")
    assert "holds a run already" in faults(ask, "--output_dir", str(used))[0]
    assert ask("--output_dir", str(used), "--resume_from_checkpoint", "auto").resumes
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    assert "is not empty and holds no run" in faults(ask, "--output_dir", str(other))[0]
    assert "is a file" in faults(ask, "--output_dir", str(other / "thesis.tex"))[0]


def test_all_faults_are_told_at_once(ask):
    lines = faults(
        ask, "--max_steps", "-3", "--dataset", "gone.txt", "--deepspeed_config", "gone.json", "--model_args", "foo=1"
    )
    assert len(lines) == 4
    for part in ("--max_steps -3", "gone.txt", "gone.json", "--model_args foo"):
        assert sum(part in line for line in lines) == 1


def command(*arguments: str, cwd=ROOT) -> subprocess.CompletedProcess:
    return python_program(ROOT / "train_ds.py", *arguments, cwd=cwd)


def test_the_command_tells_faults_on_stderr_and_writes_nothing(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)) * 50)
    before = sorted(tmp_path.rglob("*"))
    cases = [
        (["--variant", "quadro"], 1),
        (["--variant", "duo_predict", "--preset", "demo", "--dataset", "binary.txt", "--block_size", "1"], 2),
        (["--variant", "gpt2", "--preset", "demo", "--dataset", "empty.txt", "--report_to", "none"], 1),
        (["--variant", "gpt2", "--preset", "seed", "--report_to", "none"], 2),  # no network: data set and tokenizer
    ]
    for arguments, count in cases:
        out = command(*arguments, cwd=tmp_path)
        assert out.returncode == 2
        errors = [line for line in out.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == count, out.stderr
        assert "Traceback" not in out.stderr
        assert sorted(tmp_path.rglob("*")) == before
    assert "--dataset builtin" in errors[0]


def test_a_tokenizer_that_does_not_fit_the_model(corpus, tmp_path):
    out = command(
        *("--variant", "duo_predict", "--preset", "demo", "--dataset", str(corpus), "--model_args", "vocab_size=20"),
        *("--output_dir", str(tmp_path / "run"), "--report_to", "none"),
    )
    assert out.returncode == 2
    assert "error: --tokenizer builtin: needs a vocabulary of " in out.stderr
    assert not (tmp_path / "run").exists()


def test_dry_run_prints_the_run_and_writes_nothing(tmp_path, monkeypatch, capsys):
    """Without the estimate of its memory, which takes long; the README's test makes it too."""
    monkeypatch.setattr("gpt2_variants.dry_run.memory_lines", lambda *_: ["memory"])
    options = ["--variant", "duo_predict", "--preset", "seed", "--dry_run", "--output_dir", str(tmp_path / "run")]
    assert train_ds.main(options) == 0
    out = capsys.readouterr().out
    for text in ("354,299,904", "1023 positions a sequence", '"train_batch_size": 64', "warm-up"):
        assert text in out
    assert not (tmp_path / "run").exists()


def test_help_names_every_option_once_on_two_screens(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    lines = make_parser().format_help().splitlines()
    assert lines[0] == "usage: deepspeed train_ds.py --variant NAME [options]"
    named = [re.match(r"  (--\w+)", line)[1] for line in lines if line.startswith("  --")]
    assert sorted(named) == sorted(["--num_gpus", *(f"--{f.name}" for f in option_fields())])
    assert len(lines) <= 90
    assert max(map(len, lines)) <= 100
    text = " ".join(" ".join(lines).split())
    for variant in VARIANTS:
        assert f" {variant}," in text or f" {variant} " in text
    for default in (
        *("wandb", "42", "0.1", "seed 500, demo 100", "seed the variant's, demo 64", "demo 400"),
        *("seed the JSON's, demo 0.002", "the JSON's", "sdpa", "auto"),
    ):
        assert f"(default: {default})" in text
    assert "exit codes: 0 finished" in text


def test_help_is_narrower_on_a_narrow_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    wide = [line for line in make_parser().format_help().splitlines() if len(line) > 80]
    assert not [line for line in wide if line.startswith("  --")]


HEAVY = {"torch", "transformers", "deepspeed", "datasets", "tokenizers", "pyarrow", "wandb", "huggingface_hub"}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["train_ds.py", "--help"], 0),
        (["-m", "gpt2_variants", "-h"], 0),
        (["-m", "gpt2_variants", "evaluate", "--help"], 0),
        (["-m", "gpt2_variants", "train", "--help"], 0),
        (["-m", "gpt2_variants", "list"], 0),
        (["-m", "gpt2_variants", "lst"], 2),
        (["train_ds.py", "--variant", "quadro"], 2),
        (["train_ds.py", "--variant", "gpt2", "--max_step", "3"], 2),
        (["train_ds.py", "--variant", "gpt2", "--preset", "demos"], 2),
        (["train_ds.py", "--variant", "gpt2", "--dry_run", "--dataset", "nowhere.txt"], 2),
        (["train_ds.py", "--variant", "gpt2", "--dry_run", "--max_steps", "x", "--weight_decay", "-1"], 2),
        (["train_ds.py", "--variant", "gpt2", "--dry_run", "--deepspeed_config", "nowhere.json"], 2),
        (["train_ds.py", "--variant", "gpt2", "--dry_run", "--gradient_accumulation_steps", "3"], 2),
    ],
)
def test_what_needs_no_model_imports_nothing_that_takes_seconds(words, code):
    command = [sys.executable, "-X", "importtime", *words]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == code
    assert out.stdout.startswith(("usage: ", "name ")) or "\nerror: " in out.stderr
    imported = {line.split("|")[2].strip() for line in out.stderr.splitlines() if line.count("|") == 2}
    assert "gpt2_variants.config.command_line" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize("before", [[], ["--local_rank=1"]])
def test_train_is_train_ds(before, monkeypatch, capsys, tmp_path):
    """Also as DeepSpeed's launcher calls a module; the rest of what a run does is one function for both."""
    folder = tmp_path / "run"
    words = ["--variant", "gpt2", "--preset", "demo", "--report_to", "none", "--max_steps", "-3", "--seed", "x"]
    words += ["--output_dir", str(folder)]
    said = []
    for main, first in ((train_ds.main, []), (commands.main, [*before, "train"])):
        assert main([*first, *words]) == 2
        said.append(capsys.readouterr())
    assert said[0] == said[1]
    assert said[0].err.count("error: ") == 2
    monkeypatch.setattr("gpt2_variants.training.session.train", lambda run: Trained(3, None, None))
    assert commands.main([*before, "train", *words[:6], "--output_dir", str(folder)]) == 3
    helps = []
    for main, first in ((train_ds.main, []), (commands.main, [*before, "train"])):
        with pytest.raises(SystemExit) as end:
            main([*first, "--help"])
        assert end.value.code == 0
        helps.append(capsys.readouterr().out.splitlines())
    assert helps[1][0] == "usage: python -m gpt2_variants train --variant NAME [options]"
    assert helps[0][1:] == helps[1][1:]


def test_apex_is_refused_with_the_way_to_build_it(ask, monkeypatch):
    (line,) = faults(ask, "--apex", "adam")
    assert line == "--apex adam: needs a CUDA device; leave --apex out"
    (line,) = faults(ask, "--apex", "layernorm")
    assert line == "--apex layernorm: not known (did you mean layer_norm?); one of layer_norm, adam, all"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    (line,) = checks._installation_faults(Options(variant="gpt2", apex="all", report_to=(), compile=False))
    assert "git clone https://github.com/NVIDIA/apex" in line


def test_a_compiler_is_needed_where_blocks_are_compiled(ask, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    (line,) = faults(ask, "--compile")
    assert "install g++, or give --no-compile" in line
    asked = ask()
    assert not compiles(asked, resolve_ds_config(asked, 1, 10))  # on a CPU, unless asked for


def test_compiling_is_refused_at_zero_stage_3_and_not_the_default_there(ask, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    (line,) = faults(ask, "--compile", "--deepspeed_config", "zero3.json")
    assert line.startswith("--compile: not with ZeRO stage 3")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for name, compiled in ((None, True), ("zero2.json", True), ("zero3.json", False)):
        options = resolve(Options(variant="gpt2", preset="seed", deepspeed_config=name))
        assert compiles(options, resolve_ds_config(options, 1, 10)) is compiled
