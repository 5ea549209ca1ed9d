"""`labelled.limit`: which of the training examples are learned from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.config import LabelledConfig
from engine.data.labelled.answers.files import Question
from engine.data.labelled.answers.source import hold_out_contexts
from engine.data.labelled.choices import read_questions, split_questions
from engine.data.labelled.classes import class_names, drawn, held_out, split_any, split_validation
from engine.data.labelled.files import read_examples
from engine.data.labelled.pairs import read_pairs, split_pairs
from engine.data.labelled.sets import read_sets, set_names, split_sets
from engine.data.labelled.tagged.files import read_tagged, tag_names
from engine.data.labelled.tagged.files import split_validation as split_tagged
from engine.errors import UserError

LABELS = ["b"] * 11 + ["a"] * 230 + ["c"] * 70 + ["a"] * 30 + ["rare"]


def limited(limit: int, **fields: Any) -> LabelledConfig:
    config = LabelledConfig(**({"train": "train.tsv", "validation": "v.tsv"} | fields), limit=limit)
    config.validate()
    return config


@pytest.mark.parametrize("seed", [1, 2])
def test_every_class_has_its_share_and_smaller_draws_are_parts_of_larger_ones(seed: int) -> None:
    before: set[int] = set()
    for count in range(4, len(LABELS) + 1):
        places = drawn(LABELS, count, seed)
        assert places == sorted(set(places))
        assert len(places) == count
        assert before <= set(places)
        before = set(places)
        found = Counter(LABELS[place] for place in places)
        for name, total in Counter(LABELS).items():
            assert found[name] >= 1
            assert -3 < found[name] - total * count / len(LABELS) <= 1
    assert drawn(LABELS, 50, seed) == drawn(LABELS, 50, seed)
    assert drawn(LABELS, 50, seed) != drawn(LABELS, 50, seed + 1)


def test_the_same_examples_are_held_out_with_any_limit() -> None:
    for fields in ({"validation": None}, {"validation": None, "folds": 5, "fold": 2}):
        labels = [name for name in LABELS if name != "rare"]
        kept, held = held_out(LabelledConfig(**({"train": "train.tsv"} | fields)), labels, 3)
        for limit in (3, 50, len(kept)):
            learned, same = held_out(limited(limit, **fields), labels, 3)
            assert same == held
            assert len(learned) == limit
            assert set(learned) <= set(kept)


def test_nothing_is_held_out_beside_a_file_of_validation_examples() -> None:
    learned, held = held_out(limited(len(LABELS)), LABELS, 1)
    assert (learned, held) == (list(range(len(LABELS))), [])


@pytest.mark.parametrize(
    ("limit", "fields", "message"),
    [
        (343, {}, "labelled.limit: 343 is not allowed; train.tsv has 342 examples: give at most that, or null for all"),
        (342, {"validation": None}, "train.tsv has 308 examples that are not held out: give at most that"),
        (3, {}, "3 is not allowed; train.tsv has examples of 4 classes, and learning needs one of each: give at least"),
    ],
)
def test_a_limit_that_cannot_be_is_refused(limit: int, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        held_out(limited(limit, **fields), LABELS, 1)
    assert message in str(error.value)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(UserError, match=rf"^labelled.limit: {limit} is not allowed; give a whole number of at least 1"):
        limited(limit)


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    path = folder / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_few_of_many_classes_are_no_identifiers(tmp_path: Path) -> None:
    path = write(tmp_path, [{"sentence": f"text {i}", "label": f"class {i % 30}"} for i in range(120)])
    training, _ = split_validation(read_examples(path, "sentence", None, "label"), limited(40), 1)
    assert len(training) == 40
    assert len(class_names(training, drawn=True)) == 30
    identifiers = write(tmp_path, [{"sentence": f"text {i}", "label": f"id {i}"} for i in range(120)])
    with pytest.raises(UserError, match="120 of 120 examples have a label of their own"):
        split_validation(read_examples(identifiers, "sentence", None, "label"), limited(40), 1)


def test_labels_and_types_are_those_of_all_examples(tmp_path: Path) -> None:
    sets = [{"sentence": f"text {i}", "label": [f"l{i % 25}", "common"]} for i in range(100)]
    several, _ = split_sets(read_sets(write(tmp_path, sets), "sentence", None, "label", ","), limited(22), 1)
    assert len(several) == 22
    assert len(set_names(several)) == 26
    rows = [{"tokens": ["Rome"], "tags": [f"B-T{i % 25}" if i % 2 else "O"]} for i in range(100)]
    tagged, _ = split_tagged(read_tagged(write(tmp_path, rows), "sentence", "label"), limited(10), 1)
    assert len(tag_names(tagged)) == 1 + 2 * 25
    assert sum(tags != ["O"] for tags in tagged.tags) == 5


def test_examples_of_every_kind_keep_what_belongs_to_them(tmp_path: Path) -> None:
    numbers = write(tmp_path, [{"sentence": f"text {i}", "label": i / 10} for i in range(50)])
    training, _ = split_any(read_examples(numbers, "sentence", None, "label"), limited(5), 1)
    assert [float(label) * 10 for label in training.labels] == [int(text.split()[1]) for text in training.texts]
    asked = [{"sentence": f"text {i}", "options": [f"o{i}", "other"], "label": i % 2} for i in range(50)]
    whole = read_questions(write(tmp_path, asked), "sentence", None, "options", "label")
    questions, _ = split_questions(whole, limited(5), 1)
    for text, options, right in zip(questions.texts, questions.options, questions.right, strict=True):
        number = int(text.split()[1])
        assert (options[0], right) == (f"o{number}", number % 2)
    labelled = limited(5, text_pair="pair", negatives="none")
    given = [{"sentence": f"text {i}", "pair": f"pair {i}", "none": [f"not {i}"]} for i in range(50)]
    pairs, held = split_pairs(read_pairs(write(tmp_path, given), labelled, training=True), labelled, 1)
    assert (len(pairs), len(held)) == (5, 0)
    assert [negatives[0].split()[1] for negatives in pairs.negatives] == [text.split()[1] for text in pairs.texts]


def test_answers_are_drawn_by_context() -> None:
    questions = [Question(str(i), "dog?", f"context {i // 3}", (), f"FILE, line {i}") for i in range(60)]
    learned, held = hold_out_contexts(questions, limited(4, validation=None), 1)
    assert (len(learned), len(held)) == (12, 6)
    with pytest.raises(UserError, match=r"has 20 contexts: give at most that"):
        hold_out_contexts(questions, limited(21), 1)
