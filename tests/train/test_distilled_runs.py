"""Runs with teachers: on every layout alike, resumed with the same teachers alone, and exported without projections."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import RegulariseConfig
from tests.tasks.distilled.plain import LARGER, save_teacher
from tests.tasks.regularised.plain import make
from tests.train.runs import losses
from tests.train.test_label_runs import BOUND, STEPS, train
from tests.train.test_layouts import largest_difference

#: by two teachers, through a projection for the second
ALL = ("--distil.hidden=0.5", "--distil.relations=0.5", "--distil.relation_heads=2", "--distil.hard=0.5")


def prepare(folder: Path, task: str) -> tuple[str, ...]:
    """The data, the student and its teachers; the options of all of these."""
    made = make(folder, task, RegulariseConfig())
    sizes: tuple[dict[str, int], ...] = ({}, LARGER)
    teachers = [save_teacher(made, folder / f"teacher-{seed}", seed, **each) for seed, each in enumerate(sizes)]
    return (f"--distil.teachers={','.join(map(str, teachers))}", *ALL)


@pytest.mark.parametrize(
    ("task", "stage"),
    [
        ("sequence_classification", 3),
        pytest.param("sequence_classification", 2, marks=pytest.mark.slow),
        pytest.param("sequence_classification", 1, marks=pytest.mark.slow),
        pytest.param("multiple_choice", 0, marks=pytest.mark.slow),
        pytest.param("regression", 3, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_learn_from_teachers_what_one_learns(tmp_path: Path, task: str, stage: int) -> None:
    options = prepare(tmp_path, task)
    train(tmp_path, tmp_path / "one", task, 1, 0, 1, *options)
    recomputed = "--model.activation_checkpointing=true"
    together, _ = train(tmp_path, tmp_path / "two", task, 2, stage, 2, *options, recomputed)
    assert len(together) == STEPS
    for name in ("train/loss", "train/soft_loss", "train/hidden_loss", "train/relation_loss"):
        worst = largest_difference(losses(tmp_path / "two", name), losses(tmp_path / "one", name))
        print(f"{task}, 2 ranks, ZeRO-{stage}, accumulation 2: {name} differs by up to {worst:.1e}")
        assert worst < BOUND
