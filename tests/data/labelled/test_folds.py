"""Folds of labelled examples: every example is held out once, and every fold is like the whole."""

from __future__ import annotations

from collections import Counter

import pytest

from engine.config import LabelledConfig
from engine.data.labelled.folds import fold_of
from engine.errors import UserError

LABELS = ["b"] * 11 + ["a"] * 23 + ["c"] * 7 + ["a"] * 3


def folds(labels: list[str], count: int, seed: int = 1) -> list[tuple[list[int], list[int]]]:
    return [
        fold_of(LabelledConfig(train="train.tsv", folds=count, fold=number), labels, seed)
        for number in range(1, count + 1)
    ]


@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_every_example_is_held_out_once_and_classes_are_dealt_evenly(count: int) -> None:
    parts = folds(LABELS, count)
    assert sorted(index for _, held in parts for index in held) == list(range(len(LABELS)))
    for kept, held in parts:
        assert sorted(kept + held) == list(range(len(LABELS)))
        assert (kept, held) == (sorted(kept), sorted(held))
        for name, total in Counter(LABELS).items():
            assert sum(LABELS[index] == name for index in held) in (total // count, -(-total // count))
    sizes = [len(held) for _, held in parts]
    assert max(sizes) - min(sizes) <= 1


def test_folds_belong_to_the_seed() -> None:
    assert folds(LABELS, 3) == folds(LABELS, 3)
    assert folds(LABELS, 3, seed=2) != folds(LABELS, 3)


def test_examples_without_classes_are_parted_too() -> None:
    assert sorted(len(held) for _, held in folds([""] * 11, 4)) == [2, 3, 3, 3]


@pytest.mark.parametrize(
    ("count", "message"),
    [(8, "has 7 example.s. of 'c', and each fold needs one; give at most 7"), (3, "give at most 2")],
)
def test_a_class_needs_an_example_for_each_fold(count: int, message: str) -> None:
    labels = LABELS if count == 8 else [*LABELS, "rare", "rare"]
    with pytest.raises(UserError, match=rf"^labelled.folds: {count} is not allowed; train.tsv .*{message}$"):
        folds(labels, count)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"folds": 1, "fold": 1}, "labelled.folds: 1 is not allowed; give at least 2"),
        ({"folds": 3}, "labelled.folds: 3 is not allowed; give labelled.fold too, from 1"),
        ({"fold": 1}, "labelled.fold: 1 is not allowed; give one of 1 to labelled.folds"),
        ({"folds": 3, "fold": 4}, "labelled.fold: 4 is not allowed"),
        ({"folds": 3, "fold": 0}, "labelled.fold: 0 is not allowed"),
        ({"folds": 3, "fold": 1, "validation": "v.tsv"}, "labelled.validation: 'v.tsv' is not allowed; the validation"),
    ],
)
def test_fields_that_contradict_one_another_are_refused(fields: dict[str, int | str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        LabelledConfig(**fields).validate()  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)
