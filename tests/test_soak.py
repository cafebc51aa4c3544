"""The soak, a few kills long; at length it is a command of its own, whose table is among the results."""

import random

import pytest
import soak


@pytest.mark.slow
def test_killed_again_and_again_a_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "VARIANTS", ("diffusion", "duo_predict"))
    kills = soak.Soak(tmp_path, random.Random(1), most=40)
    kills.run()
    counts = list(kills.counts.values())
    assert sum(count["kills"] for count in counts) >= 40
    assert all(sum(count[moment] for count in counts) for moment in ("before a step", "between steps", "checkpoint"))
    assert "| all |" in soak.table(kills, 1)
