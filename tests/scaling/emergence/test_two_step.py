"""Predictions in two steps: of a known truth, of public ladders' held-out models, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from engine.errors import UserError
from engine.scaling.emergence.abilities import accuracy
from engine.scaling.emergence.two_step import LINKS, two_step
from engine.scaling.optimum import Place
from engine.scaling.points import read_points
from engine.scaling.terms import LAWS
from tests.conftest import ROOT
from tests.scaling.test_laws import points

OLMO = ROOT.parent / "shared" / "data" / "olmo_ladder" / "points.csv"
EQUAL = LAWS["equal_exponents"]


@pytest.mark.parametrize("link", LINKS)
def test_a_known_score_of_a_larger_model_is_held(link: str) -> None:
    given = points(sizes=5, budgets=4, law="equal_exponents")
    large = Place(np.array([7e10]), np.array([1.4e12]))
    truth = points(sizes=5, budgets=4, noise=0.0, law="equal_exponents")

    def score(losses: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        return 0.25 + 0.6 / (1 + np.exp(6 * (losses - 2.1))) if link == "sigmoid" else 0.9 - 0.4 * np.exp(losses - 2.9)

    scores = score(given.losses) + 0.002 * np.random.default_rng(0).standard_normal(len(given))
    fitted = two_step(given, accuracy("it"), EQUAL, scores=scores, link=link, resamples=100)
    (predicted,) = fitted.predict(large)
    law = EQUAL.predict(
        two_step(truth, accuracy("it"), EQUAL, scores=score(truth.losses), link=link, resamples=2).law.theta, large
    )
    assert predicted.holds(float(score(law)[0]))
    assert predicted.high - predicted.low < 0.15


def test_what_cannot_be_predicted_is_refused_in_a_line() -> None:
    given = points(sizes=4, budgets=2)
    scores = np.linspace(0.2, 0.5, len(given))
    with pytest.raises(UserError, match="link: 'spline' is none; give sigmoid or exponential"):
        two_step(given, accuracy("it"), EQUAL, scores=scores, link="spline")
    with pytest.raises(UserError, match="which is not from 0 to 1"):
        two_step(given, accuracy("it"), EQUAL, scores=scores + 1)
    with pytest.raises(UserError, match="'it' is not in the points"):
        two_step(given, accuracy("it"), EQUAL)
    with pytest.raises(UserError, match="few distinct losses can't hold a curve"):
        two_step(replace(given, losses=np.full(len(given), 2.0)), accuracy("it"), EQUAL, scores=scores)


@pytest.mark.skipif(not OLMO.exists(), reason="needs shared/data/olmo_ladder")
def test_the_held_out_7b_and_13b_of_the_olmo_ladder_are_near_their_predictions() -> None:
    given = read_points(OLMO, {"parameters": "params", "loss": "bpb_hellaswag"})
    large = np.array([model in ("7B", "13B") for model in given.columns["model"]])
    fitted = two_step(given.take(~large), accuracy("acc_hellaswag"), LAWS["size_and_data"], resamples=50)
    reached = given.take(large).numbers("acc_hellaswag")
    for predicted, true in zip(fitted.predict(given.take(large)), reached, strict=True):
        assert predicted.value == pytest.approx(true, abs=0.05)
