"""SIGKILL at random moments, also in the middle of saves; every resume must equal the run that was never killed."""

import os
import random
import signal
import time

import pytest
from conftest import finish, launch, metrics

KILLS = int(os.environ.get("SOAK_KILLS", "50"))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_again_and_again_a_run_ends_as_if_it_had_not_been(ranks, tiny_run, tmp_path):
    """Half of the kills on 1 rank, half on 2; bf16, dropout on, a save every second step."""
    options = [*tiny_run, "--save_steps", "2", "--eval_steps", "50", "--logging_steps", "1", "--max_steps", "400"]
    results = finish(launch(ranks, ["--variant", "diffusion", *options, "--output_dir", str(tmp_path / "whole")]))
    assert [code for code, _ in results] == [0] * ranks, results

    folder, rng = tmp_path / "killed", random.Random(0)
    killed, while_saving = 0, 0
    resuming = ["--variant", "diffusion", *options, "--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
    while killed < KILLS // 2:
        before = records(folder)
        processes = launch(ranks, resuming)
        while all(p.poll() is None for p in processes) and records(folder) == before:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        if all(p.poll() is not None for p in processes):
            raise AssertionError(f"ended by itself after {killed} kills: {finish(processes)}")
        for p in rng.sample(processes, ranks):
            p.send_signal(signal.SIGKILL)
        finish(processes)
        killed += 1
        while_saving += bool(list((folder / "checkpoints").glob(".tmp*")))
    results = finish(launch(ranks, resuming), seconds=300)
    assert [code for code, _ in results] == [0] * ranks, results
    assert metrics(folder) == metrics(tmp_path / "whole")
    print(f"{ranks} ranks: {killed} kills, {while_saving} of them while a checkpoint was being written")
    assert while_saving > 0


def records(folder):
    """How many lines of metrics there are, and the newest checkpoint: changes as soon as a start has trained a step."""
    file = folder / "metrics.jsonl"
    return file.read_bytes() if file.exists() else b""
