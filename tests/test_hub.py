"""Pushing to the Hub: the real client against a Hub on loopback."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, finish, launch, output_of, patience, record, train, wait_until
from hub_server import HubServer
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from gpt2_variants import __main__, hub_client, network
from gpt2_variants.hub import publish

TOKEN = "hf_" + "abcdefghijklmnopqrstuvwxyzABCDEFGH"
READ_ONLY = "hf_" + "HGFEDCBAzyxwvutsrqponmlkjihgfedcba"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub whose user ann may write to her own namespace and to a team's; this process and its children know it."""
    with HubServer() as server:
        server.add_user("ann", TOKEN, orgs=(("team", "write"), ("readers", "read")))
        server.add_user("ann", READ_ONLY, role="read")
        for name, value in {
            "HF_ENDPOINT": server.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "hf_home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub_client, "WAITS", (0.0, 0.0))
        network.answers.cache_clear()
        yield server
        network.answers.cache_clear()


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory):
    """A finished run that was never pushed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    (result,) = finish(
        launch(1, ["--variant", "duo_predict", *tiny_run, "--max_steps", "2", "--output_dir", str(folder)])
    )
    assert result[0] == 0, result
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    folder = tmp_path / "duo"
    subprocess.run(["cp", "-r", finished, folder], check=True)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_run_of_two_ranks_pushes_itself(hub, tiny_run, tmp_path):
    """Once; with a card that the Hub understands; and the pushed model loads from there without the package."""
    folder = tmp_path / "run"
    options = ["--variant", "duo_predict", *tiny_run, "--max_steps", "2", "--output_dir", str(folder)]
    results = finish(launch(2, [*options, "--push_to_hub", "--hub_model_id", "team/duo", "--hub_private"]))
    assert [code for code, _ in results] == [0, 0], results
    assert hub.repos["model team/duo"]["private"]
    assert hub.files("team/duo") == files(folder / "model")
    asked = [(method, path) for method, path, _ in hub.requests]
    assert asked.count(("GET", "/api/whoami-v2")) == 1
    assert asked.count(("POST", "/api/models/team/duo/commit/main")) == 1

    card = ModelCard(hub.files("team/duo")["README.md"].decode())
    expected = record(folder)["final_eval"]
    told = {(r.task_type, r.metric_type): r.metric_value for r in card.data.eval_results}
    for prefix, task in (("eval_", "text-generation"), ("eval_infill_", "fill-mask")):
        for figure in ("loss", "perplexity", "accuracy"):
            assert told.pop((task, figure)) == pytest.approx(expected[prefix + figure], abs=1e-6)
    assert not told
    assert (card.data.license, card.data.pipeline_tag, card.data.library_name) == (
        "apache-2.0",
        "text-generation",
        "transformers",
    )
    assert "duo_predict" in card.data.tags
    assert f"| next token | {expected['eval_perplexity']:.2f} |" in card.text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", card.text)
    assert pictures == ["curves.png", "visibility-first-layer.png", "visibility-later-layers.png"]
    for picture in pictures:
        assert hub.files("team/duo")[picture].startswith(b"\x89PNG")
    assert str(tmp_path) not in card.content
    assert "corpus.txt" in card.text

    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.save((ids, AutoModelForCausalLM.from_pretrained(folder / "model")(ids).logits), tmp_path / "expected.pt")
    snippet = re.search(r"```python\n(.*?)```", card.text, flags=re.DOTALL)[1]
    code = f"""if True:
        import importlib.util, sys, torch
        assert importlib.util.find_spec("gpt2_variants") is None
        exec({snippet!r})
        ids, expected = torch.load({str(tmp_path / "expected.pt")!r})
        with torch.no_grad():
            assert torch.equal(model.eval()(ids).logits, expected)
        assert type(model).__module__.startswith("transformers_modules")
    """
    env = {**os.environ, "PYTHONPATH": str(Path(torch.__file__).parent.parent)}
    out = subprocess.run([sys.executable, "-S", "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stderr

    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not [p for p in left if TOKEN.encode() in p.read_bytes()]
    assert not [err for _, err in results if TOKEN in err]


def drop_once_half_read(hub, method: str, path: str, times: int) -> list[int]:
    """Have the server cut the connection in the middle of the first `times` such requests; the list grows by each."""
    dropped: list[int] = []

    def interfere(handler) -> bool:
        if handler.command == method and re.search(path, handler.path) and len(dropped) < times:
            size = int(handler.headers["Content-Length"])
            dropped.append(len(handler.rfile.read(size // 2)))
            handler.close_connection = True
            handler.connection.close()
            return True
        return False

    hub.interfere = interfere
    return dropped


@pytest.mark.parametrize("place", [pytest.param(("PUT", "/lfs/"), marks=pytest.mark.slow), ("POST", "/commit/")])
def test_a_push_cut_off_half_way_leaves_all_in_place_and_can_be_repeated(place, hub, run, monkeypatch, capfd):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits half a minute over each attempt
    before = files(run / "model")
    dropped = drop_once_half_read(hub, *place, times=100)
    assert publish(run, "duo") == 1
    assert len(dropped) >= 3
    assert hub.files("ann/duo") == {}
    assert {name: data for name, data in files(run / "model").items() if name in before} == before
    assert record(run)["status"] == "finished"
    assert record(run)["hub"]["status"] == "failed"
    err = capfd.readouterr().err
    assert re.search(r"^error: not pushed to duo: ", err, flags=re.MULTILINE)
    (again,) = re.findall(r"to repeat the push: python -m gpt2_variants (.*)", err)

    hub.interfere = lambda handler: False
    already = len(hub.requests)
    assert __main__.main(shlex.split(again)) == 0
    assert hub.files("ann/duo") == files(run / "model")
    assert record(run)["hub"]["status"] == "pushed"
    sent = [path for method, path, _ in hub.requests[already:] if method == "PUT"]
    assert len(sent) == (1 if place[0] == "PUT" else 0)  # the weights went through before the commit was cut off


def test_a_fault_that_passes_is_tried_again(hub, run, capfd):
    dropped = drop_once_half_read(hub, "POST", "/commit/", times=1)
    assert publish(run, "duo") == 0
    assert len(dropped) == 1
    assert hub.files("ann/duo") == files(run / "model")
    assert "again in" in capfd.readouterr().err


def test_a_refusal_is_not_tried_again(hub, run, capfd):
    assert publish(run, "someone/duo") == 1
    assert [path for _, path, _ in hub.requests].count("/api/repos/create") == 1
    assert "someone" in capfd.readouterr().err


def test_a_hub_that_is_gone_when_training_ends_costs_seconds(hub, run, monkeypatch, capfd):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    assert publish(run, "duo") == 1
    assert time.monotonic() - began < patience(12)
    assert "cannot be reached" in capfd.readouterr().err


@pytest.mark.parametrize(
    "number", [signal.SIGINT, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGUSR1))]
)
def test_a_signal_ends_a_push(number, hub, run):
    there, released = threading.Event(), threading.Event()

    def interfere(handler) -> bool:
        if "/preupload/" in handler.path:
            there.set()
            released.wait()
        return False

    hub.interfere = interfere
    command = [sys.executable, "-m", "gpt2_variants", "push", str(run)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        wait_until(there.is_set, process)
        process.send_signal(number)
        err = output_of(process)[1]
    finally:
        released.set()
    assert process.returncode == 128 + number
    assert f"error: not pushed to duo: {number.name}" in err
    assert record(run)["hub"]["reason"] == number.name


def test_an_edited_card_is_kept_and_another_is_written_anew(hub, run):
    assert publish(run, "duo") == 0
    assert publish(run, "other") == 0
    assert b'from_pretrained("ann/other"' in hub.files("ann/other")["README.md"]
    (run / "model/README.md").write_text("mine")
    assert publish(run, "duo") == 0
    assert hub.files("ann/duo")["README.md"] == b"mine"


def faults(options: list[str], capfd) -> list[str]:
    import train_ds

    capfd.readouterr()
    began = time.monotonic()
    assert train_ds.main(options) == 2
    assert time.monotonic() - began < patience(8)
    return capfd.readouterr().err.splitlines()


def test_what_stands_in_the_way_is_said_before_training(hub, tiny_run, tmp_path, monkeypatch, capfd):
    """One line each, with nothing written here or there."""
    out = tmp_path / "run"
    options = ["--variant", "gpt2", *tiny_run, "--output_dir", str(out)]
    push = [*options, "--push_to_hub"]
    hub.repos["model ann/public"] = {"private": False, "files": {}, "sha": "0" * 40, "commits": 0}
    before = json.dumps(hub.repos)

    def the_fault(options: list[str]) -> str:
        (line,) = faults(options, capfd)
        return line

    assert "without --push_to_hub" in the_fault([*options, "--hub_model_id", "ann/x"])
    assert "without --push_to_hub" in the_fault([*options, "--hub_private"])
    assert the_fault([*push, "--hub_model_id", "no such/name/"]).startswith("error: --hub_model_id no such/name/: ")
    line = the_fault([*push, "--hub_model_id", "bob/x"])
    assert line == "error: --hub_model_id bob/x: ann may not write there; one of ann, team is allowed"
    assert "readers/x: ann may not write" in the_fault([*push, "--hub_model_id", "readers/x"])
    assert "exists and is public" in the_fault([*push, "--hub_model_id", "ann/public", "--hub_private"])
    # with the other faults of a run
    lines = faults([*push, "--hub_model_id", "bob/x", "--max_steps", "0"], capfd)
    assert [line.split()[1] for line in lines] == ["--max_steps", "--hub_model_id"]

    def hang_up(handler) -> bool:
        if handler.path == "/api/whoami-v2":
            handler.close_connection = True
            handler.connection.close()
        return handler.path == "/api/whoami-v2"

    hub.interfere = hang_up
    assert "does not say whose the token is" in the_fault(push)
    hub.interfere = lambda handler: False
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    assert "the token may only read" in the_fault(push)
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    assert "does not know the token" in the_fault(push)
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no Hugging Face token" in the_fault(push)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in the_fault(push)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "cannot be reached" in the_fault(push)
    assert not out.exists()
    assert json.dumps(hub.repos) == before


def test_a_repository_that_cannot_be_made_stops_the_run_before_it_begins(hub, tiny_run, tmp_path, capfd, in_process):
    """Where the checks found nothing: only the making itself proves it."""

    def interfere(handler) -> bool:
        if handler.path != "/api/repos/create":
            return False
        handler.rfile.read(int(handler.headers["Content-Length"]))
        handler.answer(403, {"error": "storage full"})
        return True

    hub.interfere = interfere
    folder = train(tiny_run, tmp_path / "run", "--push_to_hub", code=2)
    assert "error: --hub_model_id run: cannot be made on the Hub: " in capfd.readouterr().err
    assert not folder.exists()


def test_only_a_finished_run_is_pushed(hub, run, tmp_path, capfd):
    facts = record(run)
    (run / "run.json").write_text(json.dumps({**facts, "status": "interrupted"}))
    assert __main__.main(["push", str(run), "--hub_model_id", "bob/x"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert "is interrupted, and only a finished one" in lines[0]
    assert "bob/x" in lines[1]
    assert __main__.main(["push", str(tmp_path / "nothing")]) == 2
    assert "holds no run" in capfd.readouterr().err
    assert hub.repos == {}
