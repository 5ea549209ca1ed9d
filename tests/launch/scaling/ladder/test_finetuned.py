"""Scores of fine-tuning as abilities of a ladder's points."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import UserError
from launch.scaling.ladder.collect import Measured
from launch.scaling.ladder.finetuned import scores_of

NAMES = ("bert/h16/seed-1/1e4", "bert/h32/seed-1/1e4")


@pytest.fixture
def measured(tmp_path: Path) -> list[Measured]:
    """Two points, and in `rte` a run of fine-tuning for each."""
    for name in NAMES:
        write_run(tmp_path / "rte" / name, tmp_path / name / "export")
    return [Measured(name, tmp_path / name, 8, None, {}) for name in NAMES]


def write_run(run: Path, start: Path, examples: int = 40) -> None:
    (run / "report").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(f"model: {{init_from: {start}}}\n")
    told = {"examples": examples, "accuracy": 0.75, "scores": {"loss": 0.5}, "majority_baseline": {"accuracy": 0.6}}
    (run / "report" / "report.json").write_text(json.dumps(told))


def test_each_point_has_the_scores_of_its_own_run(measured: list[Measured], tmp_path: Path) -> None:
    scores = scores_of([f"rte={tmp_path / 'rte'}", f"again={tmp_path / 'rte'}"], measured)
    assert len(scores) == 2
    assert scores[1].columns["acc_again"] == 0.75
    assert scores[1].columns["logp_rte"] == -0.5
    assert [each.chance for each in scores[0].abilities] == [0.6, 0.6]
    assert scores_of([], measured)[0].abilities == ()


@pytest.mark.parametrize("given", ["rte", "rte=", "=rte"])
def test_other_words_are_refused(given: str, measured: list[Measured]) -> None:
    with pytest.raises(UserError, match="is not allowed; give"):
        scores_of([given], measured)


def test_runs_that_tell_nothing_of_a_point_are_refused(measured: list[Measured], tmp_path: Path) -> None:
    given = [f"rte={tmp_path / 'rte'}"]
    write_run(tmp_path / "rte" / NAMES[1], tmp_path / NAMES[1], examples=30)
    with pytest.raises(UserError, match=r"scored on 30 examples, of .*h16.* on 40"):
        scores_of(given, measured)
    write_run(tmp_path / "rte" / NAMES[1], tmp_path / NAMES[0] / "export")
    with pytest.raises(UserError, match=r"began with .*h16.*; begin it with .*h32"):
        scores_of(given, measured)
    (tmp_path / "rte" / NAMES[1] / "report" / "report.json").unlink()
    with pytest.raises(UserError, match=r"h32.*cannot be read.*give the folder of a finished run"):
        scores_of(given, measured)
    with pytest.raises(UserError, match="two abilities have that name"):
        scores_of([given[0], given[0]], [measured[0]])
