"""What a run is, as one value: complete, the same wherever it is read, and what makes runs those of one recipe."""

import dataclasses
import json

import pytest
from conftest import train

from gpt2_variants import model_card, report
from gpt2_variants.config.command_line import parse
from gpt2_variants.config.plan import DataFacts, Plan, as_dict, make_plan
from gpt2_variants.config.resolve import resolve
from gpt2_variants.config.saved_plan import saved_plan
from gpt2_variants.faults import UsageError
from gpt2_variants.records import RunRecord
from gpt2_variants.training.checkpoint import read_manifest

DATA = DataFacts(1000, 50, "my.txt: 1,000 blocks; tokenizer builtin, 4,000 entries", "a print")
MAY_BE_NONE = {"variant_file", "variant_code", "size", "init_from", "apex"}


@pytest.fixture
def planned(corpus, tmp_path):
    """The plan that options, and a DeepSpeed JSON with sections replaced, come to on `world` ranks."""

    def plan(*options: str, world: int = 1, data: DataFacts = DATA, variant: str = "gpt2", **sections) -> Plan:
        given = ["--variant", variant, "--preset", "demo", "--dataset", str(corpus), "--report_to", "none"]
        if sections:
            (tmp_path / "ds.json").write_text(json.dumps({"train_batch_size": 16, **sections}))
            given += ["--deepspeed_config", str(tmp_path / "ds.json")]
        asked = parse([*given, "--output_dir", str(tmp_path / "new"), *options])
        return make_plan(asked, data, asked.make_config(4000), world)

    return plan


def saved(plan: Plan, folder, losses=(5.0, 4.0), **facts):
    """A finished run's folder with that plan."""
    folder.mkdir()
    start = {"world_size": plan.world_size, "device": "A CPU (2 cores)"}
    record = {"schema": 2, "status": "finished", "variant": plan.variant, "plan": as_dict(plan), "starts": [start]}
    RunRecord(folder, writes=True).update(**record, **facts)
    lines = []
    for step, loss in zip((10, 20), losses, strict=True):
        lines.append({"step": step, "elapsed_seconds": step, "loss": loss, "tokens": step * 1024})
        lines.append(
            {"step": step, "elapsed_seconds": step, "eval_loss": loss, "eval_perplexity": 1.0, "eval_accuracy": 0}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def groups(*folders) -> list[int]:
    """How many runs are in each group."""
    return [len(group.runs) for group in report.make_groups([report.read_run(folder) for folder in folders])]


def test_every_field_has_its_real_value(planned):
    plan = planned(optimizer={"type": "AdamW", "params": {"torch_adam": True}})
    assert {f.name for f in dataclasses.fields(Plan) if getattr(plan, f.name) is None} <= MAY_BE_NONE
    assert None not in [v for k, v in plan.model.items() if k not in ("n_inner", "bos_token_id", "eos_token_id")]
    assert (plan.learning_rate, plan.weight_decay, plan.gradient_clipping) == (2e-3, 0.0, 1.0)
    assert plan.optimizer == {"type": "AdamW", "params": {"torch_adam": True, "eps": 1e-8, "betas": [0.9, 0.999]}}
    assert json.loads(json.dumps(as_dict(plan)))["train_batch_size"] == 16


def test_the_recipe_at_full_size_is_a_plan():
    """5 epochs of 114,003 blocks in batches of 64: 8,910 steps, 891 of them warm-up."""
    options = resolve(dataclasses.replace(parse_seed(), variant="gpt2"))
    data = DataFacts(114_003, 240, "wikitext-103", "print")
    plan = make_plan(options, data, options.make_config(50257), world=1)
    assert (plan.steps_per_epoch, plan.total_steps, plan.warmup_steps) == (1782, 8910, 891)
    assert (plan.learning_rate, plan.weight_decay, plan.precision, plan.train_batch_size) == (1e-4, 0.01, "bf16", 64)
    assert (plan.num_parameters, plan.schedule["type"]) == (354_823_168, "WarmupDecayLR")
    shared = make_plan(options, data, options.make_config(50257), world=8)
    assert (shared.per_device_train_batch_size, shared.gradient_accumulation_steps) == (8, 1)
    assert shared.identity() == plan.identity()


def parse_seed():
    from gpt2_variants.config.options import Options

    return Options(variant="gpt2", preset="seed")


def test_it_is_the_same_in_run_json_and_checkpoint(tiny_run, tmp_path, in_process, capsys):
    options = [*tiny_run, "--max_steps", "3", "--lr_scheduler_type", "cosine"]
    folder = train(options, tmp_path / "run", variant="gpt2")
    facts = json.loads((folder / "run.json").read_text())
    manifest = read_manifest(folder / "checkpoints/step-00000003")
    assert manifest["plan"] == facts["plan"] == saved_plan(folder, facts)
    assert facts["schema"] == 2
    assert json.loads((folder / "ds_config.json").read_text()) == facts["plan"]["ds_config"]
    assert (facts["options"]["weight_decay"], facts["options"]["learning_rate"]) == (0.01, 2e-3)
    assert facts["asked"]["lr_scheduler_type"] == "cosine"
    assert "weight_decay" not in facts["asked"]
    capsys.readouterr()
    train([*options, "--dry_run"], tmp_path / "other", variant="gpt2")
    said = capsys.readouterr().out
    assert json.dumps(facts["plan"]["ds_config"], indent=2) in said
    for text in (f"parameters         {facts['num_parameters']:,}", "schedule           WarmupCosineLR", "size=nano"):
        assert text in said


def test_runs_are_seeds_of_one_recipe_if_their_plans_differ_in_the_seed_alone(planned, tmp_path):
    base = planned("--seed", "1")
    folders = [saved(base, tmp_path / "base"), saved(planned("--seed", "2"), tmp_path / "seed")]
    assert groups(*folders) == [2]
    # on 8 ranks, with other cadence and trackers, still of it
    folders.append(saved(planned("--seed", "3", "--train_batch_size", "16", world=8), tmp_path / "ranks"))
    more = planned("--save_steps", "7", "--logging_steps", "3", "--eval_steps", "9", "--save_total_limit", "1")
    folders.append(saved(more, tmp_path / "cadence"))
    assert groups(*folders) == [4]
    assert report.make_groups([report.read_run(f) for f in folders])[0].machine is None, "not the same speed"


JSON = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1, "torch_adam": True}}}


@pytest.mark.parametrize(
    ("options", "sections"),
    [
        ((), {"optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "weight_decay": 0.1, "torch_adam": True}}}),
        ((), {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.2, "torch_adam": True}}}),
        ((), {**JSON, "train_batch_size": 8}),
        ((), {**JSON, "bf16": {"enabled": True}}),
        ((), {**JSON, "gradient_clipping": 0.5}),
        ((), {**JSON, "zero_optimization": {"stage": 1}}),
        ((), {**JSON, "scheduler": {"type": "CosineAnnealingLR", "params": {"T_max": "auto"}}}),
        ((), {**JSON, "data_types": {"grad_accum_dtype": "fp32"}}),
        (("--max_steps", "300"), JSON),
        (("--adam_beta2", "0.95"), JSON),
        (("--model_args", "resid_pdrop=0.1"), JSON),
        (("--gradient_checkpointing",), JSON),
        (("--attn_implementation", "eager"), JSON),
        (("--load_best_model_at_end",), JSON),
    ],
)
def test_what_the_json_or_an_option_decides_makes_another_recipe(options, sections, planned, tmp_path):
    a = saved(planned(**JSON), tmp_path / "a")
    assert groups(a, saved(planned("--seed", "9", **JSON), tmp_path / "b")) == [2]
    other = saved(planned(*options, "--seed", "9", **sections), tmp_path / "c")
    assert groups(a, other) == [1, 1]
    labels = [group.label for group in report.make_groups([report.read_run(f) for f in (a, other)])]
    assert labels[0] != labels[1]
    assert all(label.startswith("gpt2, ") for label in labels), labels


def test_other_data_are_another_recipe(planned, tmp_path):
    a, b = planned(), planned(data=DATA._replace(fingerprint="another"))
    assert groups(saved(a, tmp_path / "a"), saved(b, tmp_path / "b")) == [1, 1]


def test_the_model_card_says_what_the_plan_says(planned, tmp_path):
    plan = planned(
        "--lr_scheduler_type", "cosine", "--learning_rate", "3e-4", "--warmup_steps", "7", "--max_steps", "100",
        optimizer={"type": "SGD", "params": {"momentum": 0.9, "weight_decay": 0.2}},
        zero_optimization={"stage": 0},
        gradient_clipping=0,
    )  # fmt: skip
    folder = saved(plan, tmp_path / "run", versions={"torch": "2"}, final_eval={})
    card = model_card.write_card(folder, "me/model", [])
    for line in (
        "| optimizer | SGD, learning rate 0.0003, weight decay 0.2, momentum 0.9, gradients not clipped |",
        "| schedule | WarmupCosineLR, 7 of 100 steps warm-up, warmup_type linear, ",
        "| precision | float32 |",
    ):
        assert line in card
    assert "AdamW" not in card


def test_a_record_of_the_older_schema_is_read(tmp_path):
    """As versions before the plan wrote it: None where the JSON decided."""
    options = {"variant": "gpt2", "preset": "seed", "dataset": "x.txt", "tokenizer": "builtin", "block_size": 64}
    options |= {"size": "nano", "model_args": {"resid_pdrop": 0.0}, "learning_rate": None, "weight_decay": None}
    options |= {
        "train_batch_size": None,
        "seed": 3,
        "attn_implementation": "sdpa",
        "max_steps": 50,
        "report_to": "wandb",
    }
    ds = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 64, "gradient_accumulation_steps": 1}
    ds |= {"bf16": {"enabled": True}, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}
    ds["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01, "betas": [0.9, 0.999]}}
    schedule = {"warmup_max_lr": 1e-4, "warmup_num_steps": 5, "total_num_steps": 50, "warmup_type": "linear"}
    ds["scheduler"] = {"type": "WarmupDecayLR", "params": schedule}
    found = []
    for name, rate, seed in (("a", 1e-4, 3), ("b", 1e-4, 4), ("c", 5e-4, 5)):
        folder = tmp_path / name
        folder.mkdir()
        ds["optimizer"]["params"]["lr"] = schedule["warmup_max_lr"] = rate
        facts = {"status": "finished", "variant": "gpt2", "options": {**options, "seed": seed}, "data_fingerprint": "p"}
        (folder / "run.json").write_text(json.dumps(facts))
        (folder / "ds_config.json").write_text(json.dumps(ds))
        found.append(folder)
    plan = saved_plan(found[2], json.loads((found[2] / "run.json").read_text()))
    assert (plan["learning_rate"], plan["weight_decay"], plan["train_batch_size"], plan["seed"]) == (5e-4, 0.01, 64, 5)
    assert (plan["precision"], plan["zero_stage"], plan["warmup_steps"], plan["total_steps"]) == ("bf16", 1, 5, 50)
    assert groups(*found) == [2, 1], "the edited JSON's rate is no seed"


def test_a_json_that_cannot_be_used_is_refused_when_the_plan_is_made(planned):
    with pytest.raises(UsageError, match="does not divide over 3 GPUs"):
        planned(world=3)


def test_versions_hold_the_packages_own():
    from gpt2_variants import __version__, records

    found = records.versions()
    assert found["gpt2_variants"] == __version__
    assert {"python", "torch", "transformers", "deepspeed"} < found.keys()
