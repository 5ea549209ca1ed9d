"""Abilities of the points of a ladder: which columns hold them, and a verdict on each along compute and along loss."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError, require
from engine.scaling.emergence.abilities import Ability, Metric, accuracy, axis_named, measure
from engine.scaling.emergence.verdict import LEVEL, Verdict, verdicts
from engine.scaling.points import Points

#: limits of continuous metrics by the beginning of their columns' names
LIMITS = {"prob_": (0.0, 1.0), "logp_": (-math.inf, 0.0), "brier_": (0.0, 2.0), "bpb_": (0.0, math.inf)}


@dataclass(frozen=True)
class Known:
    """An ability and the share of right answers that guessing gives, where that is known.

    Curves aren't held to it: small models are below it where they prefer what is frequent.
    """

    ability: Ability
    chance: float | None = None


@dataclass(frozen=True)
class Judged:
    """Verdicts along one axis, corrected for all tests of it."""

    axis: str
    verdicts: list[Verdict]
    left_out: list[str]
    """why an ability has none"""


def named_abilities(words: Sequence[str], items: Sequence[str]) -> list[Known]:
    """Abilities as options name them.

    Args:
        words: NAME=ACCURACY_COLUMN or NAME=ACCURACY_COLUMN:CONTINUOUS_COLUMN.
        items: NAME=NUMBER of questions, or one number for all.

    Raises:
        UserError: an option that is neither.
    """
    counts, every = _items(items)
    found: list[Known] = []
    for word in words:
        name, _, columns = word.partition("=")
        right, colon, continuous = columns.partition(":")
        remedy = "give NAME=ACCURACY_COLUMN or NAME=ACCURACY_COLUMN:CONTINUOUS_COLUMN"
        require(bool(name and right and (continuous or not colon)), "ability", word, remedy)
        require(all(each.ability.name != name for each in found), "ability", word, f"{name} is given twice")
        found.append(known(name, right, continuous or None, counts.pop(name, every)))
    if counts:
        raise UserError(f"items: {next(iter(counts))!r} is no ability that is given; name it by --ability")
    return found


def _items(words: Sequence[str]) -> tuple[dict[str, int], int | None]:
    counts: dict[str, int] = {}
    every = None
    for word in words:
        name, equals, number = word.rpartition("=")
        require(number.isdecimal() and int(number) > 0, "items", word, "give a number of questions, or NAME=NUMBER")
        if equals:
            counts[name] = int(number)
        else:
            every = int(number)
    return counts, every


def known(
    name: str, right: str, continuous: str | None, items: int | None = None, chance: float | None = None
) -> Known:
    """An ability by its columns; what the continuous one is called tells its limits."""
    metric = None
    if continuous is not None:
        least, most = next((ends for start, ends in LIMITS.items() if continuous.startswith(start)), (-np.inf, np.inf))
        metric = Metric(continuous, None, least, most)
    return Known(Ability(name, accuracy(right, items), metric), chance)


def recorded_abilities(path: Path) -> list[Known]:
    """The abilities that points.json beside a CSV file tells of; none without that file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        listed: list[Mapping[str, Any]] = record_beside(path).get("abilities", [])
        return [
            known(str(each["name"]), str(each["discontinuous"]), next(iter(each["continuous"]), None),
                  each.get("items"), each.get("chance"))
            for each in listed
        ]  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def record_beside(path: Path) -> dict[str, Any]:
    """What `zerobert scaling collect` wrote beside a CSV file; empty where there is nothing, or a file of others.

    Raises:
        UserError: the file is damaged.
    """
    record = path.with_suffix(".json")
    if not record.is_file():
        return {}
    try:
        told = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    return told if isinstance(told, dict) and "abilities" in told else {}


def _damaged(path: Path, error: Exception) -> UserError:
    record = path.with_suffix(".json")
    return UserError(f"points: {record} is damaged ({error!r}); write it again by zerobert scaling collect")


def check_columns(points: Points, abilities: Sequence[Known]) -> None:
    """Refuse columns that the points lack.

    Raises:
        UserError: names the ability and the column.
    """
    for each in abilities:
        for metric in each.ability.metrics:
            if metric.column not in points.columns:
                has = ", ".join(
                    name for name in points.columns if name.startswith(("acc_", "prob_", "logp_", "brier_"))
                )
                raise UserError(
                    f"ability: {each.ability.name} has no column {metric.column!r} in the points; they have "
                    f"{has or ', '.join(points.columns)}"
                )


def judge(points: Points, abilities: Sequence[Known], axis: str, resamples: int, seed: int) -> Judged:
    """A verdict on each ability that can be tested along an axis, under Holm's correction over all of them.

    Args:
        resamples: for p and intervals; more where the correction needs more.
    """
    tested, left_out = [], []
    for each in abilities:
        kept, why = testable(points, each.ability, axis)
        left_out += why
        tested += [] if kept is None else [kept]
    if not tested:
        return Judged(axis, [], left_out)
    needed = math.ceil(sum(len(each.metrics) for each in tested) / LEVEL)
    return Judged(axis, verdicts(points, tested, axis=axis, resamples=max(resamples, needed), seed=seed), left_out)


def testable(points: Points, ability: Ability, axis: str) -> tuple[Ability | None, list[str]]:
    """An ability with what can be measured of it, and why something can't."""
    try:
        measure(points, ability.discontinuous, axis_named(axis))
    except UserError as error:
        return None, [f"{ability.name} is not tested: {error}"]
    try:
        if ability.continuous is not None:
            measure(points, ability.continuous, axis_named(axis))
    except UserError as error:
        return replace(ability, continuous=None), [f"{ability.name} is tested under one metric: {error}"]
    return ability, []
