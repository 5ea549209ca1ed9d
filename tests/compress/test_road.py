"""What a target says, and which candidate has it."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.compress.quantise.latency import Latency
from engine.compress.road import Candidate, Wish, chosen, front, parse_wish
from engine.errors import UserError
from engine.tasks.significance import Difference

#: milliseconds of the model in torch, and its score
WHOLE, SCORE = 12.0, 0.90


def candidate(name: str, score: float, time: float, megabytes: float = 10.0) -> Candidate:
    change = Difference(score - SCORE, score - SCORE - 0.01, score - SCORE + 0.01, 0.5)
    return Candidate(
        name, Path(name), score, change, int(megabytes * 1e6), dict.fromkeys((1, 32), Latency(time, 1.2 * time))
    )


ALL = [
    candidate("whole", 0.90, 8.0, 90),
    candidate("whole, int8", 0.899, 4.0, 23),
    candidate("pruned", 0.88, 5.0, 60),
    candidate("pruned, int8", 0.885, 2.0, 15),
    candidate("student, int8", 0.86, 1.0, 8),
]


@pytest.mark.parametrize(
    ("text", "wish"),
    [
        ("latency 3x, accuracy -1.0", Wish(3.0, 1.0)),
        ("accuracy -0.5", Wish(1.0, 0.5)),
        ("size 20MB", Wish(1.0, 1.0, 20.0)),
        ("size 20 mb,latency 1.5x", Wish(1.5, 1.0, 20.0)),
    ],
)
def test_targets_are_read(text: str, wish: Wish) -> None:
    assert parse_wish(text) == wish


@pytest.mark.parametrize(
    "text",
    ["", "fast", "latency 3", "latency x", "latency 0x", "latency 0.5x", "latency 1..2x", "accuracy 1.0", "accuracy -0",
     "size 20", "latency 3x, latency 2x", "latency 3x,"],
)  # fmt: skip
def test_other_targets_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^target: .*; give such as \"latency 3x, accuracy -1.0\""):
        parse_wish(text)


@pytest.mark.parametrize(
    ("target", "name", "met"),
    [
        ("latency 3x, accuracy -1.0", "whole, int8", True),
        ("latency 6x, accuracy -2.0", "pruned, int8", True),
        ("latency 6x, accuracy -1.0", "whole, int8", False),
        ("latency 10x, accuracy -5.0", "student, int8", True),
        ("size 20MB, accuracy -2.0", "pruned, int8", True),
        ("size 1MB, accuracy -5.0", "student, int8", False),
    ],
)
def test_the_most_accurate_that_keeps_all_bounds_is_chosen(target: str, name: str, met: bool) -> None:
    wish = parse_wish(target)
    best = chosen(ALL, wish, WHOLE)
    assert best.name == name
    assert wish.kept(best, WHOLE) == met


def test_of_none_that_is_accurate_the_most_accurate_is_chosen() -> None:
    assert chosen(ALL[2:], Wish(1.0, 0.1), WHOLE).name == "pruned, int8"


def test_the_front_is_what_no_other_one_beats() -> None:
    assert [each.name for each in front(ALL)] == ["student, int8", "pruned, int8", "whole, int8", "whole"]
