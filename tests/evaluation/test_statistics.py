"""Intervals and p against published examples, independent computations, and simulated comparisons."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import comb, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.special import xlogy
from scipy.stats import norm
from statsmodels.stats.contingency_tables import mcnemar

from loopexport.evaluation import statistics
from loopexport.evaluation.statistics import (
    bootstrap_interval,
    holm,
    items_needed,
    mcnemar_mid_p,
    sign_flip_p,
    smallest_difference,
    tango_interval,
)

COUNTS = [
    (0, 0, 1),
    (1, 0, 1),
    (0, 0, 50),
    (1, 7, 21),
    (3, 0, 30),
    (12, 5, 100),
    (40, 22, 500),
    (30, 30, 60),
    (9, 0, 9),
]
counts = st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 400)).map(
    lambda each: (each[0], each[1], max(1, sum(each)))
)


def test_published_example_of_tango_and_mid_p():
    """Fagerland, Lydersen, Laake 2014: 21 children before and after a transplantation, 1 and 7 of them discordant."""
    assert tango_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert mcnemar_mid_p(1, 7) == pytest.approx(0.0391, abs=5e-5)


def score_statistic(gained: int, lost: int, items: int, difference: float) -> float:
    """The score test by its definition: it finds the constrained maximum of the likelihood numerically."""

    def minus_log_likelihood(share_lost: float) -> float:
        share_gained = share_lost + difference
        same = 1 - share_lost - share_gained
        return -(xlogy(gained, share_gained) + xlogy(lost, share_lost) + xlogy(items - gained - lost, same))

    limits = (max(0.0, -difference), (1 - difference) / 2)
    share = minimize_scalar(minus_log_likelihood, bounds=limits, method="bounded", options={"xatol": 1e-12}).x
    return ((gained - lost) / items - difference) / sqrt((2 * share + difference - difference**2) / items)


@pytest.mark.parametrize("case", COUNTS)
def test_tango_inverts_the_score_test(case):
    gained, lost, items = case
    observed = (gained - lost) / items
    low, high = tango_interval(*case)
    for end, limit, z in ((low, -1, 1.959964), (high, 1, -1.959964)):
        if abs(end) < 1:
            theirs = brentq(lambda d, z=z: score_statistic(*case, d) - z, limit * (1 - 1e-9), observed + limit * 1e-6)
            assert end == pytest.approx(theirs, abs=2e-6)


@given(counts)
def test_tango_is_inside_its_limits_and_mirrors(case):
    gained, lost, items = case
    low, high = tango_interval(*case)
    assert -1 <= low <= round((gained - lost) / items, 12) <= high <= 1
    assert high > low
    assert tango_interval(lost, gained, items) == (-high, -low)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (4, 4), (5, 0), (0, 6), (13, 4), (40, 61)])
def test_mid_p_is_a_sum_of_binomial_terms(gained, lost):
    total, smaller = gained + lost, min(gained, lost)
    term = [Fraction(comb(total, k), 2**total) for k in range(total + 1)]
    assert mcnemar_mid_p(gained, lost) == pytest.approx(float(2 * (sum(term[:smaller]) + term[smaller] / 2)))
    exact = mcnemar([[0, gained], [lost, 0]], exact=True).pvalue
    assert mcnemar_mid_p(gained, lost) <= exact


def test_mid_p_needs_five_items_in_one_direction():
    assert mcnemar_mid_p(4, 0) > 0.05 >= mcnemar_mid_p(5, 0)


@pytest.mark.parametrize("p_values", [[], [0.04], [0.01, 0.04, 0.03], [0.5, 0.9, 0.5], [0.001] * 4])
def test_holm_by_hand(p_values):
    """The k-th smallest of m is multiplied by m - k + 1, and no adjusted p is below an earlier one."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    theirs, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, p_values[index] * (len(p_values) - rank)))
        theirs[index] = largest
    assert holm(p_values) == pytest.approx(theirs)


def test_sign_flips_are_counted_exactly_when_few():
    assert sign_flip_p([0.25] * 5 + [0] * 20) == 2 / 2**5
    assert sign_flip_p([3, 1, -1]) == 6 / 8  # the sums are 5, 3, 3, 1 and their opposites; 3 is observed
    assert sign_flip_p([0.5]) == 1
    assert sign_flip_p([0.0, 0.0]) == 1


def test_sign_flips_agree_with_the_normal_law_when_many():
    values = np.random.default_rng(3).normal(0.12, 1, 300)
    z = values.sum() / sqrt((values**2).sum())
    assert sign_flip_p(values) == pytest.approx(2 * norm.sf(abs(z)), abs=0.01)


numbers = st.lists(st.sampled_from([-1.0, -0.75, -0.25, 0.0, 0.0, 0.5, 1.0]), min_size=1, max_size=25)


@given(numbers)
@settings(max_examples=60, deadline=None)
def test_bootstrap_and_sign_flips_mirror(values):
    low, high = bootstrap_interval(values)
    assert low <= np.mean(values) + 1e-9
    assert high >= np.mean(values) - 1e-9
    opposite = [-value for value in values]
    assert bootstrap_interval(opposite) == pytest.approx((-high, -low), abs=1e-11)
    assert sign_flip_p(opposite) == sign_flip_p(values)


@pytest.mark.parametrize("items", [1, 7, 50])
def test_bootstrap_without_variation_is_tango(items):
    assert bootstrap_interval([0.0] * items) == pytest.approx(tango_interval(0, 0, items))
    assert bootstrap_interval([1.0] * items) == pytest.approx(tango_interval(items, 0, items))
    assert bootstrap_interval([0.0] * items, scale=100) == pytest.approx([100 * x for x in tango_interval(0, 0, items)])


def test_bootstrap_of_few_problems_is_as_wide_as_students_t():
    values = np.random.default_rng(1).normal(0, 1, 12)
    low, high = bootstrap_interval(values)
    students = 2 * 2.201 * values.std(ddof=1) / sqrt(12)
    assert high - low == pytest.approx(students, rel=0.06)


def test_smallest_difference_follows_the_formula_down_to_three_items():
    assert smallest_difference(0.08, 500) == pytest.approx(2.80 * sqrt(0.08 / 500), rel=1e-3)
    assert smallest_difference(0, 100) == smallest_difference(0.03, 100) == pytest.approx(0.0485, abs=1e-4)
    assert smallest_difference(0, 1) == 1


def test_items_needed():
    assert items_needed(0.15, 0.0264) == pytest.approx(7.85 * 0.15 / 0.0264**2, rel=1e-3)
    assert items_needed(0.1, 0) is None


tango = cache(tango_interval)
mid_p = cache(mcnemar_mid_p)


def simulate(items: int, discordance: float, difference: float) -> tuple[float, float]:
    """Coverage of Tango's interval, and how often mid-p rejects, in 2,000 comparisons."""
    shares = [(discordance + difference) / 2, (discordance - difference) / 2, 1 - discordance]
    drawn = np.random.default_rng(11).multinomial(items, shares, 2000)
    intervals = np.array([tango(int(gained), int(lost), items) for gained, lost, _ in drawn])
    covered = (intervals[:, 0] <= difference) & (difference <= intervals[:, 1])
    return covered.mean(), np.mean([mid_p(int(gained), int(lost)) <= 0.05 for gained, lost, _ in drawn])


@pytest.mark.parametrize(
    ("items", "discordance", "difference"),
    [(100, 0.10, 0), (300, 0.06, 0), (60, 0.05, 0), (100, 0.10, 0.05), (300, 0.10, 0.03), (1000, 0.03, 0.01)],
)
def test_tango_covers_and_mid_p_keeps_its_level(items, discordance, difference):
    """The bound is 2.5 standard errors of 2,000 repetitions from 95 %, and from 5 %."""
    coverage, rejected = simulate(items, discordance, difference)
    assert 0.933 <= coverage <= 0.985
    if not difference:
        assert rejected <= 0.062


@pytest.mark.parametrize(("items", "discordance"), [(300, 0.10), (1000, 0.05), (500, 0.15)])
def test_smallest_difference_is_found_with_the_announced_power(items, discordance):
    _, found = simulate(items, discordance, smallest_difference(discordance, items))
    assert 0.76 <= found <= 0.86


def clustered(rng, problems: int, seeds: int, effect: float) -> np.ndarray:
    """Mean differences of problems whose own chances of being solved vary, as in sampled generation."""
    chance = rng.beta(0.6, 0.6, problems)
    moved = np.clip(chance + rng.normal(effect, 0.1, problems), 0, 1)
    return rng.binomial(seeds, moved) / seeds - rng.binomial(seeds, chance) / seeds


def test_bootstrap_of_problems_covers_and_sign_flips_keep_their_level(monkeypatch):
    """30 problems with 4 seeds; problems differ in how hard they are, so that seeds are no independent items."""
    monkeypatch.setattr(statistics, "RESAMPLES", 499)
    rng = np.random.default_rng(5)
    draws = [clustered(rng, 30, 4, 0) for _ in range(600)]
    truth = np.mean([clustered(rng, 30, 400, 0).mean() for _ in range(2000)])
    intervals = [bootstrap_interval(each) for each in draws]
    coverage = np.mean([low <= truth <= high for low, high in intervals])
    rejected = np.mean([sign_flip_p(each) <= 0.05 for each in draws])
    assert 0.925 <= coverage <= 0.98
    assert rejected <= 0.075
