"""The demo's labelled paragraphs: distinct, split by hash, of several classes."""

from __future__ import annotations

import json
from pathlib import Path

from launch.demo.topics import PARTS, write_topics


def test_every_part_has_examples_and_no_paragraph_is_in_both_splits(tmp_path: Path) -> None:
    train, test = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in write_topics(tmp_path / "topics")
    )
    assert {row["part"] for row in train} == {row["part"] for row in test} == set(PARTS)
    texts = [row["text"] for row in [*train, *test]]
    assert len(texts) == len(set(texts))
    assert 0.15 < len(test) / len(texts) < 0.25


def test_the_split_does_not_depend_on_the_run(tmp_path: Path) -> None:
    first, second = (write_topics(tmp_path / name)[1].read_text() for name in ("a", "b"))
    assert first == second
