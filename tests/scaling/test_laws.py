"""Laws fitted to points of a known law: derivatives, both optimisers, intervals, and what can't be fitted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine.errors import UserError
from engine.scaling.fit import Fit, fit, residual_trend, run_weights
from engine.scaling.optimise import Objective, minimise
from engine.scaling.optimum import Place, optimum
from engine.scaling.points import read_points
from engine.scaling.projection import project
from engine.scaling.terms import LAWS, Law
from tests.conftest import ROOT
from tests.scaling.known import TRUTH, points, truth

LADDER = ROOT.parent / "shared" / "data" / "overtraining_ladder" / "points.csv"


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_derivatives_are_those_of_differences(law: Law) -> None:
    given = points(law=law.name)
    design, theta, delta = law.design(given), truth(law.name) * 1.003, 0.02
    random = np.random.default_rng(0)
    offset = 0.01 * random.standard_normal((1, *design.shape[:2]))
    objective = Objective(design, np.log(given.losses), random.integers(0, 4, (1, len(given))).astype(float), offset)
    which, steps = np.arange(1), 1e-6 * np.eye(len(theta))
    value, gradient, curvature = objective.expand(theta[None], which, delta, exact=True)
    assert value > 0
    ends = [
        [objective.expand((theta + sign * step)[None], which, delta, exact=True) for sign in (1, -1)] for step in steps
    ]
    assert gradient[0] == pytest.approx([(up[0][0] - down[0][0]) / 2e-6 for up, down in ends], rel=1e-4, abs=1e-7)
    columns = [(up[1][0] - down[1][0]) / 2e-6 for up, down in ends]
    assert curvature[0] == pytest.approx(np.stack(columns), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_two_optimisers_agree_and_find_what_was_planted(law: Law) -> None:
    given = points(law=law.name)
    found = minimise(law.design(given), np.log(given.losses), law.grid(64))
    theta = found.theta[found.best]
    value, other = project(law, given, given.losses)
    assert value == pytest.approx(found.value[found.best], rel=1e-6)
    assert other == pytest.approx(theta, rel=1e-6)
    assert theta == pytest.approx(truth(law.name), rel=0.2)
    exact = points(noise=0.0, law=law.name)
    found = minimise(law.design(exact), np.log(exact.losses), law.grid(64))
    assert found.theta[found.best] == pytest.approx(truth(law.name), rel=1e-5)


@pytest.fixture(scope="module")
def fitted() -> Fit:
    return fit(points(), LAWS["size_and_data"], resamples=200, level=0.98)


def test_intervals_hold_the_truth(fitted: Fit) -> None:
    held = [
        interval.holds(value)
        for interval, value in zip(fitted.parameters().values(), fitted.law.named(TRUTH).values(), strict=True)
    ]
    assert sum(held) >= 4
    assert not fitted.warnings()
    place = Place(np.array([7e10]), np.array([1.4e12]))
    (interval,) = fitted.predict(place)
    assert interval.holds(float(LAWS["size_and_data"].predict(TRUTH, place)[0]))
    assert interval.high / interval.low < 1.05


def test_the_optimum_is_hoffmanns(fitted: Fit) -> None:
    best = optimum(fitted, 5.76e23)
    scale = (0.34 * 406.4 / (0.28 * 410.7)) ** (1 / 0.62)
    assert best.parameters.holds(scale * (5.76e23 / 6) ** (0.28 / 0.62))
    assert best.parameters.value * best.tokens.value * 6 == pytest.approx(5.76e23)
    assert any("outside" in warning for warning in best.warnings)
    assert not optimum(fitted, 1e20).warnings


@pytest.mark.parametrize("flops", [0.0, -1.0, float("nan"), float("inf")])
def test_an_optimum_of_no_budget_is_refused(fitted: Fit, flops: float) -> None:
    with pytest.raises(UserError, match=r"flops: .*give a positive number"):
        optimum(fitted, flops)


def test_a_law_of_compute_tells_no_size() -> None:
    of_compute = fit(points(law="compute"), LAWS["compute"], resamples=10)
    with pytest.raises(UserError, match="law: 'compute' doesn't tell size from data"):
        optimum(of_compute, 1e20)


def test_a_wrong_law_is_refused_by_its_residuals() -> None:
    wrong = fit(points(), LAWS["compute_no_floor"], resamples=20)
    assert any("refused" in warning for warning in wrong.warnings())
    random = np.random.default_rng(1)
    given = points()
    drawn = [residual_trend(random.standard_normal(len(given)), given) for _ in range(200)]
    assert 0.02 < np.mean(np.array(drawn) < 0.05) < 0.1


def test_a_floor_that_is_none_is_not_identified() -> None:
    given = points(sizes=6, law="no_floor")
    found = fit(given, LAWS["size_and_data"], resamples=100)
    assert any("E is not identified" in warning for warning in found.warnings())


def test_runs_are_drawn_whole() -> None:
    given = points()
    shared = replace(given, runs=tuple(f"trunk {index // 6}" for index in range(len(given))))
    weights = run_weights(shared, 50, np.random.default_rng(0)).reshape(50, 8, 6)
    assert (weights == weights[:, :, :1]).all()
    assert (weights[:, :, 0].sum(axis=1) == 8).all()


def test_two_sizes_are_too_few() -> None:
    given = points(sizes=2)
    with pytest.raises(UserError, match=r"points: 2 distinct value\(s\) of parameters"):
        fit(given, LAWS["size_and_data"])
    with pytest.raises(UserError, match="points: 5 are too few"):
        fit(points().take(np.arange(5)), LAWS["size_and_data"])


HEADER = "name,parameters,tokens,loss\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has no rows below its header"),
        (HEADER, "has no rows below its header"),
        (HEADER + "a,1e6,1e9\n", "row 2 of .* has not as many fields as the header"),
        (HEADER + "a,1e6,1e9,nan\n", "loss in row 2 of .* is 'nan'; give a positive number"),
        (HEADER + "a,1e6,1e9,\n", "loss in row 2 of .* is ''; give a positive number"),
        (HEADER + "a,-1,1e9,3\n", "parameters in row 2 of .* is '-1'"),
        (HEADER + "a,many,1e9,3\n", "'parameters' of row 2 of .* is 'many', which is not a number"),
        (HEADER + "a,70,1e9,3\n", "parameters of .* looks like millions"),
        (HEADER + "a,1e6,20,3\n", "tokens of .* looks like millions"),
        (HEADER + "a,1e6,1e9,35\n", "not nats per token"),
        (HEADER + "a,1e6,1e9,3\na,1e6,1e9,3\n", "has a twice"),
        ("parameters,tokens,loss,loss\n1e6,1e9,3,4\n", "has 2 columns 'loss'; rename all but one"),
        ("parameters,tokens,loss,flops\n1e6,1e9,3,7e-5\n", "flops of .* a parameter and token, which isn't FLOPs"),
        ("parameters,tokens,loss,loss_error\n1e6,1e9,3,n/a\n", "'loss_error' of row 2 is 'n/a', which is not a number"),
        ("parameters,tokens,loss,loss_error\n1e6,1e9,3,-1\n", "loss_error of .* has -1; give standard errors"),
        ("name,N,tokens,loss\na,1e6,1e9,3\n", "no column 'parameters' for parameters; it has name, N, tokens, loss"),
    ],
)
def test_bad_files_of_points_are_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "points.csv").write_text(text)
    with pytest.raises(UserError, match=told):
        read_points(tmp_path / "points.csv")


def test_columns_and_rows_are_chosen(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text("set,N,D,L,acc\nx,1e6,1e9,3,0.5\ny,2e6,1e9,2.5,\n")
    names = {"parameters": "N", "tokens": "D", "loss": "L"}
    found = read_points(path, names, {"set": "y"})
    assert found.parameters.tolist() == [2e6]
    assert found.flops.tolist() == [1.2e16]
    assert np.isnan(found.numbers("acc")).all()
    with pytest.raises(UserError, match=r"where: no row of .* has set='z'; there are x, y"):
        read_points(path, names, {"set": "z"})
    with pytest.raises(UserError, match=r"where: .* has no column 'sets'"):
        read_points(path, names, {"sets": "y"})
    with pytest.raises(UserError, match="columns: 'size' is no field"):
        read_points(path, {"size": "N"})
    with pytest.raises(UserError, match="column: 'set' of row 3 is 'y'"):
        found.numbers("set")
    with pytest.raises(UserError, match="column: 'f1' is not in the points"):
        found.numbers("f1")
    with pytest.raises(UserError, match=r"points: .* cannot be read as CSV"):
        read_points(tmp_path / "none.csv")


@pytest.mark.skipif(not LADDER.is_file(), reason="no shared data")
@pytest.mark.parametrize("train_set", ["c4_original", "rpj", "rw_original"])
def test_large_models_of_a_public_ladder_are_predicted(train_set: str) -> None:
    names = {"parameters": "params", "loss": "loss_c4_val"}
    given = read_points(LADDER, names, {"train_set": train_set})
    small = given.parameters < 1e9
    found = fit(given.take(small), LAWS["equal_exponents"], resamples=100, starts=32)
    large = given.take(~small)
    for interval, loss in zip(found.predict(large), large.losses, strict=True):
        assert interval.holds(loss)
        assert interval.value == pytest.approx(loss, rel=0.06)


def test_a_loss_has_its_own_error_and_a_point_without_a_run_is_of_no_others(tmp_path: Path) -> None:
    path = tmp_path / "points.csv"
    path.write_text(
        "name,run,parameters,tokens,loss,loss_error,loss_wiki,loss_error_wiki,nll\n"
        "a,,1e6,1e9,3,0.1,4,0.2,5\nb,,1e7,1e9,2,0.1,3,,4\n"
    )
    points = read_points(path)
    assert points.runs == ("a", "b")
    assert points.errors.tolist() == [0.1, 0.1]
    np.testing.assert_array_equal(read_points(path, {"loss": "loss_wiki"}).errors, [0.2, np.nan])
    assert np.isnan(read_points(path, {"loss": "nll"}).errors).all()
    assert read_points(path, {"loss": "nll", "loss_error": "loss_error"}).take(np.array([1])).errors.tolist() == [0.1]
