"""DeepSpeed JSONs as people have them: filled in to the numbers that were asked for, or refused in one line."""

import json

import pytest
import torch
from conftest import ROOT, metrics, train
from transformers import get_scheduler

from gpt2_variants.config.command_line import parse
from gpt2_variants.config.deepspeed_json import resolve_ds_config
from gpt2_variants.config.optimizer_json import make_schedule
from gpt2_variants.faults import UsageError
from gpt2_variants.training.trial import try_out

ADAMW = {"type": "AdamW", "params": {"lr": 0.001, "torch_adam": True}}
AUTO_BATCH = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)
# The shapes of transformers' page on DeepSpeed; its optimizers are DeepSpeed's own, which a CPU must compile first.
HF = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
    },
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
    **AUTO_BATCH,
}
WARMUP = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
HF_SHAPES = {
    "zero1": {**HF, "zero_optimization": {"stage": 1}},
    "zero2": {
        **HF,
        "scheduler": {"type": "WarmupLR", "params": WARMUP},
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "none", "pin_memory": True},
            "allgather_partitions": True,
            "allgather_bucket_size": 2e8,
            "overlap_comm": True,
            "reduce_scatter": True,
            "reduce_bucket_size": "auto",
            "contiguous_gradients": True,
        },
    },
    "zero3": {
        **HF,
        "scheduler": {"type": "WarmupDecayLR", "params": {**WARMUP, "total_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "sub_group_size": 1e9,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_max_live_parameters": 1e9,
            "stage3_max_reuse_distance": 1e9,
            "stage3_gather_16bit_weights_on_model_save": "auto",
        },
    },
}


@pytest.fixture
def resolved(corpus, tmp_path):
    """The DeepSpeed config that a JSON and options come to, for 100 steps on `world` ranks."""

    def resolve(config: dict | str, *more: str, world: int = 1, steps: int = 100) -> dict:
        path = tmp_path / "ds.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        given = ["--variant", "gpt2", "--preset", "demo", "--dataset", str(corpus), "--report_to", "none"]
        given += ["--output_dir", str(tmp_path / "run"), "--max_steps", str(steps), "--deepspeed_config", str(path)]
        return resolve_ds_config(parse([*given, *more]), world, steps)

    return resolve


def rates(config: dict, steps: int) -> list[float]:
    """The rate of each of the first `steps` optimizer steps under the schedule of a resolved config."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config["optimizer"]["params"]["lr"])
    schedule = make_schedule(config)
    schedule = schedule(optimizer) if schedule else None
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if schedule:
            schedule.step()
    return found


def test_every_auto_is_what_transformers_makes_of_it(resolved):
    """Sizes by the model's width (nano's 192), the rest the options or the recipe."""
    config = resolved(HF_SHAPES["zero3"], "--learning_rate", "3e-4", "--adam_beta2", "0.95", "--warmup_ratio", "0.05")
    zero, params = config["zero_optimization"], config["optimizer"]["params"]
    assert zero["reduce_bucket_size"] == 192 * 192
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 192 * 192)
    assert zero["stage3_param_persistence_threshold"] == 10 * 192
    assert (params["lr"], params["betas"], params["eps"], params["weight_decay"]) == (3e-4, [0.9, 0.95], 1e-8, 0.01)
    assert config["scheduler"]["params"] == {
        "warmup_min_lr": 0,
        "warmup_max_lr": 3e-4,
        "warmup_num_steps": 5,
        "total_num_steps": 100,
    }
    assert config["bf16"]["enabled"] is True
    assert config["fp16"] == {"enabled": False}
    assert config["gradient_clipping"] == 1.0
    assert "auto" not in json.dumps(config)


@pytest.mark.parametrize("name", [*HF_SHAPES, *sorted(p.name for p in (ROOT / "ds_configs").glob("*.json"))])
def test_each_json_trains(name, tiny_run, tmp_path, in_process):
    path = name
    if name in HF_SHAPES:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(HF_SHAPES[name]))
    run = train([*tiny_run, "--deepspeed_config", str(path), "--max_steps", "2"], tmp_path / "run", variant="gpt2")
    plan = json.loads((run / "run.json").read_text())["plan"]
    assert (plan["learning_rate"], plan["precision"], plan["train_batch_size"]) == (
        2e-3 if name in HF_SHAPES else 1e-4,
        "bf16",
        8,
    )
    assert [line["step"] for line in metrics(run) if "loss" in line] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_transformers_own_shape_with_deepspeeds_own_adam_trains(offload, tiny_run, tmp_path, in_process):
    """A minute each, once: its operators are compiled."""
    config = json.loads(json.dumps(HF_SHAPES["zero2"]))
    del config["optimizer"]["params"]["torch_adam"]
    config["zero_optimization"]["offload_optimizer"]["device"] = offload
    (tmp_path / "ds.json").write_text(json.dumps(config))
    options = [*tiny_run, "--deepspeed_config", str(tmp_path / "ds.json"), "--max_steps", "2"]
    assert len(metrics(train(options, tmp_path / "run", variant="gpt2"))) == 3


SCHEDULERS = {
    "WarmupLR": {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 10},
    "WarmupDecayLR": {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 10, "total_num_steps": 100},
    "WarmupCosineLR": {"total_num_steps": 100, "warmup_num_steps": 10},
    "OneCycle": {"cycle_min_lr": 1e-5, "cycle_max_lr": 1e-3, "cycle_first_step_size": 40},
    "OneCycleLR": {"max_lr": 1e-3, "total_steps": "auto"},
    "CosineAnnealingLR": {"T_max": "auto"},
    "StepLR": {"step_size": 30},
    "ConstantLR": {"factor": 1.0},
    "CyclicLR": {"base_lr": 1e-5, "max_lr": 1e-3, "step_size_up": 40},
    None: None,
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_learning_rate_that_is_asked_for_is_the_peak_of_every_schedule(kind, resolved):
    config = {"train_batch_size": 8, "optimizer": ADAMW}
    if kind:
        config["scheduler"] = {"type": kind, "params": SCHEDULERS[kind]}
    asked = resolved(config, "--learning_rate", "5e-4")
    assert max(rates(asked, 100)) == pytest.approx(5e-4, rel=1e-3)
    assert max(rates(resolved(config), 100)) == pytest.approx(1e-3, rel=1e-3), "what the JSON says, if nothing is asked"


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "constant"])
@pytest.mark.parametrize("warmup", [("--warmup_steps", "25"), ("--warmup_ratio", "0.25"), ()])
def test_schedules_by_name_are_transformers_own(kind, warmup, resolved):
    if kind == "constant" and warmup:
        with pytest.raises(UsageError, match=f"{warmup[0]}.* has no warm-up"):
            resolved({"train_batch_size": 8}, "--lr_scheduler_type", kind, *warmup)
        return
    config = resolved({"train_batch_size": 8}, "--lr_scheduler_type", kind, "--learning_rate", "2e-3", *warmup)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2e-3)
    schedule = get_scheduler(kind, optimizer, num_warmup_steps=25 if warmup else 10, num_training_steps=100)
    wanted = []
    for _ in range(100):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates(config, 100) == wanted


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])
def test_warmup_and_decay_that_are_asked_for_act_on_every_schedule_that_has_them(kind, resolved):
    config = {"train_batch_size": 8, "optimizer": ADAMW, "scheduler": {"type": kind, "params": SCHEDULERS[kind]}}
    asked = resolved(config, "--warmup_ratio", "0.5", "--weight_decay", "0.3", "--adam_epsilon", "1e-6")
    assert asked["scheduler"]["params"]["warmup_num_steps"] == 50
    assert (asked["optimizer"]["params"]["weight_decay"], asked["optimizer"]["params"]["eps"]) == (0.3, 1e-6)
    assert resolved(config)["scheduler"]["params"]["warmup_num_steps"] == 10


COSINE = {"type": "CosineAnnealingLR", "params": {"T_max": 9}}
SGD = {"type": "SGD", "params": {"lr": 0.1}}
BATCH = {"train_batch_size": 8}


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({**BATCH, "scheduler": COSINE}, ("--warmup_ratio", "0.1"), "has no warm-up"),
        ({**BATCH, "optimizer": ADAMW}, ("--warmup_steps", "3"), "--warmup_steps 3: a constant rate"),
        (BATCH, ("--lr_scheduler_type", "linear", "--warmup_steps", "3", "--warmup_ratio", "0.1"), "leave one of"),
        ({**BATCH, "optimizer": SGD}, ("--adam_beta1", "0.8"), "the optimizer SGD"),
        ({**BATCH, "optimizer": SGD}, ("--adam_epsilon", "1e-6"), "--adam_epsilon 1e-06: the optimizer SGD"),
        ({**BATCH, "scheduler": {"type": "LRRangeTest", "params": {}}}, ("--learning_rate", "1"), "rates of its own"),
        (
            {**BATCH, "scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}},
            (),
            "unexpected keyword argument",
        ),
        ({**BATCH, "scheduler": {"type": "OneCycle", "params": {}}}, (), "missing 2 required positional arguments"),
        ({**BATCH, "scheduler": {"type": "WarmupCosine", "params": {}}}, (), "did you mean WarmupCosineLR?"),
        ({**BATCH, "scheduler": {"params": {}}}, (), "scheduler.type is missing"),
        ({**BATCH, "scheduler": {"type": "ReduceLROnPlateau", "params": {}}}, (), "scheduler.params"),
        ({**BATCH, "optimizer": {"params": {"lr": 1e-3}}}, (), "optimizer.type is missing"),
        ({**BATCH, "optimizer": {"type": "nonsense", "params": {}}}, (), "optimizer 'nonsense' is not known"),
        ({**BATCH, "optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-3}}}, (), "'OneBitAdam' is not known"),
        ({**BATCH, "optimizer": {"type": "AdamX", "params": {}}}, (), "did you mean "),
        ({**BATCH, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}, (), "= 4"),
        ({"train_batch_size": 8, "gradient_accumulation_steps": 3}, (), "3 does not divide 8"),
        (BATCH, ("--gradient_accumulation_steps", "3"), "3 does not divide 8 sequences"),
        ({**BATCH, "comet": {"enabled": True, "api_key": "abcd"}}, (), "comet.api_key is a secret"),
        ({**BATCH, "zero_optimisation": {}}, (), "did you mean 'zero_optimization'?"),
        ('{"train_batch_size": 8, "gradient_clipping": NaN}', (), "NaN is no number of JSON"),
        (
            '{"train_batch_size": 8, "optimizer": {"params": {"lr": 1, "lr": 2}}}',
            (),
            "'lr' stands there more than once",
        ),
    ],
)
def test_what_cannot_be_honoured_is_one_line(config, options, message, resolved):
    with pytest.raises(UsageError) as caught:
        resolved(config, *options)
    (line,) = caught.value.lines
    assert message in line
    assert "abcd" not in line


def test_a_byte_order_mark_is_no_fault(resolved):
    assert resolved("\ufeff" + json.dumps(BATCH))["train_batch_size"] == 8


@pytest.mark.parametrize(
    ("stated", "options", "world", "shared_out"),
    [
        ({}, (), 2, (16, 8, 1)),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}, (), 2, (8, 2, 2)),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}, (), 2, (24, 4, 3)),
        ({"train_batch_size": 12, "gradient_accumulation_steps": 3}, (), 2, (12, 2, 3)),
        (AUTO_BATCH, ("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"), 4, (32, 4, 2)),
        (AUTO_BATCH, ("--train_batch_size", "64", "--gradient_accumulation_steps", "4"), 4, (64, 4, 4)),
        ({"train_batch_size": 64}, ("--per_device_train_batch_size", "4"), 8, (32, 4, 1)),
    ],
)
def test_batches_are_shared_out_as_stated(stated, options, world, shared_out, resolved):
    config = resolved(stated, *options, world=world)
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert tuple(config[name] for name in names) == shared_out
    assert shared_out[0] == shared_out[1] * shared_out[2] * world


@pytest.mark.parametrize(
    ("section", "bf16", "enabled"),
    [
        ({"bf16": {"enabled": True}}, None, True),
        ({"bf16": {"enabled": "auto"}}, None, True),
        ({"bf16": {"enabled": True}}, "--no-bf16", False),
        ({"bf16": {"enabled": False}}, "--bf16", True),
        ({}, None, None),
        ({"fp16": {"enabled": "auto"}}, None, True),
    ],
)
def test_precision(section, bf16, enabled, resolved):
    config = resolved({**BATCH, **section}, *([bf16] if bf16 else []))
    assert config.get("bf16", {}).get("enabled") == enabled


@pytest.mark.parametrize(
    ("optimizer", "more", "message"),
    [
        ({"type": "SGD", "params": {"lr": 0.1}}, {}, "zero_allow_untested_optimizer"),
        ({"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}, {"zero_allow_untested_optimizer": True}, None),
        ({"type": "SGD", "params": {"lr": 0.1, "beta": 1}}, {"zero_allow_untested_optimizer": True}, "beta"),
        ({"type": "Adagrad", "params": {"lr": 0.1}}, {}, "optimizer Adagrad: DeepSpeed cannot run it here"),
        ({"type": "Adagrad", "params": {"lr": 0.1}}, {"zero_optimization": {"stage": 0}}, None),
        ({"type": "Lion", "params": {"lr": 0.1}}, {}, "optimizer Lion: DeepSpeed cannot run it here at ZeRO stage 1"),
    ],
)
def test_an_optimizer_is_tried_out_before_the_model_is_built(optimizer, more, message, corpus, tmp_path, capsys):
    (tmp_path / "ds.json").write_text(
        json.dumps({**BATCH, "optimizer": optimizer, "zero_optimization": {"stage": 1}, **more})
    )
    given = ["--variant", "gpt2", "--preset", "demo", "--dataset", str(corpus), "--report_to", "none", "--dry_run"]
    options = parse([*given, "--deepspeed_config", str(tmp_path / "ds.json")])
    if message is None:
        try_out(options)
        assert "runs here (" in capsys.readouterr().err
        return
    with pytest.raises(UsageError) as caught:
        try_out(options)
    (line,) = caught.value.lines
    assert message in line
