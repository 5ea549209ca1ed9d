"""Sizes within a budget, against all combinations; and what a target says."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from engine.compress.prune.search import choice, search
from engine.compress.prune.target import Target, parse_target
from engine.errors import UserError


def test_the_search_finds_nearly_what_all_combinations_give() -> None:
    drawn = np.random.default_rng(4)
    for _ in range(20):
        sizes = [1, 2, 3, 4, 5]
        tables = [np.cumsum(drawn.uniform(0.5, 1.5, 5)) for _ in range(4)]
        choices = [choice([drawn.exponential(1.0, 5)], table, sizes) for table in tables]
        budget = 0.6 * sum(table[-1] for table in tables)
        found = search(choices, budget)
        assert found is not None

        def at(kept: tuple[int, ...], choices: list = choices) -> tuple[float, float]:
            pairs = [(each.losses[size - 1], each.costs[size - 1]) for each, size in zip(choices, kept, strict=True)]
            return tuple(map(sum, zip(*pairs, strict=True)))  # type: ignore[return-value]

        loss, cost = at(tuple(found))
        best = min(at(kept)[0] for kept in product(sizes, repeat=4) if at(kept)[1] <= budget)
        assert cost <= budget
        assert best <= loss <= best + 0.25 * sum(each.losses[0] for each in choices) / 4


def test_with_equal_costs_the_most_important_units_stay() -> None:
    """Then it is algorithm 1 of Kwon et al. 2022: a threshold over all sub-layers."""
    drawn = np.random.default_rng(5)
    importances = [drawn.exponential(1.0, 12) for _ in range(6)]
    costs = np.arange(13.0)
    found = search([choice([each], costs, range(13)) for each in importances], 30.0)
    threshold = np.sort(np.concatenate(importances))[-30]
    assert found == [int((each >= threshold).sum()) for each in importances]


def test_what_fits_stays_whole_and_what_cannot_fit_is_told() -> None:
    one = choice([np.ones(4)], np.arange(1.0, 5.0), range(1, 5))
    assert search([one, one], 8.0) == [4, 4]
    assert search([one, one], 1.5) is None


def test_targets() -> None:
    assert parse_target("speed 2x") == Target("speed", 2.0)
    assert parse_target("Flops 0.5") == Target("flops", 0.5)
    assert parse_target("size 30MB") == Target("size", 30e6)
    assert parse_target("heads 0.5, neurons 0.4") == Target("share", shares=(("heads", 0.5), ("neurons", 0.4)))


@pytest.mark.parametrize("text", ["speed 2.5x", "flops 0.5", "size 0.06MB", "heads 0.5, neurons 0.4", "neurons 0.4"])
def test_a_target_is_told_as_it_is_given(text: str) -> None:
    assert str(parse_target(text)) == text


@pytest.mark.parametrize(
    "wrong",
    ["", "fast", "speed", "speed 0.5x", "flops 2", "flops 0", "size 30", "size 0MB", "heads 1.5", "heads 1, heads 1",
     "speed 2x, flops 0.5", "neurons 0.5x", "speed 1..5x"],
)  # fmt: skip
def test_wrong_targets_are_refused(wrong: str) -> None:
    with pytest.raises(UserError, match=r"^target: .* is not allowed; give speed 2x"):
        parse_target(wrong)
