"""Intervals and tests over few seeds: against hand calculations, and on runs that differ by chance alone."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from gpt2_variants.faults import UsageError
from gpt2_variants.report import statistics
from gpt2_variants.report.statistics import (
    MOST_SEEDS,
    Estimate,
    holm,
    mean_interval,
    paired,
    paired_test,
    seeds_needed,
    welch,
    welch_test,
)

T_975 = {1: 12.706205, 2: 4.302653, 4: 2.776445}  # quantiles of Student's t, from a printed table


def test_paired_by_hand():
    found = paired([-0.1, -0.3, -0.2])
    half = T_975[2] * 0.1 / math.sqrt(3)
    assert (found.mean, found.low, found.high) == pytest.approx((-0.2, -0.2 - half, -0.2 + half))
    t = 0.2 / (0.1 / math.sqrt(3))
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))  # the distribution of two degrees, in closed form
    assert (found.n, found.paired, found.sd) == (3, True, pytest.approx(0.1))
    two = paired([0.1, 0.3])
    assert (two.low, two.high) == pytest.approx((0.2 - T_975[1] * 0.1, 0.2 + T_975[1] * 0.1))


def test_welch_by_hand():
    ours, theirs = [1.0, 2.0, 6.0, 3.0], [2.0, 2.5, 2.1]
    a, b = np.var(ours, ddof=1) / 4, np.var(theirs, ddof=1) / 3
    degrees = (a + b) ** 2 / (a**2 / 3 + b**2 / 2)
    half = stats.t.ppf(0.975, degrees) * math.sqrt(a + b)
    difference = 3.0 - 2.2
    found = welch(ours, theirs)
    assert (found.mean, found.low, found.high) == pytest.approx((difference, difference - half, difference + half))
    assert found.p == pytest.approx(2 * stats.t.sf(difference / math.sqrt(a + b), degrees))
    assert (found.n, found.paired, found.sd) == (3, False, pytest.approx(math.sqrt(4 * a + 3 * b)))


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_equal_differences_leave_no_doubt(value):
    sure = (value, value, value, 0.0 if value else 1.0)
    assert paired([value] * 3) == Estimate(*sure, n=3, paired=True, sd=0.0)
    assert welch([4 + value] * 2, [4.0] * 3) == Estimate(*sure, n=2, paired=False, sd=0.0)
    # but for rounding
    assert paired([0.3 - 0.2, 0.1, 0.4 - 0.3]).p == 0.0
    assert welch([1.0, 1.0], [1.0, 1.5]).p > 0.05, "one side alone may be equal"


def test_one_value_and_values_that_are_no_numbers_have_no_interval():
    assert paired([0.5]) == Estimate(0.5, None, None, None, 1, True, None)
    assert welch([0.5], [0.25, 0.75]) == Estimate(0.0, None, None, None, 1, False, None)
    for bad in (math.nan, math.inf):
        for found in (paired([0.5, bad]), welch([1.0, bad], [1.0, 2.0]), welch([1.0, 2.0], [bad, bad])):
            assert math.isnan(found.mean)
            assert found.low is found.high is found.p is found.sd is None


def test_holm_by_hand():
    # 4 x 0.005; 3 x 0.01; 2 x 0.03; 0.04, which the one before holds up
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@pytest.mark.parametrize(("sd", "difference"), [(0.1, 0.1), (0.02, -0.01), (0.3, 0.5), (0.1, 0.02)])
def test_seeds_needed_is_the_least_number_that_is_told(sd, difference):
    def told(n: int) -> bool:
        """Of n pairs with just this mean and spread."""
        values = np.resize([1.0, -1.0], n - n % 2).tolist() + [0.0] * (n % 2)
        values = np.array(values) / np.std(values, ddof=1) * sd + difference
        return stats.ttest_1samp(values, 0).pvalue < 0.05

    n = seeds_needed(sd, difference)
    assert told(n)
    assert n == 2 or not told(n - 1)
    assert seeds_needed(sd, difference, alpha=0.05 / 11) > n


def test_seeds_needed_has_a_cap():
    assert seeds_needed(1.0, 0.0) == seeds_needed(1.0, 1e-6) == MOST_SEEDS
    assert seeds_needed(0.0, 0.0) == MOST_SEEDS
    assert seeds_needed(0.0, 1e-6) == 2


def test_the_interval_of_a_mean():
    values = [3.9, 4.0, 4.3, 4.1, 3.8]
    half = T_975[4] * np.std(values, ddof=1) / math.sqrt(5)
    found = mean_interval(np.mean(values), np.std(values, ddof=1), 5)
    assert found == pytest.approx((np.mean(values) - half, np.mean(values) + half))
    assert found == pytest.approx(stats.ttest_1samp(values, 0).confidence_interval())


def test_without_scipy_one_line_names_the_cure(monkeypatch):
    monkeypatch.setattr(statistics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"need scipy.*: pip install scipy$"):
        statistics.need_scipy()


# --- how often a difference is found that is not there ----------------------------------------------------------------

PAGES, VARIANTS = 2000, 11


def losses(seeds: int, shared: float) -> tuple[np.ndarray, np.ndarray]:
    """Of variants [seeds, PAGES, VARIANTS] and their baseline [seeds, PAGES, 1]; `shared`: the part of a seed."""
    draw = np.random.default_rng(seeds)
    of_seed = math.sqrt(shared) * draw.normal(size=(seeds, PAGES, 1))
    own = draw.normal(size=(seeds, PAGES, VARIANTS + 1)) * math.sqrt(1 - shared)
    all_losses = 4 + 0.02 * (of_seed + own)
    return all_losses[..., 1:], all_losses[..., :1]


@pytest.mark.parametrize("shared", [0.0, 0.9])
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("test", ["paired", "welch"])
def test_of_runs_that_differ_by_chance_at_most_six_in_a_hundred_pages_find_a_difference(test, seeds, shared):
    ours, theirs = losses(seeds, shared)
    p = (paired_test(ours - theirs) if test == "paired" else welch_test(ours, theirs)).pvalue
    for page, variant in itertools.product(range(3), range(2)):  # the page's own function gives the same
        one, base = ours[:, page, variant], theirs[:, page, 0]
        assert (paired(one - base) if test == "paired" else welch(one, base)).p == pytest.approx(p[page, variant])
    assert (p[:, 0] < 0.05).mean() <= 0.06
    assert np.mean([min(holm(page.tolist())) < 0.05 for page in p]) <= 0.06
    uncorrected = (p < 0.05).any(axis=1).mean()
    assert uncorrected > 0.1 or test == "welch", "without the correction more would"


def test_a_true_difference_is_found_and_pairing_finds_smaller_ones():
    ours, theirs = losses(3, shared=0.9)
    p = paired_test(ours + 0.2 - theirs).pvalue  # ten times a run's spread
    assert np.mean([max(holm(page.tolist())) < 0.05 for page in p]) > 0.95
    small = ours[..., 0] + 0.03, theirs[..., 0]
    found = [(test < 0.05).mean() for test in (paired_test(small[0] - small[1]).pvalue, welch_test(*small).pvalue)]
    assert found[0] > 2 * found[1]
