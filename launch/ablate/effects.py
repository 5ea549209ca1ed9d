"""The effect of each switch at each size, paired by run, with a correction for many comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from engine.config import TASKS
from engine.errors import UserError
from engine.tasks.outcomes import read_outcomes
from engine.tasks.significance import LEVEL, Difference, holm, paired_t
from launch.ablate.reading import BASE, parts_of, setting_of
from launch.suite.plan import Cell
from launch.suite.scores import cell_summary, name_of

HELPS, HARMS, UNSHOWN, UNKNOWN = "helps", "harms", "no difference shown", "too few pairs to tell"


@dataclass(frozen=True)
class Effect:
    """What a switch does to the score of a model on a task at a size."""

    model: str
    task: str
    size: str
    switch: str
    metric: str
    higher_is_better: bool
    scored_on: str
    base: float | None
    """mean score of the base's runs that have a pair"""
    differences: Mapping[str, float]
    """score with the switch minus that of the base, by the run's name: the same seed, and so the same examples"""
    effect: float | None
    """their mean"""
    interval_95: tuple[float, float] | None
    """of that mean, by Student's t; None where it can't be told"""
    p: float | None
    p_holm: float | None
    """corrected for all comparisons of the table"""
    verdict: str

    @property
    def improvement(self) -> float:
        """The effect, positive where it makes the score better."""
        return (self.effect or 0.0) * (1.0 if self.higher_is_better else -1.0)


def effects(output: Path, cells: Sequence[Cell]) -> tuple[list[Effect], list[dict[str, Any]]]:
    """The effects, by task, size and switch, and the summaries of all cells.

    Raises:
        UserError: a run's report is damaged, data has changed between runs, or the folder holds no ablation.
    """
    told = {(cell.model, cell.task, cell.setting): cell_summary(output, cell) for cell in cells}
    compared, tests = [], []
    truth = cache(lambda run: hash(read_outcomes(run / "report").truth))
    for cell in cells:
        found = parts_of(cell.setting)
        if found is None:
            raise UserError(f"ablate: {output} holds a suite; zerobert suite {output} makes its report")
        switch, size = found
        base = told.get((cell.model, cell.task, setting_of(BASE, size)))
        if switch == BASE or base is None:
            continue
        own = told[cell.model, cell.task, cell.setting]
        compared.append((cell, switch, size, base, own))
        for name, _, _ in _pairs(base, own):
            _check_examples(truth, *(output / name_of(each) / name for each in (base, own)))
        tests.append(_tested(base, own))
    adjusted = holm([1.0 if test is None else test.p for test in tests])
    return [_effect(*each, test, p) for each, test, p in zip(compared, tests, adjusted, strict=True)], [*told.values()]


def _pairs(base: Mapping[str, Any], own: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Name and both scores of the runs that are finished on both sides."""
    return [
        (name, run["score"], own["runs"][name]["score"]) for name, run in base["runs"].items() if name in own["runs"]
    ]


def _tested(base: Mapping[str, Any], own: Mapping[str, Any]) -> Difference | None:
    """The paired t-test; None below two pairs.

    Where all differences are the same the t-test has no spread to go by, and p is that of the sign test.
    """
    pairs = _pairs(base, own)
    if len(pairs) < 2:
        return None
    found = paired_t([one for _, one, _ in pairs], [other for _, _, other in pairs])
    return replace(found, p=2.0 ** (1 - len(pairs))) if found.p == 0.0 and found.low == found.high else found


def _check_examples(truth: Callable[[Path], int], first: Path, second: Path) -> None:
    """
    Raises:
        UserError: two runs are scored on other examples.
    """
    if truth(first) != truth(second):
        raise UserError(
            f"{second}: it is scored on other examples than {first}; a file has changed since, so move the run away "
            "and run it again"
        )


def _effect(
    cell: Cell,
    switch: str,
    size: str,
    base: Mapping[str, Any],
    own: Mapping[str, Any],
    test: Difference | None,
    p_holm: float,
) -> Effect:
    pairs, metric = _pairs(base, own), cell.record.metric
    differences = {name: other - one for name, one, other in pairs}
    higher = TASKS.get(cell.record.task).metrics.get(metric, True)
    several = test is not None and test.low < test.high
    verdict = UNKNOWN
    if test is not None:
        better = (test.value > 0) == higher
        verdict = UNSHOWN if p_holm >= LEVEL else HELPS if better else HARMS
    return Effect(
        cell.model, cell.task, size, switch, metric, higher, base["scored_on"],
        sum(one for _, one, _ in pairs) / len(pairs) if pairs else None,
        differences,
        sum(differences.values()) / len(pairs) if pairs else None,
        (test.low, test.high) if test is not None and several else None,
        None if test is None else test.p,
        None if test is None else p_holm,
        verdict,
    )  # fmt: skip


def as_json(effect: Effect) -> dict[str, Any]:
    """An effect as JSON has it."""
    return {**asdict(effect), "pairs": len(effect.differences)}
