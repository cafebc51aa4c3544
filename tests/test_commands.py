"""What a person sees: the end of a demo, and the small commands."""

import ast
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT, launch, output_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from gpt2_variants import VARIANTS, __main__
from gpt2_variants.faults import UsageError
from gpt2_variants.inference import SavedModel
from gpt2_variants.report import plot, summary

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A finished tiny run, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    options = ["--variant", "duo_predict", *tiny_run, "--max_steps", "6", "--output_dir", str(folder)]
    (process,) = launch(1, options, closing=True)
    out, err = output_of(process, 120)
    assert process.returncode == 0, err
    return folder, out, err


def test_a_demo_ends_with_figures_plot_and_sample(run):
    folder, out, err = run
    facts = json.loads((folder / "run.json").read_text())
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert f"perplexity {last['eval_perplexity']:.2f}" in out
    assert f"infill      perplexity {last['eval_infill_perplexity']:.2f}" in out
    assert f"unigram perplexity of the same text {facts['unigram_perplexity']:.2f}" in out
    assert "sample      'The following statement" in out
    assert (folder / "curves.png").read_bytes().startswith(PNG)
    assert f"report      {folder / 'report' / 'report.html'}" in out
    assert "Who sees whom, in the first layer" in (folder / "report" / "report.html").read_text()
    assert f"compare     python -m gpt2_variants report {folder} OTHER_RUN ..." in out
    assert "step 6/6: loss" in err
    assert "tokens/s" in err
    assert "\r" not in err  # no carriage returns in a log file
    for noise in ("Warning", "WARNING", "Traceback"):
        assert noise not in err + out


def test_report_prints_the_figures_and_draws_the_plot_anew(run, capsys):
    folder = run[0]
    (folder / "curves.png").unlink()
    assert __main__.main(["report", str(folder)]) == 0
    out = capsys.readouterr().out
    assert summary(folder) in out
    assert plot(folder).read_bytes().startswith(PNG)


def command(*arguments) -> int:
    return __main__.main([str(argument) for argument in arguments])


def test_generate_continues_the_prompt_the_same_way_for_the_same_seed(run, capsys):
    outs = []
    for seed in (1, 1, 2):
        assert command("generate", "--model", run[0] / "model", "--prompt", "The time", "--seed", seed) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0].startswith("The time")
    assert outs[0] == outs[1] != outs[2]


def test_temperature_0_takes_the_most_probable_token_each_time(run, capsys):
    model = AutoModelForCausalLM.from_pretrained(run[0] / "model")
    tokenizer = AutoTokenizer.from_pretrained(run[0] / "model")
    ids = tokenizer("The time", return_tensors="pt")["input_ids"]
    for _ in range(12):
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        ids = torch.cat([ids, logits[: model.config.mask_token_id].argmax().view(1, 1)], dim=1)
    options = ("--max_new_tokens", 12, "--temperature", 0)
    assert command("generate", "--model", run[0] / "model", "--prompt", "The time", *options) == 0
    assert capsys.readouterr().out == tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"


def test_top_k_1_is_greedy_and_a_high_temperature_is_not(run, capsys):
    outs = {}
    for name, options in {
        "greedy": ("--temperature", 0),
        "top 1": ("--top_k", 1),
        "hot": ("--temperature", 50, "--top_k", 0),
    }.items():
        assert command("generate", "--model", run[0] / "model", "--prompt", "The time", *options) == 0
        outs[name] = capsys.readouterr().out
    assert outs["greedy"] == outs["top 1"] != outs["hot"]


def test_text_appears_as_it_is_generated(run, monkeypatch):
    """Word by word: each is flushed before the tokens after it are computed."""
    forwards, waiting, shown = 0, [], []

    class Out:
        def write(self, text):
            waiting.append(text)

        def flush(self):
            shown.append(("".join(waiting), forwards))
            waiting.clear()

    def count(module, *_):
        nonlocal forwards
        forwards += type(module).__name__ == "LMHead"

    monkeypatch.setattr(sys, "stdout", Out())
    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        assert command("generate", "--model", run[0] / "model", "--prompt", "The time", "--max_new_tokens", 20) == 0
    finally:
        hook.remove()
    shown = [piece for piece in shown if piece[0]]
    first, computed = shown[0]
    assert computed == 0
    assert "The time".startswith(first)  # of the prompt; until transformers 5.24 its last word waits for a space
    assert len({computed for _, computed in shown}) >= 5
    assert forwards == 20


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(
            ["-m", "gpt2_variants", "generate", "--prompt", "The time", "--model", "MODEL"], marks=pytest.mark.slow
        ),
        ["-m", "gpt2_variants", "list"],
        ["-m", "gpt2_variants", "--help"],
        pytest.param(["-m", "gpt2_variants", "data", "builtin", "--tokenizer", "builtin"], marks=pytest.mark.slow),
        pytest.param(["-m", "gpt2_variants", "report", "RUN"], marks=pytest.mark.slow),
        pytest.param(["train_ds.py", "--variant", "gpt2", "--preset", "demo", "--dry_run"], marks=pytest.mark.slow),
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_a_pipe_that_nobody_reads_ends_a_command_quietly(words, run):
    """As `| head` does once it has its lines; also where Python writes only at its end."""
    known = {"MODEL": str(run[0] / "model"), "RUN": str(run[0])}
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, *(known.get(word, word) for word in words)]
    process = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    os.close(writer)
    assert process.stderr == ""
    assert process.returncode == 1


def test_ctrl_c_ends_a_command_without_a_traceback(monkeypatch, capsys):
    def interrupted(_):
        raise KeyboardInterrupt

    replaced = dataclasses.replace(__main__.COMMANDS["list"], run=interrupted)
    monkeypatch.setitem(__main__.COMMANDS, "list", replaced)
    assert command("list") == 130
    assert capsys.readouterr().err == ""


def test_the_smallest_temperature_allowed_is_greedy(run, capsys):
    outs = []
    for temperature in (0, 0.001):
        options = ("--prompt", "The time", "--temperature", temperature, "--top_k", 0)
        assert command("generate", "--model", run[0] / "model", *options) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]


def test_one_token_alone_has_no_surprise(run, capsys):
    options = ("--prompt", "The", "--max_new_tokens", 0, "--show_surprise")
    assert command("generate", "--model", run[0] / "model", *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the prompt is one token; at least 2 are needed" in line


def test_the_models_positions_end_the_text_and_it_is_said(run, capsys):
    assert command("generate", "--model", run[0] / "model", "--prompt", "The time", "--max_new_tokens", 500) == 0
    assert "note: stopped at the model's 32 positions" in capsys.readouterr().err


def surprise_rows(out: str) -> list[tuple[str, str, list[float]]]:
    """(origin, token, numbers) of each row of a table; NaN for "-"."""
    rows = []
    for line in out[out.index("surprise in nats") :].splitlines()[2:]:
        origin, rest = line.split(maxsplit=1)
        quoted = re.match(r"b?(['\"]).*\1", rest)[0]  # bytes that are no text by themselves with their b
        numbers = rest[len(quoted) :].split()
        rows.append((origin, ast.literal_eval(quoted), [math.nan if n == "-" else float(n) for n in numbers]))
    return rows


def test_surprise_is_that_of_the_logits(run, capsys):
    model = AutoModelForCausalLM.from_pretrained(run[0] / "model")
    tokenizer = AutoTokenizer.from_pretrained(run[0] / "model")
    text = "The woman sees the child.\nThe"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model(ids, labels=ids)
    past = [math.nan] + [-float(out.logits[0, k - 1].log_softmax(-1)[ids[0, k]]) for k in range(1, ids.shape[1])]
    infill = [-float(out.infill_logits[0, k].log_softmax(-1)[ids[0, k]]) for k in range(ids.shape[1] - 1)] + [math.nan]

    options = ("--max_new_tokens", 0, "--show_surprise")
    assert command("generate", "--model", run[0] / "model", "--prompt", text, *options) == 0
    rows = surprise_rows(capsys.readouterr().out)
    spelled = b"".join(token if isinstance(token, bytes) else token.encode() for _, token, _ in rows)
    assert spelled.decode("utf-8", "backslashreplace") == text
    assert {origin for origin, _, _ in rows} == {"prompt"}
    expected = [list(pair) for pair in zip(past, infill, strict=True)]
    for (_, _, numbers), pair in zip(rows, expected, strict=True):
        assert numbers == pytest.approx(pair, abs=0.00501, nan_ok=True)


def test_surprise_of_prompt_and_continuation_in_aligned_columns(run, capsys):
    options = ("--max_new_tokens", 8, "--show_surprise")
    assert command("generate", "--model", run[0] / "model", "--prompt", "The time", *options) == 0
    text, table = capsys.readouterr().out.split("\n\nsurprise in nats (-log p)\n")
    rows = surprise_rows("surprise in nats\n" + table)
    origins = [origin for origin, _, _ in rows]
    assert origins == sorted(origins, reverse=True)  # prompt, then generated
    assert origins.count("generated") == 8
    spelled = b"".join(token if isinstance(token, bytes) else token.encode() for _, token, _ in rows)
    assert spelled.decode("utf-8", "backslashreplace") == text
    assert re.split("  +", table.splitlines()[0])[2:] == ["given its past", "Infill (has seen the right neighbour)"]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_a_stock_gpt2_folder_works_and_has_one_column(run, tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(run[0] / "model")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "stock")
    tokenizer.save_pretrained(tmp_path / "stock")
    options = ("--max_new_tokens", 3, "--show_surprise")
    assert command("generate", "--model", tmp_path / "stock", "--prompt", "The time", *options) == 0
    assert {len(numbers) for _, _, numbers in surprise_rows(capsys.readouterr().out)} == {1}
    text = tmp_path / "a.txt"
    text.write_text("The time sees the world.")
    assert command("evaluate", "--model", tmp_path / "stock", "--dataset", text, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    ids = tokenizer(text.read_text(), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = GPT2LMHeadModel.from_pretrained(tmp_path / "stock")(ids, labels=ids).loss
    assert facts["eval_loss"] == pytest.approx(float(expected), abs=1e-5)
    assert (facts["split"], facts["num_tokens"]) == ("all", ids.shape[1])


@pytest.mark.parametrize("published", sorted(GOLDEN.iterdir()), ids=lambda p: p.name)
def test_published_checkpoints_work_with_a_tokenizer(published, run, tmp_path):
    tokenizer = str(run[0] / "model")
    saved = SavedModel(published, tokenizer)
    if published.name.endswith("_norm"):  # its config does not say that it has norms, its weights do
        with pytest.raises(UsageError, match=r"8 weights, such as \S+rope\.layer_norm\.bias, .* use_norm true"):
            assert saved.model
        folder = shutil.copytree(published, tmp_path / "told")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "use_norm": True}))
        saved = SavedModel(folder, tokenizer)
    io = np.load(published / "io.npz")
    with torch.no_grad():
        logits = saved.model(torch.tensor(io["input_ids"])).logits
    np.testing.assert_allclose(logits.numpy(), io["logits"], atol=1e-5, rtol=0)


def test_evaluate_says_what_it_evaluated(run, tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("The time sees the world.\n" * 30)
    tokens = len(AutoTokenizer.from_pretrained(run[0] / "model")(text.read_text())["input_ids"])
    options = ("--dataset", text, "--stride", 8, "--dtype", "bfloat16")
    assert command("evaluate", "--model", run[0] / "model", *options) == 0
    model, source, windows, next_token, infill = capsys.readouterr().out.splitlines()
    assert model == f"model       {run[0] / 'model'}, bfloat16 on cpu"
    assert source == f"text        {text}, all: {tokens} tokens"
    assert windows == f"windows     {math.ceil((tokens - 32) / 8) + 1} of 32 tokens, stride 8"
    assert next_token.startswith("next token  perplexity ")
    assert infill.startswith("infill      perplexity ")
    assert infill.endswith(". " + VARIANTS["duo_predict"].model_class.streams[0].caveat)


def without_tokenizer(model):
    for file in model.glob("tokenizer*"):
        file.unlink()


def of_another_type(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))


def truncated(model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def lacking_a_weight(model):
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    del weights["transformer.h.1.attn.c_attn.weight"]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def with_a_weight_too_many(model):
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    weights["transformer.h.1.attn.drift"] = torch.zeros(2)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_tokenizer, "the folder holds no tokenizer files"),
        (of_another_type, "is of the type llama; models of gpt2, duo-predict-gpt2"),
        (truncated, "the weights cannot be loaded"),
        (lacking_a_weight, "without 1 weight, such as transformer.h.1.attn.c_attn.weight"),
        (with_a_weight_too_many, "has 1 weight, such as transf"),
    ],
)
def test_a_folder_that_is_no_whole_model_is_a_fault(damage, message, run, tmp_path, capsys, caplog):
    model = shutil.copytree(run[0] / "model", tmp_path / "model")
    damage(model)
    assert command("generate", "--model", model, "--prompt", "The time") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert str(model) in line
    assert message in line
    assert not caplog.records


def test_what_is_no_model_is_told_where_one_is(run, tmp_path, monkeypatch, capsys):
    """A run's folder, one of its checkpoints, a run that was not exported, a name on the Hub."""
    monkeypatch.chdir(tmp_path)
    checkpoint = next((run[0] / "checkpoints").glob("step-*"))
    shutil.copytree(run[0] / "checkpoints", tmp_path / "not exported/checkpoints")
    export = "python -m gpt2_variants export --checkpoint {} --output_dir FOLDER makes one"
    for folder, cure in (
        (run[0], f"it is a run's folder: give {run[0]}/model"),
        (checkpoint, export.format(checkpoint)),
        ("not exported", export.format("'not exported'")),
        ("team/duo", "of the Hugging Face Hub, hf download team/duo --local-dir duo fetches one"),
        ("nowhere", "give a folder that holds one, such as runs/duo_predict/model"),
        ("a/b/c", "give a folder that holds one, such as runs/duo_predict/model"),
    ):
        for words in (["generate", "--prompt", "x"], ["evaluate", "--dataset", "builtin"]):
            assert command(*words, "--model", str(folder)) == 2
            said = f"error: --model {folder}: no exported model there (no config.json); {cure}\n"
            assert capsys.readouterr().err == said
    assert command("export", "--checkpoint", "not exported", "--output_dir", "made") == 0
    assert command("generate", "--model", "made", "--prompt", "The", "--max_new_tokens", "1") == 0


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["generate", "--model", "nowhere", "--prompt", "x"], ["--model nowhere: no exported model there"]),
        (["report", "nowhere"], ["nowhere: holds no run"]),
        (["generate", "--model", "nowhere"], ["the following arguments are required: --prompt"]),
        (["invent"], ["invalid choice: 'invent'"]),
        (["generate", "--model", "x", "--prompt", "x", "--colour"], ["unrecognized arguments: --colour"]),
        (
            "generate --model nowhere --prompt x --temperature -1 --top_k 2.5 --max_new_tokens 0 --seed many".split(),
            [
                "--max_new_tokens 0: at least 1 is needed",
                "--temperature -1: 0, or 0.001 and more, is allowed",
                "--top_k 2.5: not a whole number",
                "--seed many: not a whole number",
                "--model nowhere: no exported model there",
            ],
        ),
        (
            "evaluate --model nowhere --dataset ./gone.txt --block_size 1 --stride 0 --batch_size 0".split(),
            [
                "--model nowhere: no exported model there",
                "--dataset ./gone.txt: no such file or folder",
                "--batch_size 0: at least 1 is needed",
                "--block_size 1: 2 or more is allowed",
                "--stride 0: 1 to the block size is allowed",
            ],
        ),
    ],
)
def test_faults_are_a_line_each_and_exit_code_2(arguments, messages, capsys):
    assert command(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith("error: ")
        assert message in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--block_size", 33), "--block_size 33: 2 to the model's 32 positions is allowed"),
        (("--stride", 33), "--stride 33: 1 to the block size of 32 is allowed"),
        (("--tokenizer", "builtin"), "--tokenizer builtin: is trained anew on each text"),
        (("--dataset", "nobody/nothing"), "the Hugging Face Hub (https://huggingface.co) cannot be reached"),
    ],
)
def test_what_does_not_fit_the_model_is_a_fault(options, message, run, capsys, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("The time\n")
    assert command("evaluate", "--model", run[0] / "model", "--dataset", text, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_tokenizer_with_more_entries_than_the_model_is_a_fault(run, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(run[0] / "model")
    tokenizer.add_tokens(["timeless"])
    tokenizer.save_pretrained(tmp_path)
    options = ("--model", run[0] / "model", "--tokenizer", tmp_path)
    (tmp_path / "a.txt").write_text("timeless\ntimeless\n")
    for arguments in (("generate", "--prompt", "timeless"), ("evaluate", "--dataset", tmp_path / "a.txt")):
        assert command(arguments[0], *options, *arguments[1:]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"--tokenizer {tmp_path}: gives the id {len(tokenizer) - 1}, the model has " in line


def test_a_prompt_that_is_empty_or_too_long_is_a_fault(run, capsys):
    for prompt, message in (("", "the prompt is empty"), ("The time " * 40, "the model 32 positions")):
        assert command("generate", "--model", run[0] / "model", "--prompt", prompt) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_list_gives_every_variants_parameters(capsys):
    """Those of the README's table; the baseline's and duo-predict's as published."""
    assert command("list") == 0
    head, *rows, _ = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "family", "parameters*", "block", "size", "idea"]
    table = {row.split()[0]: row.split() for row in rows}
    assert table.keys() == VARIANTS.keys()
    assert table["gpt2"][2] == "354,823,168"
    assert table["duo_predict"][2:4] == ["354,299,904", "512"]
    readme = (ROOT / "README.md").read_text().split("## Variants")[1].split("\n## ")[0]
    for name, (_, family, parameters, block_size, *_) in table.items():
        assert family == VARIANTS[name].family
        (line,) = [line for line in readme.splitlines() if line.startswith(f"| `{name}` |")]
        assert line.endswith(f"| {parameters} | {block_size} |")


@pytest.mark.parametrize("name", sorted(__main__.COMMANDS))
def test_help_of_a_command_is_short_and_says_every_option(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        __main__.make_parser().parse_args([name, "--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: python -m gpt2_variants {name}")
    assert lines[1] == ""
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100
    options = [line for line in lines if line.startswith("  ")]
    assert not [line for line in options if re.fullmatch(r" +--?\w+( [\w|]+)?", line)], "an option without help"


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        __main__.make_parser().parse_args(["--help"])
    out = capsys.readouterr().out
    for name in __main__.COMMANDS:
        assert len(re.findall(rf"^    {name} +\w", out, flags=re.MULTILINE)) == 1
    assert "exit codes: 0 done" in out
