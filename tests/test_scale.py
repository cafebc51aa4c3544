"""One recipe on any number of GPUs: the shipped DeepSpeed JSONs, launchers, several nodes, the memory estimate."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, finish, launch, metrics, output_of, patience, run_to_end, train, zero
from safetensors.torch import load_file
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

import train_ds
from gpt2_variants import nodes
from gpt2_variants.config.deepspeed_json import resolve_ds_config
from gpt2_variants.config.options import Options
from gpt2_variants.config.resolve import resolve
from gpt2_variants.faults import UsageError

pytestmark = pytest.mark.usefixtures("in_process")

JSONS = sorted(p.name for p in (ROOT / "ds_configs").glob("*.json"))
FLOAT32 = {"bf16": {"enabled": False}}
GIB = 2**30


def test_the_jsons_differ_in_their_zero_section_alone():
    assert JSONS == ["zero1.json", "zero2.json", "zero3.json", "zero3_offload.json"]
    configs = [json.loads((ROOT / "ds_configs" / name).read_text()) for name in JSONS]
    zeros = [config.pop("zero_optimization") for config in configs]
    assert all(config == configs[0] for config in configs)
    assert [zero["stage"] for zero in zeros] == [1, 2, 3, 3]
    assert [{k for k in zero if k.startswith("offload")} for zero in zeros] == [
        set(),
        set(),
        set(),
        {"offload_optimizer", "offload_param"},
    ]


@pytest.mark.parametrize("name", JSONS)
def test_a_json_holds_the_recipe_on_any_number_of_gpus(name):
    """The recipe of gpt2_variants/training/README.md; `resolve_ds_config` has DeepSpeed's own classes check each."""
    asked = resolve(Options(variant="gpt2", preset="seed", deepspeed_config=name))
    for world in (1, 2, 8, 64):
        config = resolve_ds_config(asked, world, total_steps=8910)
        assert "auto" not in json.dumps(config)
        assert config["train_batch_size"] == 64
        assert config["train_micro_batch_size_per_gpu"] * world == 64
        assert config["gradient_accumulation_steps"] == 1
        assert config["bf16"]["enabled"] is True
        assert config["gradient_clipping"] == 1.0
        assert config["optimizer"]["type"] == "AdamW"
        assert config["optimizer"]["params"] == {
            "lr": 1e-4,
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "weight_decay": 0.01,
            "torch_adam": True,
            "fused": True,
        }
        assert config["scheduler"] == {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_type": "linear",
                "warmup_min_lr": 0,
                "warmup_max_lr": 1e-4,
                "warmup_num_steps": 891,
                "total_num_steps": 8910,
            },
        }
    with pytest.raises(
        UsageError, match=r"64 does not divide over 3 GPUs; numbers of GPUs that do: 1, 2, 4, 8, 16, 32, 6"
    ):
        resolve_ds_config(asked, 3, total_steps=10)


@pytest.fixture(scope="module")
def wide(tiny_run) -> list[str]:
    """A run with matrices above 100,000 entries, which stage 3 cuts at DeepSpeed's default threshold.

    And with frequencies, 95 a layer, that two ranks cannot share out evenly.
    """
    size = ("--model_args", "n_layer=2", "n_embd=190", "n_head=5", "n_positions=32")
    no_dropout = ("resid_pdrop=0", "embd_pdrop=0", "attn_pdrop=0")
    short = ("--max_steps", "2", "--warmup_ratio", "0", "--train_batch_size", "64")
    return [*tiny_run, *size, *no_dropout, *short]


@pytest.fixture(scope="module")
def trained(wide, tmp_path_factory) -> Path:
    """The folder of: a run by each JSON on two ranks; `one`, by the default one on one; `start`, with rate 0.

    All of a kind in the same processes, and with no compiler in reach: the optimizer must need none.
    """
    folder = tmp_path_factory.mktemp("trained")
    code = """if True:
        import json, os, sys
        sys.path.insert(0, os.getcwd())
        import train_ds
        from gpt2_variants.ending import end_with
        def main():
            for arguments in json.loads(sys.argv[1]):
                code = train_ds.main(arguments)
                assert code == 0, code
            return 0
        end_with(main)
    """

    def run_of(name: str, out: str, *more: str) -> list[str]:
        options = ["--variant", "rotating_head", *wide, "--deepspeed_config", name, *more]
        return [*options, "--output_dir", str(folder / out)]

    on_two = json.dumps([run_of(name, name) for name in JSONS])
    on_one = json.dumps([run_of("zero1.json", "one"), run_of("zero1.json", "start", "--learning_rate", "0")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "/nonexistent")
        processes = launch(2, [on_two], program=("-c", code)) + launch(1, [on_one], program=("-c", code))
    results = finish(processes, seconds=240)
    assert [code for code, _ in results] == [0, 0, 0], "\n".join(err[-2000:] for _, err in results)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", JSONS)
def test_a_json_trains_on_two_ranks_and_exports_what_one_rank_does(name, trained):
    """The exported float32 weights have moved from the start as on one rank, within bf16's noise."""
    for a, b in zip(metrics(trained / "one"), metrics(trained / name), strict=True):
        assert b.get("loss") == pytest.approx(a.get("loss"), abs=2e-3)
        assert b.get("eval_loss") == pytest.approx(a.get("eval_loss"), abs=2e-3)
    start, expected, exported = (load_file(trained / out / "model/model.safetensors") for out in ("start", "one", name))
    assert exported.keys() == expected.keys() == start.keys()
    for key, weight in exported.items():
        moved, moved_on_one = weight - start[key], expected[key] - start[key]
        assert weight.dtype == torch.float32
        assert moved_on_one.norm() > 0, key
        # measured: 0.10 for one bias, 0.02 else; weights rounded to bf16 or left behind would be at 1
        assert (moved - moved_on_one).norm() < 0.25 * moved_on_one.norm(), key


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradient_accumulation_changes_nothing(stage, tiny_run, ds_json, tmp_path):
    options = [*tiny_run, "resid_pdrop=0", "embd_pdrop=0", "attn_pdrop=0", "--max_steps", "6"]
    options += ["--deepspeed_config", ds_json(**FLOAT32, zero_optimization=zero(stage))]
    plain = metrics(train(options, tmp_path / "plain"))
    micro = ("--per_device_train_batch_size", "2", "--train_batch_size", "8")
    accumulated = metrics(train(options, tmp_path / "accumulated", *micro))
    assert json.loads((tmp_path / "accumulated/ds_config.json").read_text())["gradient_accumulation_steps"] == 4
    assert len(plain) == 8
    for a, b in zip(plain, accumulated, strict=True):
        assert a.keys() == b.keys()
        for key in ("loss", "eval_loss", "eval_infill_loss", "grad_norm"):
            assert b.get(key) == pytest.approx(a.get(key), abs=1e-5), (a["step"], key)


@pytest.mark.parametrize("variant", ["duo_predict", "drift_diffusion"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_activation_checkpointing_changes_nothing(stage, variant, tiny_run, ds_json, tmp_path, monkeypatch):
    """Dropout on, and the noise of the diffusion variants: what is recomputed draws the same. In bf16, bit for bit."""
    calls = []
    original = GPT2MLP.forward
    monkeypatch.setattr(
        GPT2MLP, "forward", lambda self, *a: calls.append(torch.is_grad_enabled()) or original(self, *a)
    )
    options = [*tiny_run, "--max_steps", "6", "--deepspeed_config", ds_json(zero_optimization=zero(stage))]
    plain = metrics(train(options, tmp_path / "plain", variant=variant))
    once = sum(calls)
    calls.clear()
    assert metrics(train(options, tmp_path / "checkpointed", "--gradient_checkpointing", variant=variant)) == plain
    assert once == 6 * 2  # steps x layers
    assert sum(calls) == 2 * once


def deepspeed_environment(monkeypatch, **variables: str):
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_SIZE",
        "LOCAL_WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "GLOO_SOCKET_IFNAME",
    ):
        monkeypatch.setenv(name, "")  # so that what is set meanwhile is undone
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "number"),
    [
        ({}, 1),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_SIZE": "8"}, 1),
        ({"RANK": "3", "WORLD_SIZE": "16", "LOCAL_SIZE": "8"}, 2),
        ({"RANK": "3", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "4"}, 4),
        ({"RANK": "3", "WORLD_SIZE": "5", "LOCAL_SIZE": "4"}, 2),  # nodes of 4 and 1
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, 1),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}, 2),
    ],
)
def test_the_number_of_nodes(variables, number, monkeypatch):
    deepspeed_environment(monkeypatch, **variables)
    assert nodes.number_of_nodes() == number


def test_gloo_gets_an_interface_only_where_the_own_name_leads_nowhere(monkeypatch, capsys):
    several = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    deepspeed_environment(monkeypatch, **several)
    nodes.choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"  # towards 127.0.0.1
    assert "using GLOO_SOCKET_IFNAME=lo, the interface towards 127.0.0.1" in capsys.readouterr().err
    deepspeed_environment(monkeypatch, **several, GLOO_SOCKET_IFNAME="mine")
    nodes.choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    deepspeed_environment(monkeypatch, **{**several, "LOCAL_SIZE": "2"})  # one node
    nodes.choose_interface()
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    assert not capsys.readouterr().err


@pytest.mark.parametrize("variable", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_processes_that_do_not_know_their_rank_are_refused(variable, tiny_run, tmp_path, monkeypatch, capsys):
    deepspeed_environment(monkeypatch, **{variable: "8"})
    assert train_ds.main(["--variant", "gpt2", *tiny_run, "--output_dir", str(tmp_path / "run")]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error:"))
    assert "started 8 processes without RANK" in line
    assert "start one `deepspeed --no_ssh` or `torchrun` per node" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_folder_that_the_nodes_do_not_share_is_found_out(tmp_path):
    """Two ranks that count as nodes: each asks for the same folder, then each for one of its own."""
    code = """if True:
        import os, sys, torch.distributed as dist
        from pathlib import Path
        sys.path.insert(0, os.getcwd())
        from gpt2_variants import nodes
        from gpt2_variants.ending import end_with
        os.environ["LOCAL_SIZE"] = "1"
        nodes.SECONDS_TO_APPEAR = float(sys.argv[2])
        dist.init_process_group("gloo")
        top, rank = Path(sys.argv[1]), os.environ["RANK"]
        (top / rank).mkdir()
        dist.barrier()
        print(nodes.nodes_without(top / "runs" / "new"), nodes.nodes_without(top / rank / "new"))
        end_with(lambda: 0)  # threads of Gloo's may abort a Python that takes itself apart
    """
    processes = launch(2, [str(tmp_path), str(patience(1))], program=("-c", code))
    answers = [output_of(p, 60) for p in processes]
    for p, (out, err) in zip(processes, answers, strict=True):
        assert p.returncode == 0, err
        assert out.split() == ["[]", f"[{socket.gethostname()!r}]"]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["0", "1"]


def command(*launcher: str) -> list[str]:
    """A launcher's command line for train_ds.py; `launcher` is a program beside this Python and its options."""
    program, *options = launcher
    return [str(Path(sys.executable).parent / program), *options, str(ROOT / "train_ds.py")]


@pytest.fixture
def float32_run(tiny_run, ds_json) -> list[str]:
    no_dropout = ("resid_pdrop=0", "embd_pdrop=0", "attn_pdrop=0")
    return [*tiny_run, *no_dropout, "--deepspeed_config", ds_json(**FLOAT32), "--max_steps", "12"]


def assert_same_curve(one: Path, other: Path):
    assert len(metrics(one)) == 15
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert a.keys() == b.keys()
        for key in ("loss", "eval_loss", "eval_infill_loss"):
            assert b.get(key) == pytest.approx(a.get(key), abs=1e-5), (a["step"], key)


@pytest.mark.slow
def test_torchrun_trains_on_two_ranks(float32_run, tmp_path):
    one = train(float32_run, tmp_path / "one")
    start = command("torchrun", "--standalone", "--nproc_per_node", "2")
    options = ["--variant", "duo_predict", *float32_run, "--output_dir", str(tmp_path / "two")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = run_to_end([*start, *options], 240, env=env, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    assert json.loads((tmp_path / "two/run.json").read_text())["starts"][0]["world_size"] == 2
    assert_same_curve(one, tmp_path / "two")


@pytest.fixture
def two_nodes():
    """Two network namespaces joined by a cable, 10.213.0.1 and 10.213.0.2: their names. Gone afterwards."""
    names = [f"gpt2v{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip(*("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1]))
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.213.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def ip(*arguments: str):
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs the command `ip` (iproute2) to make two network namespaces")
    except subprocess.CalledProcessError as err:
        pytest.skip(f"needs the right to make network namespaces: ip {' '.join(arguments)}: {err.stderr.strip()}")


@pytest.mark.slow
def test_two_nodes_give_the_curve_of_one(float32_run, two_nodes, tmp_path):
    """DeepSpeed's launcher in each of two network namespaces, no ssh; the folder shared; then resumed on both."""
    one = train(float32_run, tmp_path / "one")
    (tmp_path / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n")
    options = ["--variant", "duo_predict", *float32_run, "--output_dir", str(tmp_path / "two")]
    environment = {k: v for k, v in os.environ.items() if k != "GLOO_SOCKET_IFNAME"} | {"OMP_NUM_THREADS": "1"}

    def on_both(*more: str) -> list[str]:
        processes = []
        for rank, name in enumerate(two_nodes):
            start = command(
                *("deepspeed", "--hostfile", str(tmp_path / "hostfile"), "--no_ssh", "--node_rank", str(rank)),
                *("--master_addr", "10.213.0.1", "--master_port", "29613"),
            )
            processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *start, *options, *more],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    cwd=ROOT,
                )
            )
        results = finish(processes, seconds=280)
        assert [code for code, _ in results] == [0, 0], results
        return [err for _, err in results]

    errors = on_both()
    record = json.loads((tmp_path / "two/run.json").read_text())
    assert record["status"] == "finished"
    assert record["starts"][0]["world_size"] == 2
    assert_same_curve(one, tmp_path / "two")
    shards = (tmp_path / "two/checkpoints/step-00000012").glob("*optim_states.pt")
    assert len(list(shards)) == 2
    if not nodes._reachable_by_name():
        assert all("GLOO_SOCKET_IFNAME=cable" in err for err in errors)
    on_both("--resume_from_checkpoint", "auto", "--max_steps", "14")
    assert [r["step"] for r in metrics(tmp_path / "two") if "loss" in r] == list(range(1, 15))


@pytest.mark.slow
def test_the_slurm_script_of_the_page_on_clusters(float32_run, tmp_path):
    """With stand-ins for `scontrol` and `srun` that know two nodes, both this machine, of one slot each."""
    one = train(float32_run, tmp_path / "one")
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "gpt2_variants/training/CLUSTERS.md").read_text(), flags=re.DOTALL)
    (script,) = (block for block in blocks if "#SBATCH" in block)
    asked = ["--variant", "duo_predict", *float32_run, "--output_dir", str(tmp_path / "two")]
    script = script.replace("slots=8", "slots=1").replace("--variant gpt2", shlex.join(asked))
    script = script.replace("train_ds.py", str(ROOT / "train_ds.py"))
    stand_ins = {
        "scontrol": "echo localhost; echo node-b",
        "srun": 'SLURM_NODEID=0 "$@" & SLURM_NODEID=1 "$@" & wait -n && wait -n',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    out = run_to_end(
        ["bash", "-c", script],
        280,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert out.returncode == 0, out.stderr
    assert_same_curve(one, tmp_path / "two")
