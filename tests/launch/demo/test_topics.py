"""The demo's labelled paragraphs: distinct, split by hash, of several classes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.demo import topics


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, str]]]:
    """The rows of training and test."""
    return rows(tmp_path_factory.mktemp("topics"))


def rows(folder: Path) -> list[list[dict[str, str]]]:
    return [[json.loads(line) for line in path.read_text().splitlines()] for path in topics.write_topics(folder)]


def test_every_part_has_examples_and_no_paragraph_is_in_both_splits(splits: list[list[dict[str, str]]]) -> None:
    train, test = splits
    assert {row["part"] for row in train} == {row["part"] for row in test} == set(topics.PARTS)
    texts = [row["text"] for row in [*train, *test]]
    assert len(texts) == len(set(texts))
    assert 0.15 < len(test) / len(texts) < 0.25


def test_the_split_depends_on_the_paragraph_alone(
    splits: list[list[dict[str, str]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of Python has other paragraphs, in another order."""
    some = [(row["text"], row["part"]) for row in [*splits[1], *splits[0]][::-3]]
    monkeypatch.setattr(topics, "labelled_paragraphs", lambda: some)
    for before, after in zip(splits, rows(tmp_path), strict=True):
        assert after
        assert all(row in before for row in after)
