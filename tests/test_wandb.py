"""Weights & Biases: the real client, its offline files read back, and servers that are not there."""

import http.server
import json
import os
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import finish, launch, patience

from gpt2_variants import network
from gpt2_variants.config.command_line import parse
from gpt2_variants.faults import UsageError
from gpt2_variants.trackers import wandb
from gpt2_variants.trackers.jsonl import read_metrics
from gpt2_variants.trackers.tracker import TrackedRun

pytest.importorskip("wandb")
KEY = "0123456789abcdef" * 2 + "deadbeef"


@pytest.fixture(autouse=True)
def _no_account(monkeypatch, tmp_path):
    """No mode, no key, nobody to ask."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("W&B asked a question"))
    network.answers.cache_clear()


BLOCK, CHUNK_HEAD, FILE_HEAD = 32 * 1024, 7, 7


def chunks(file: Path) -> Iterator[bytes]:
    """The messages in a file of W&B's: LevelDB's log format (blocks of 32 KiB) after 7 bytes of its own."""
    content, at, message = file.read_bytes(), FILE_HEAD, b""
    assert content.startswith(b":W&B")
    while at + CHUNK_HEAD <= len(content):
        if BLOCK - at % BLOCK < CHUNK_HEAD:  # too little for a head: padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        message += content[at + CHUNK_HEAD : at + CHUNK_HEAD + length]
        at += CHUNK_HEAD + length
        if kind in (1, 4):  # whole, or its last part
            yield message
            message = b""


def read(file: Path) -> dict[str, Any]:
    """What stands in an offline file, by W&B's own messages: name, group, config, metrics' axes, lines of history."""
    from wandb.proto import wandb_internal_pb2

    found: dict[str, Any] = {"history": [], "axes": {}}
    for data in chunks(file):
        record = wandb_internal_pb2.Record.FromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"name": record.run.display_name, "group": record.run.run_group, "project": record.run.project}
            found["config"] = {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "metric":
            found["axes"][record.metric.glob_name or record.metric.name] = record.metric.step_metric
        elif kind == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found["history"].append({k: v for k, v in items.items() if not k.startswith("_")})
    return found


def written(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.slow
def test_a_run_of_two_ranks_is_logged_once_as_metrics_jsonl_has_it(tiny_run, tmp_path):
    """Under one name, grouped by family, with run.json as config and the optimizer step as the axis of everything."""
    folder = tmp_path / "a run"
    options = ["--variant", "drift", *tiny_run, "--report_to", "wandb", "--max_steps", "7", "--output_dir", str(folder)]
    results = finish(launch(2, options))
    assert [code for code, _ in results] == [0, 0], results
    (file,) = written(folder)
    found = read(file)
    assert (found["name"], found["group"], found["project"]) == ("a run", "drift_diffusion", "gpt2_variants")
    facts = json.loads((folder / "run.json").read_text())
    for name in ("variant", "options", "num_parameters", "flops_per_token", "versions", "data_fingerprint"):
        assert found["config"][name] == facts[name]
    assert found["axes"]["*"] == "step"
    expected = []
    for record in read_metrics(folder / "metrics.jsonl"):
        name = lambda key: key if key == "step" else f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}"
        expected.append({name(key): value for key, value in record.items()})
    assert found["history"] == expected
    assert {"eval/perplexity", "eval/accuracy", "eval/loss"} <= found["history"][-1].keys()
    sync = f"wandb sync '{folder}'/wandb/offline-*"
    assert results[0][1].count(sync) == 2  # as it starts, and as it ends
    assert "W&B: offline (there is no API key)" in results[0][1]
    assert "W&B" not in results[1][1]
    # the command's pattern means these files, in a shell
    listed = subprocess.run(["bash", "-c", sync.replace("wandb sync", "ls -d")], capture_output=True, text=True)
    assert listed.stdout.split("\n")[0] == str(file.parent)


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_wandb_run(tiny_run, tmp_path):
    options = ["--variant", "gpt2", *tiny_run, "--report_to", "wandb", "--output_dir", str(tmp_path / "run")]
    for more in (["--max_steps", "2"], ["--max_steps", "3", "--resume_from_checkpoint", "auto"]):
        assert finish(launch(1, [*options, *more]))[0][0] == 0
    run_id = json.loads((tmp_path / "run/run.json").read_text())["wandb_run_id"]
    assert run_id.startswith("gpt2-")
    assert [file.name for file in written(tmp_path / "run")] == [f"run-{run_id}.wandb"] * 2
    steps = [
        [line["step"] for line in read(file)["history"] if "train/loss" in line] for file in written(tmp_path / "run")
    ]
    assert steps == [[1, 2], [3]]


@pytest.mark.slow
def test_report_to_none_does_not_import_wandb(tiny_run, tmp_path):
    options = ["--variant", "gpt2", *tiny_run, "--max_steps", "1", "--output_dir", str(tmp_path / "run")]
    code = "import sys, train_ds; from gpt2_variants.ending import end_with\n"
    code += (
        f"def main():\n    code = train_ds.main({options!r})\n    assert 'wandb' not in sys.modules\n    return code\n"
    )
    code += "end_with(main)"
    (result,) = finish(launch(1, [], program=("-c", code)))
    assert result[0] == 0, result
    assert not (tmp_path / "run" / "wandb").exists()


def log_once(folder: Path) -> None:
    tracker = wandb.WandbTracker(folder, "name", "gpt2", {"seed": 42}, "gpt2-0123")
    tracker.log({"step": 10, "loss": 2.0})
    tracker.close()


class _Refusal(http.server.BaseHTTPRequestHandler):
    """A server that is there and knows nothing."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_error(404)

    do_HEAD = do_POST = do_GET

    def log_message(self, *args) -> None:
        pass


@pytest.mark.parametrize("where", ["nobody listens", "refuses"])
def test_with_a_key_and_no_server_the_run_is_kept_offline_within_seconds(where, tmp_path, monkeypatch, capfd):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refusal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = "http://127.0.0.1:9" if where == "nobody listens" else f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    began = time.monotonic()
    log_once(tmp_path)
    assert time.monotonic() - began < patience(20)
    server.shutdown()
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("W&B: offline (")]
    assert ("cannot be reached" in line) == (where == "nobody listens")
    assert [line["train/loss"] for line in read(written(tmp_path)[0])["history"]] == [2.0]
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]


def test_a_key_is_found_where_wandb_login_leaves_it(tmp_path, monkeypatch):
    assert not wandb.wandb_has_key()
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text(f"machine wandb.my-company.com login user password {KEY}\n")
    os.chmod(tmp_path / "netrc", 0o600)
    assert not wandb.wandb_has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.my-company.com")
    assert wandb.wandb_has_key()


def test_an_explicit_mode_that_cannot_be_had_is_a_fault(tiny_run, tmp_path, monkeypatch):
    options = ["--variant", "gpt2", *tiny_run, "--report_to", "wandb", "--output_dir", str(tmp_path / "run")]

    def the_fault() -> str:
        with pytest.raises(UsageError) as caught:
            parse(options)
        (line,) = caught.value.lines
        return line

    monkeypatch.setenv("WANDB_MODE", "onlin")
    assert the_fault().startswith("--report_to wandb: WANDB_MODE=onlin: one of online, offline, disabled, shared")
    monkeypatch.setenv("WANDB_MODE", "online")
    assert "there is no API key" in the_fault()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached" in the_fault()
    for mode in ("offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        assert parse(options).report_to == ("wandb",)


@pytest.mark.parametrize(("mode", "kept"), [("online", "https://wandb.ai/me/x/runs/1"), ("offline", None)])
def test_where_a_run_can_be_seen_is_kept_of_one_that_is_online(mode, kept, tmp_path, monkeypatch):
    class Run:
        url = "https://wandb.ai/me/x/runs/1"

        def define_metric(self, *args, **settings) -> None:
            pass

    monkeypatch.setattr("wandb.init", lambda **settings: Run())
    monkeypatch.setattr(wandb, "wandb_mode", lambda: (mode, "there is no API key"))
    facts = {"variant": "gpt2"}
    wandb.open_wandb(TrackedRun(tmp_path, "name", "group", facts, 0, lambda **new: facts.update(new)))
    assert facts.get("wandb_url") == kept
