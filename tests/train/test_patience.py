"""Early stopping: which evaluations end a run, over kills and resumes, and what such a run leaves behind."""

from __future__ import annotations

import json
import math
from multiprocessing.pool import Pool
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from engine.config import TrainConfig
from engine.tasks.task import Best, Evaluation, Task
from engine.train import best
from tests.train.runs import losses, run
from tests.train.test_best import STEPS, options, tune

__all__ = ["options"]  # a fixture: the first evaluation is the best, and every later one is worse

PATIENT = "--train.patience=2"
END = 9


def config(patience: int | None, interval: int = 10) -> TrainConfig:
    return TrainConfig(patience=patience, eval_interval=interval)


@pytest.mark.parametrize(
    ("found", "step", "patience", "over"),
    [
        (Best(0.5, 10), 20, 2, False),
        (Best(0.5, 10), 30, 2, True),
        (Best(0.5, 30), 30, 1, False),
        (Best(0.5, 10), 20, 1, True),
        (Best(0.5, 10), 500, None, False),
        (Best(0.5, None), 500, 1, False),
        (None, 500, 1, False),
    ],
)
def test_patience_counts_evaluations_since_the_best(
    found: Best | None, step: int, patience: int | None, over: bool
) -> None:
    assert best.patience_is_over(found, step, config(patience)) is over


@pytest.mark.parametrize(
    ("old", "new", "better"), [(math.nan, 0.1, True), (math.nan, math.nan, False), (0.1, math.nan, False)]
)
def test_a_score_is_better_than_none(old: float, new: float, better: bool) -> None:
    task = cast(Task, SimpleNamespace(best_metric="pearson", higher_is_better=True))
    assert best.is_better(Evaluation({"pearson": new}), Best(old, 3), task) is better


def ended(output: Path, printed: str) -> dict[str, Any]:
    """The report of a run that ended early at step 9 of 12."""
    told = [line for line in printed.splitlines() if "(train.patience)" in line]
    assert len(told) == 1
    assert "at step 3, in 2 evaluation(s) (train.patience): the run ends at step 9 of 12" in told[0]
    assert (output / "checkpoints" / "latest").read_text().strip() == f"step-{END:06d}"
    report: dict[str, Any] = json.loads((output / "report" / "report.json").read_text())
    return report


@pytest.fixture(scope="module")
def patient(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that ended early."""
    output = tmp_path_factory.mktemp("patient") / "run"
    once = [*options, PATIENT, "--train.save_interval=0", "--optim.schedule=linear"]
    report = ended(output, run(output, *once, ranks=2))
    curve = losses(output, "eval/loss")
    assert [step for step, _ in curve] == [3, 6, 9]
    assert report["scores"]["loss"] == pytest.approx(curve[0][1], rel=1e-5)
    return output


def test_the_learning_rate_is_that_of_the_whole_run(patient: Path) -> None:
    rates = losses(patient, "train/learning_rate")
    assert [step for step, _ in rates] == list(range(1, END + 1))
    assert [rate for _, rate in rates] == pytest.approx(
        [1e-3 * (1 - (step - 1) / STEPS) for step, _ in rates], rel=1e-5
    )


def test_a_resume_says_that_it_is_over(patient: Path, options: list[str]) -> None:
    before = (patient / "report" / "report.json").read_bytes()
    printed = run(patient, *options, PATIENT, "--optim.schedule=linear")
    assert f"{patient} is finished at step 9, early by train.patience; its model is in export/" in printed
    assert (patient / "report" / "report.json").read_bytes() == before


def test_a_lost_report_is_made_again(one_rank: Pool, options: list[str], tmp_path: Path) -> None:
    """So that a run that was killed between its early end and its report ends as it would have."""
    report, curve = tune(one_rank, tmp_path, options, PATIENT)
    (tmp_path / "report" / "report.txt").unlink()
    again, curve_again = tune(one_rank, tmp_path, options, PATIENT)
    assert again == report
    assert [step for step, _ in curve_again] == [step for step, _ in curve] == [3, 6, 9]


def test_a_resume_counts_the_evaluations_before_it(one_rank: Pool, options: list[str], tmp_path: Path) -> None:
    """Stopped between the first evaluation that is worse and the second; the same end as without."""
    from tests.train.watch.policy_worker import trained

    assert one_rank.apply(trained, (tmp_path, [*options, PATIENT, "--train.steps=7"], {})) == "done"
    (tmp_path / "report" / "report.txt").unlink()
    _, curve = tune(one_rank, tmp_path, options, PATIENT)
    assert [step for step, _ in curve] == [3, 6, 7, 9]


@pytest.mark.slow
def test_more_patience_goes_on_from_the_early_end(one_rank: Pool, options: list[str], tmp_path: Path) -> None:
    tune(one_rank, tmp_path, options, "--train.patience=1")
    report, curve = tune(one_rank, tmp_path, options, "--train.patience=9")
    assert [step for step, _ in curve] == [3, 6, 9, 12]
    assert report["scores"]["loss"] == pytest.approx(curve[0][1], rel=1e-5)
