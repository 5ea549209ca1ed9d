"""Mistakes in the rows of regression, several labels, choices and classes, and in their options: one line each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from tests.tasks.labels import ROWS, MakeTask, Row, write

BAD: dict[str, tuple[str, dict[str, Any], Sequence[Row], str]] = {}


def bad(name: str, task: str, rows: Sequence[Row], message: str, **options: Any) -> None:
    BAD[name] = (task, options, rows, message)


GOOD = {"sentence": "good film", "label": 1.0}
bad("number as text", "regression", [GOOD, {**GOOD, "label": "much"}], "line 2: label 'much' is no finite number")
bad("number as a bool", "regression", [GOOD, {**GOOD, "label": True}], "line 2: label 'True' is no finite number")
bad("no number", "regression", [GOOD, {**GOOD, "label": None}], "line 2: no label in column 'label'")
bad("infinite number", "regression", [{**GOOD, "label": float("inf")}], "line 1: label 'inf' is no finite number")
bad("too large a number", "regression", [{**GOOD, "label": 1e39}], "line 1: label '9999999999")
bad("NaN", "regression", [GOOD, {**GOOD, "label": float("nan")}], "line 2: no label in column 'label'")
bad("one number", "regression", [GOOD, GOOD], "train.jsonl: every label is 1; give different numbers")
bad("list for a number", "regression", [{**GOOD, "label": [1.0]}], "line 1: label [1.0] in column 'label'")
SET = {"sentence": "good film", "label": ["a", "b"]}
bad("labels None", "multi_label_classification", [SET, {**SET, "label": None}], "line 2: no label in column 'label'")
bad("label None", "multi_label_classification", [{**SET, "label": ["a", None]}], "line 1: no label in column 'label'")
bad("label as a bool", "multi_label_classification", [{**SET, "label": [True]}], "line 1: label True in column 'label'")
bad("label as a float", "multi_label_classification", [{**SET, "label": [0.5]}], "line 1: label 0.5 in column 'label'")
bad("label twice", "multi_label_classification", [{**SET, "label": ["a", "a"]}], "line 1: label 'a' is twice in")
bad("one label", "multi_label_classification", [{**SET, "label": ["a"]}] * 2, "train.jsonl: of labels it has only 'a'")
bad("no labels", "multi_label_classification", [{**SET, "label": []}] * 2, "train.jsonl: of labels it has none")
bad(
    "texts for labels", "multi_label_classification", [{**SET, "label": [f"l{i}"]} for i in range(30)],
    "train.jsonl: 30 labels of its 30 examples occur once",
)  # fmt: skip
bad(
    "mark of 2", "multi_label_classification", [{"sentence": "a", "x": 1, "y": 0}, {"sentence": "a", "x": 2, "y": 0}],
    "line 2: column 'x' holds 2; give 1 where the example has it, and else 0", label="x,y",
)  # fmt: skip
bad(
    "mark that is missing", "multi_label_classification", [{"sentence": "a", "x": 1}],
    "line 1: no column 'y'; it has sentence, x; set labelled.label[1] to one of them", label="x,y",
)  # fmt: skip
ASKED = {"sentence": "film", "options": ["good", "bad"], "label": 0}
bad("no options", "multiple_choice", [ASKED, {**ASKED, "options": []}], "line 2: 0 option(s) in column 'options'")
bad("one option", "multiple_choice", [{**ASKED, "options": ["good"]}], "line 1: 1 option(s) in column 'options'")
bad("options as text", "multiple_choice", [{**ASKED, "options": "good"}], "line 1: column 'options' holds 'good'")
bad("empty option", "multiple_choice", [{**ASKED, "options": ["a", ""]}], "line 1: empty text in column 'options[1]'")
bad("option as a number", "multiple_choice", [{**ASKED, "options": ["a", 2]}], "line 1: column 'options[1]' holds 2")
bad("index beyond", "multiple_choice", [{**ASKED, "label": 2}], "line 1: label 2 in column 'label' names none of 2")
bad("letter beyond", "multiple_choice", [{**ASKED, "label": "C"}], "label 'C' in column 'label' names none of 2")
bad("negative index", "multiple_choice", [{**ASKED, "label": -1}], "label -1 in column 'label' names none of 2")
bad("index as a bool", "multiple_choice", [{**ASKED, "label": True}], "label True in column 'label' names none of 2")
bad("index as a float", "multiple_choice", [{**ASKED, "label": 1.0}], "label 1.0 in column 'label' names none of 2")
CLASS = [{"sentence": "good film", "label": label} for label in ("yes", "no")] * 4
for weights, why in {
    "maybe=2": "'maybe' is not among the classes of labelled.train (no, yes)",
    "yes=0": "the weight of 'yes' is '0'; give a number above 0",
    "yes=-1": "the weight of 'yes' is '-1'; give a number above 0",
    "yes=nan": "the weight of 'yes' is 'nan'; give a number above 0",
    "yes=2,yes=3": "'yes' has two weights; give one",
    "2": "'2' is no name=weight; give balanced, or such as no=2,yes=0.5",
    "": "it names no class",
}.items():
    told = f"labelled.class_weights: {weights!r} is not allowed; {why}"
    bad(f"weights {weights}", "sequence_classification", CLASS, told, class_weights=weights)
bad("smoothing of 1", "sequence_classification", CLASS, "labelled.label_smoothing: 1.0 is not", label_smoothing=1.0)
bad("smoothing below 0", "sequence_classification", CLASS, "labelled.label_smoothing: -0.1", label_smoothing=-0.1)
bad(
    "smoothing of an order", "sequence_classification", CLASS, "labelled.loss ordinal has no smoothing",
    loss="ordinal", label_smoothing=0.1,
)  # fmt: skip
bad("unknown loss", "sequence_classification", CLASS, "labelled.loss: 'focal' is not allowed; choose", loss="focal")
bad("no order", "sequence_classification", CLASS, "tells no order of its classes (no, yes)", loss="ordinal")
bad(
    "score of an order", "sequence_classification", CLASS, "labelled.metric: 'rank_error' is not allowed; it needs",
    metric="rank_error",
)  # fmt: skip
bad("another task's score", "regression", [GOOD], "labelled.metric: 'accuracy' is not allowed", metric="accuracy")
bad("no separator", "multi_label_classification", [SET], "labelled.separator: '' is not allowed", separator="")


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_line_that_names_file_and_row_or_field_and_value(
    make: MakeTask, tmp_path: Path, name: str
) -> None:
    task, options, rows, message = BAD[name]
    (tmp_path / "bad").mkdir()
    path = write(tmp_path / "bad" / "train.jsonl", rows)
    with pytest.raises(UserError) as caught:
        make(task, train=path, validation=path, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            "multi_label_classification",
            {"sentence": "a", "label": ["new"]},
            "line 2: label 'new' is not among the",
        ),
        ("regression", {"sentence": "a", "label": "new"}, "line 2: label 'new' is no finite number"),
        ("multiple_choice", {**ASKED, "label": 7}, "line 2: label 7 in column 'label' names none of 2 options"),
    ],
)
def test_a_mistake_in_the_test_file_shows_before_training(
    make: MakeTask, tmp_path: Path, task: str, row: Row, message: str
) -> None:
    path = write(tmp_path / "test.jsonl", [ROWS[task](1, 5)[0], row])
    with pytest.raises(UserError) as caught:
        make(task, test=path)
    assert f"{path}, {message}" in str(caught.value)
