"""The plot of a run, `curves.png`: its ticks."""

import math

import pytest
from made_runs import make_run
from matplotlib.figure import Figure

from gpt2_variants.report import plot


@pytest.mark.parametrize(
    ("perplexities", "unigram", "shown"),
    [
        ([2803.9], 839.5, ["1,200", "2,000", "2,800"]),
        ([2803.9, 900.1, 310.4, 150.2, 148.7], 839.5, ["200", "500", "1,000", "2,000"]),
        ([31.4, 30.2], None, ["30.5", "31"]),
    ],
)
def test_ticks_are_whole_steps_and_plain_perplexities(perplexities, unigram, shown, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (figures.append(self), path.touch()))
    losses = {2 * n: math.log(perplexity) for n, perplexity in enumerate(perplexities, start=1)}
    plot(make_run(tmp_path / "run", losses=losses, every=2, unigram_perplexity=unigram))
    (figure,) = figures
    figure.canvas.draw()
    for axes in figure.axes:
        lowest, highest = axes.get_xlim()
        inside = [tick for tick in axes.get_xticks() if lowest <= tick <= highest]
        assert inside[0] == 0
        assert all(tick == int(tick) for tick in inside)
        assert len(inside) >= 2
    right = figure.axes[1]
    lowest, highest = right.get_ylim()
    ticks = zip(right.get_yticks(), right.get_yticklabels(), strict=True)
    labels = [label.get_text() for tick, label in ticks if lowest <= tick <= highest]
    assert set(shown) <= set(labels), labels
    assert len(labels) <= 8
    assert not any("$" in label for label in labels), "no powers of ten"
