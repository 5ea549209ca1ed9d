"""What is read off laws and points: the best size of a budget, which law to believe, profiles, and repeated tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.errors import UserError
from engine.scaling.choice import predict_largest, rank
from engine.scaling.fit import fit
from engine.scaling.isoflop import isoflop
from engine.scaling.profile import profile
from engine.scaling.repeated import effective_tokens, fit_repeated
from engine.scaling.terms import LAWS
from tests.scaling.known import at, points


def test_parabolas_find_the_exponent_of_the_best_size() -> None:
    budgets = np.repeat(np.geomspace(1e19, 1e22, 5), 7)
    centre = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62) * (budgets / 6) ** (0.28 / 0.62)
    sizes = centre * np.tile(np.geomspace(1 / 3, 3, 7), 5)
    found = isoflop(at(sizes, budgets / 6 / sizes, noise=0.001), resamples=200)
    assert len(found.budgets) == 5
    assert all(each.inside for each in found.budgets)
    assert found.exponent.value == pytest.approx(0.28 / 0.62, abs=0.03)
    assert found.exponent.low < found.exponent.value < found.exponent.high
    best = found.budgets[2].best
    assert best.value == pytest.approx(centre[14], rel=0.15)
    assert best.low < best.value < best.high


def test_a_best_size_beyond_the_grid_is_told() -> None:
    sizes = np.geomspace(1e7, 1e8, 5)
    found = isoflop(at(sizes, 1e22 / 6 / sizes, noise=0.0), resamples=20)
    assert not found.budgets[0].inside
    assert np.isnan(found.exponent.value)


def test_parabolas_need_sizes_at_the_same_compute() -> None:
    with pytest.raises(UserError, match="no compute budget has 4 sizes"):
        isoflop(points(budgets=1, sizes=5))


def test_the_law_that_predicts_larger_runs_is_first() -> None:
    ranked = rank(points(noise=0.002), [LAWS["no_floor"], LAWS["compute_no_floor"], LAWS["size_and_data"]])
    assert ranked[0].law.name == "size_and_data"
    assert ranked[0].error < 0.01 < ranked[-1].error
    with pytest.raises(UserError, match="too few"):
        rank(points().take(np.arange(2)), list(LAWS.values()))


def test_the_largest_size_is_predicted_from_the_others() -> None:
    held = predict_largest(points(noise=0.003), LAWS["size_and_data"], resamples=100)
    assert len(held) == 6
    assert max(abs(each.error) for each in held) < 0.02
    assert sum(each.covered for each in held) >= 4


def test_a_profile_agrees_with_the_bootstrap() -> None:
    found = fit(points(sizes=10, budgets=10), LAWS["size_and_data"], resamples=300)
    for name in ("alpha", "beta"):
        read = profile(found, name)
        drawn = found.parameters()[name]
        assert read.rises.min() < 0.05
        width = (read.interval.high - read.interval.low) / (drawn.high - drawn.low)
        assert 0.5 < width < 2.0
    with pytest.raises(UserError, match="parameter: 'gamma' is not of size_and_data"):
        profile(found, "gamma")


def test_an_open_profile_has_no_end() -> None:
    found = fit(points(sizes=6, law="no_floor"), LAWS["size_and_data"], resamples=50)
    assert profile(found, "log_E").interval.low == -np.inf


def test_the_worth_of_repeated_tokens_is_found() -> None:
    given = points(noise=0.0)
    unique = given.tokens / np.tile([1.0, 2.0, 4.0, 8.0, 16.0, 40.0], 8)
    worn = replace(given, tokens=effective_tokens(given.tokens, unique, 15.4))
    losses = LAWS["size_and_data"].predict(np.array([0.52, 6.0, 6.0, 0.34, 0.28]), worn)
    found = fit_repeated(replace(given, losses=losses), unique, LAWS["size_and_data"], starts=16)
    assert found.worth == pytest.approx(15.4, rel=0.01)
    assert found.value < found.without / 100
    for bad, told in ((unique * 0, "not positive"), (given.tokens, "no run saw its data more than twice")):
        with pytest.raises(UserError, match=f"unique: .*{told}"):
            fit_repeated(given, bad, LAWS["size_and_data"])


def test_new_tokens_are_worth_what_they_are() -> None:
    tokens = np.array([1.0, 2.0, 4.0, 1e9])
    worth = effective_tokens(tokens, np.full(4, 2.0), 15.0)
    assert worth[:2].tolist() == [1.0, 2.0]
    assert 3.8 < worth[2] < 4.0
    assert worth[3] == pytest.approx(2 + 2 * 15)
