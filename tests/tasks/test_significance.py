"""The tests of significance, against scipy, published examples and what they promise on data without a difference."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from engine.tasks.significance import RESAMPLES, bootstrap, holm, mcnemar, mean_interval, paired_t


def exact_p(first: int, second: int) -> float:
    """The two-sided binomial test written out: twice the smaller tail of fair coins, at most 1."""
    n, least = first + second, min(first, second)
    tail = sum(Fraction(math.comb(n, k), 2**n) for k in range(least + 1))
    return float(min(Fraction(1), 2 * tail))


@pytest.mark.parametrize("counts", [(0, 0), (3, 3), (1, 8), (0, 5), (0, 6), (10, 25), (37, 12)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_answers(counts: tuple[int, int]) -> None:
    assert mcnemar(*counts, 200).p == pytest.approx(exact_p(*counts), rel=1e-12)


def test_mcnemar_has_the_difference_and_the_interval_of_agresti_and_min() -> None:
    """b = 10 and c = 25 of 100, with a half added to each of the four counts, by hand."""
    found = mcnemar(10, 25, 100)
    assert found.value == pytest.approx(0.15)
    variance = (10.5 + 25.5) - (25.5 - 10.5) ** 2 / 102
    radius = 1.959963985 * math.sqrt(variance) / 102
    assert (found.low, found.high) == pytest.approx((15 / 102 - radius, 15 / 102 + radius))
    assert found.real


def test_five_of_five_discordant_answers_are_not_enough_and_six_are() -> None:
    assert not mcnemar(0, 5, 50).real
    assert mcnemar(0, 6, 50).real


def test_the_t_test_is_scipys() -> None:
    first, second = [0.81, 0.79, 0.83, 0.80, 0.78], [0.84, 0.80, 0.83, 0.86, 0.81]
    theirs = stats.ttest_rel(second, first)
    interval = theirs.confidence_interval(0.95)
    found = paired_t(first, second)
    assert (found.value, found.p) == pytest.approx((0.026, theirs.pvalue))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize(("shift", "p"), [(0.0, 1.0), (0.25, 0.0)])
def test_equal_differences_have_no_spread(shift: float, p: float) -> None:
    assert paired_t([0.5, 0.25], [0.5 + shift, 0.25 + shift]).p == p


def test_the_interval_of_a_mean_is_scipys_bootstrap() -> None:
    values = [0.71, 0.74, 0.69, 0.78, 0.73, 0.70]
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert mean_interval(values) == pytest.approx((theirs.low, theirs.high), abs=1.5e-3)
    assert mean_interval([0.5, 0.9, 0.6]) == (0.5, 0.9)


def shares(generator: np.random.Generator, size: int) -> np.ndarray:
    return generator.random((size, 1))


def test_the_bootstrap_of_a_mean_is_scipys() -> None:
    generator = np.random.default_rng(3)
    first, second = shares(generator, 120), shares(generator, 120) + 0.05
    found = bootstrap("f1", [(first, second)], same_examples=True)
    differences = (second - first)[:, 0]
    theirs = stats.bootstrap(
        (differences,), np.mean, n_resamples=20_000, method="percentile", rng=2
    ).confidence_interval
    assert found.value == pytest.approx(differences.mean())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=4e-3)
    assert found.p == pytest.approx(stats.ttest_rel(second[:, 0], first[:, 0]).pvalue, abs=0.05)


def test_equal_runs_differ_by_nothing() -> None:
    same = shares(np.random.default_rng(4), 50)
    found = bootstrap("f1", [(same, same)], same_examples=True)
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_the_least_p_is_that_of_the_resamples() -> None:
    low = shares(np.random.default_rng(5), 50)
    assert bootstrap("f1", [(low, low + 1)], same_examples=True).p == pytest.approx(2 / (RESAMPLES + 1))


def test_a_correlation_of_a_constant_has_no_interval() -> None:
    generator = np.random.default_rng(6)
    truth = generator.random(30)
    guesses = np.stack([truth, truth + 0.1 * generator.random(30)], axis=1)
    constant = np.stack([truth, np.zeros(30)], axis=1)
    found = bootstrap("pearson", [(constant, guesses)], same_examples=True)
    assert math.isnan(found.low)
    assert not found.real


def test_other_examples_of_a_pair_are_drawn_for_themselves() -> None:
    """Folds are independent: the mean of four has half the spread, and of four times the same it has the whole."""
    generator = np.random.default_rng(7)
    pairs = [(shares(generator, 100), shares(generator, 100)) for _ in range(4)]
    apart = bootstrap("f1", pairs, same_examples=False)
    single = bootstrap("f1", pairs[:1], same_examples=True)
    together = bootstrap("f1", pairs[:1] * 4, same_examples=True)
    assert (together.low, together.high) == pytest.approx((single.low, single.high))
    assert apart.high - apart.low == pytest.approx((single.high - single.low) / 2, rel=0.15)


def test_without_a_difference_one_in_twenty_is_called_real() -> None:
    """80 comparisons without a difference: binomially, more than 11 false alarms have a probability of 1 in 1,000."""
    generator = np.random.default_rng(8)
    pairs = [(shares(generator, 60), shares(generator, 60)) for _ in range(80)]
    assert sum(bootstrap("f1", [pair], same_examples=True).real for pair in pairs) <= 11


@pytest.mark.parametrize("name", ["entity_f1", "spearman"])
def test_a_score_that_is_no_mean_is_added_up_in_each_resample(name: str) -> None:
    """A model that knows nothing against one that knows much."""
    generator = np.random.default_rng(9)
    truth, noise = generator.random((2, 80))
    if name == "spearman":
        runs = [np.stack([truth, guess], axis=1) for guess in (noise, truth + 0.3 * noise)]
    else:
        runs = [np.stack([right, 2.0 - right, 2.0 - right], axis=1) for right in (0 * noise, np.ceil(2 * noise))]
    found = bootstrap(name, [(runs[0], runs[1])], same_examples=True)
    assert 0.3 < found.low < found.value < found.high
    assert found.real
    assert not bootstrap(name, [(runs[1], runs[1])], same_examples=True).real


@pytest.mark.parametrize(("count", "share"), [(2, 0.5), (3, 0.75), (5, 0.84), (8, 0.9)])
def test_an_interval_of_few_seeds_holds_the_mean_as_often_as_the_page_says(count: int, share: float) -> None:
    """Of normal scores; 400 intervals tell a share with a standard error of 0.025 at most."""
    generator = np.random.default_rng(10)
    ends = [mean_interval(generator.standard_normal(count).tolist()) for _ in range(400)]
    assert np.mean([low <= 0.0 <= high for low, high in ends]) == pytest.approx(share, abs=0.06)


def test_corrected_p_values_are_those_of_holm() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02, 0.02, 0.02]) == pytest.approx([0.06] * 3)
    assert holm([]) == []


def test_differences_that_are_the_same_but_for_rounding_have_no_spread() -> None:
    first = [0.225, 0.25, 0.275, 0.325]
    same = paired_t(first, [0.125, 0.15, 0.175, 0.225])
    assert (same.value, same.low, same.p) == (pytest.approx(-0.1), same.high, 0.0)
    none = paired_t([value + 0.1 for value in first], [value + 0.1 + 1e-17 for value in first])
    assert none.p == 1.0
