"""Verdicts where the truth is planted, along every axis, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from engine.errors import UserError
from engine.scaling.emergence.abilities import Ability, Metric, accuracy
from engine.scaling.emergence.verdict import ALL_SMOOTH, JUMP, METRIC_MADE, NONE, UNDER_BOTH, Verdict, verdicts
from engine.scaling.points import Points
from engine.scaling.terms import Array
from tests.scaling.emergence.studies import ITEMS, answered, ladder, noisy, study

ABILITY = Ability("agreement", accuracy("exact", ITEMS), Metric("p"))
PLACE = ladder()


def judged(points: Points, axis: str = "compute") -> Verdict:
    (verdict,) = verdicts(points, [ABILITY], axis=axis, resamples=49)
    return verdict


def of(exact: Array, continuous: Array) -> Points:
    return study(PLACE, {"exact": answered(exact), "p": noisy(continuous)})


def test_exact_match_of_an_even_probability_is_metric_made() -> None:
    even = 0.2 + 0.79 * PLACE
    verdict = judged(of(even**20, even))
    assert verdict.kind == METRIC_MADE
    assert "smooth under p: metric-made" in str(verdict)
    assert "16 points of 8 sizes" in str(verdict)


@pytest.mark.parametrize("axis", ["compute", "loss", "tokens"])
def test_a_jump_under_both_metrics_is_found_where_it_is(axis: str) -> None:
    jump = np.where(PLACE > 0.6, 0.8, 0.3)
    verdict = judged(of(jump, jump), axis)
    assert verdict.kind == UNDER_BOTH
    first, last = 4 / 7, 5 / 7
    ends = {
        "compute": (10 ** (18 + 4 * first), 10 ** (18 + 4 * last)),
        "loss": (4 - 2 * last, 4 - 2 * first),
        "tokens": (10 ** (11 + 2 * first) / 6, 10 ** (11 + 2 * last) / 6),
    }[axis]
    for finding in verdict.findings:
        assert finding.shape == JUMP
        assert ends[0] * 0.999 <= finding.threshold.low < finding.threshold.high <= ends[1] * 1.001


def test_growth_under_both_is_smooth() -> None:
    verdict = judged(of(0.2 + 0.5 * PLACE, 3.0 - 1.5 * np.exp(-2 * PLACE)))
    assert verdict.kind == ALL_SMOOTH
    assert all(finding.change.power > 0.8 for finding in verdict.findings)


def test_noise_gives_no_verdict() -> None:
    verdict = judged(of(np.full(16, 0.25), np.full(16, 0.25)))
    assert verdict.kind == NONE
    assert str(verdict).count("no growth shown") == 2


def test_a_small_ladder_tells_its_power_instead_of_a_verdict() -> None:
    place = ladder(5, 1)
    (verdict,) = verdicts(
        study(place, {"exact": noisy(0.3 + 0.2 * place, 0.02)}), [Ability("it", accuracy("exact"))], resamples=49
    )
    assert verdict.kind == NONE
    assert verdict.findings[0].change.power < 0.8
    assert "power 0." in str(verdict)


def test_checkpoints_of_one_run_are_judged_along_tokens() -> None:
    place = ladder(20, 1)
    scores = noisy(np.where(place > 0.5, 0.8, 0.5), 0.02)
    points = study(place, {"exact": scores}, ["one"] * 20)
    (verdict,) = verdicts(points, [Ability("syntax", accuracy("exact"))], axis="tokens", resamples=49)
    assert verdict.findings[0].shape == JUMP
    assert verdict.findings[0].threshold.holds(10 ** (11 + 2 * 0.5) / 6)


def test_seeds_beside_the_threshold_have_two_modes() -> None:
    place = np.repeat(np.linspace(0, 1, 5), 10)
    lucky = np.arange(50) % 2 == 0
    share = np.where((place > 0.6) | ((place == 0.5) & lucky), 0.8, 0.2)
    points = study(place, {"exact": noisy(share, 0.02)})
    (verdict,) = verdicts(points, [Ability("it", accuracy("exact"))], resamples=39)
    seeds = verdict.findings[0].seeds
    assert seeds is not None
    assert seeds[1] < 0.01


def test_chance_is_the_level_before_the_growth() -> None:
    place = ladder()
    points = study(place, {"exact": answered(np.where(place > 0.6, 0.8, 0.3))})
    metric = accuracy("exact", ITEMS, chance=0.25)
    (verdict,) = verdicts(points, [Ability("it", metric)], resamples=39)
    assert verdict.findings[0].change.change.before == pytest.approx([0.25])


def test_what_cannot_be_judged_is_refused_in_a_line() -> None:
    good = study(PLACE, {"exact": answered(0.2 + 0.5 * PLACE), "p": noisy(PLACE), "gap": [np.nan, *PLACE[1:]]})
    few = study(ladder(3, 5), {"exact": answered(0.2 + 0.5 * ladder(3, 5))})
    constant = study(PLACE, {"exact": np.full(16, 0.25)})
    for points, ability, words in (
        (few, Ability("it", accuracy("exact")), "3 distinct value.* of parameters .*give 4 at least"),
        (constant, Ability("it", accuracy("exact")), "exact is 0.25 in all points"),
        (good, Ability("it", accuracy("p")), "p of run .* is .*, which is not from 0 to 1"),
        (good, Ability("it", accuracy("gap")), "gap of run 0 is not a number; leave that point out"),
        (good, Ability("it", accuracy("brier")), "'brier' is not in the points; they have exact, p"),
        (good, Ability("it", Metric("exact", items=100)), "must be a share from 0 to 1 of 1 item at least"),
        (good, Ability("it", accuracy("exact", 0)), "items=0 must be a share"),
        (good, Ability("it", accuracy("exact", chance=1.5)), "chance 1.5 of exact is outside of its limits"),
    ):
        with pytest.raises(UserError, match=words):
            verdicts(points, [ability])


def test_settings_out_of_range_are_refused_in_a_line() -> None:
    points = study(PLACE, {"exact": answered(0.2 + 0.5 * PLACE)})
    ability = Ability("it", accuracy("exact"))
    with pytest.raises(UserError, match="axis: 'size' is none; give compute, loss, tokens"):
        verdicts(points, [ability], axis="size")
    with pytest.raises(UserError, match="abilities: it, it; give one at least, each once"):
        verdicts(points, [ability, ability])
    with pytest.raises(UserError, match="abilities: none; give one"):
        verdicts(points, [])
    with pytest.raises(UserError, match=r"level: 1.5 is not allowed"):
        verdicts(points, [ability], level=1.5)
    with pytest.raises(UserError, match=r"span: 0 is not allowed"):
        verdicts(points, [ability], span=0.0)
    with pytest.raises(UserError, match=r"resamples: 10 can't reach level 0.05 .*give 20 at least"):
        verdicts(points, [ability], resamples=10)
