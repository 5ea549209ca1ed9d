"""Verdicts on emergence: what the test of a change says of an ability under both kinds of metric, in words.

A jump under a metric that counts right answers alone, while a continuous one grows smoothly, is made by the metric
(Schaeffer et al. 2023). Where no change is found, that is a verdict only if one would have been found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.errors import UserError
from engine.scaling.emergence.abilities import Ability, Axis, Metric, axis_named, measure
from engine.scaling.emergence.change import RESAMPLES, Change, find_change
from engine.scaling.emergence.dip import FEWEST, dip_test
from engine.scaling.emergence.shapes import SMOOTH_SPAN
from engine.scaling.fit import Interval
from engine.scaling.points import Points
from engine.tasks.significance import holm

LEVEL = 0.05
#: with less power "no change was found" is no evidence of a smooth law
ENOUGH_POWER = 0.8

JUMP, KINK, SMOOTH, UNKNOWN = "jump", "kink", "smooth", "unknown"
METRIC_MADE, UNDER_BOTH, UNDER_ONE, ALL_SMOOTH, NONE = (
    "metric-made", "a change under both", "a change under one metric", "smooth", "no verdict",
)  # fmt: skip
_SAID = {JUMP: "a jump", KINK: "flat, then growth from a point (a kink)", SMOOTH: "smooth"}


@dataclass(frozen=True)
class Finding:
    """What one metric shows."""

    metric: Metric
    change: Change
    p_holm: float
    """p of the change, corrected for all tests of the call"""
    shape: str
    """`JUMP`, `KINK`, `SMOOTH`, or `UNKNOWN`"""
    threshold: Interval
    """where the change is if there is one, in the unit of the axis"""
    seeds: tuple[float, float] | None
    """dip, and p of one mode, of the scores at the place beside the threshold that has most; None: too few"""

    def evidence(self, axis: Axis) -> str:
        change = self.change
        tested = f"p = {self.p_holm:.2g} after Holm"
        if self.shape in (JUMP, KINK):
            at = f"at {self.threshold} {axis.unit}, {tested}"
            if self.seeds is None:
                return at
            modes = "two modes or more" if self.seeds[1] < LEVEL else "no second mode shown"
            return f"{at}; over seeds {modes} (dip test, p = {self.seeds[1]:.2g})"
        if change.p_growth >= LEVEL:
            return f"no growth shown (p = {change.p_growth:.2g}), {tested}, power {change.power:.2f}"
        return f"{tested}, power {change.power:.2f} for a jump of {change.height:.3g}"


@dataclass(frozen=True)
class Verdict:
    """What is to be said of an ability."""

    ability: Ability
    axis: Axis
    kind: str
    """`METRIC_MADE`, `UNDER_BOTH`, `UNDER_ONE`, `ALL_SMOOTH`, `NONE`"""
    findings: tuple[Finding, ...]
    """under the discontinuous metric and, where there is one, the continuous one"""
    points: int
    sizes: int

    def __str__(self) -> str:
        evidence = "; ".join(f"{each.metric.column}: {each.evidence(self.axis)}" for each in self.findings)
        return f"{self.ability.name}: {self._words()} ({evidence}; {self.points} points of {self.sizes} sizes)"

    def _words(self) -> str:
        said = ", ".join(
            f"{_SAID.get(each.shape, 'nothing known')} under {each.metric.column}" for each in self.findings
        )
        if self.kind == METRIC_MADE:
            return f"{said}: metric-made"
        return f"no verdict: {said}" if self.kind == NONE else said


def verdicts(
    points: Points,
    abilities: Sequence[Ability],
    *,
    axis: str = "compute",
    level: float = LEVEL,
    span: float = SMOOTH_SPAN,
    heights: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Verdict]:
    """Test each ability under its metrics along compute, loss or, for checkpoints of runs, tokens.

    Args:
        level: the chance of any false change among all tests of the call (Holm 1979).
        span: a rise is smooth if its middle 80 % takes this part of the measured range at least.
        heights: of the jump whose power is told, in units of the scores; None: the rise of the smooth curve.

    Raises:
        UserError: too few sizes; scores that are missing, constant or outside of their limits; an unknown axis.
    """
    along = axis_named(axis)
    _check(abilities, level, span, resamples)
    tests = [(ability, metric) for ability in abilities for metric in ability.metrics]
    measured = [measure(points, metric, along, span) for _, metric in tests]
    changes = [
        find_change(each, level=level / len(tests), height=heights, resamples=resamples, seed=seed + number)
        for number, each in enumerate(measured)
    ]
    corrected = holm([change.p for change in changes])
    found: dict[str, list[Finding]] = {ability.name: [] for ability in abilities}
    for (ability, metric), change, p in zip(tests, changes, corrected, strict=True):
        found[ability.name].append(_finding(metric, change, p, along, level))
    sizes = len(np.unique(points.parameters))
    return [
        Verdict(ability, along, _kind([each.shape for each in findings]), tuple(findings), len(points), sizes)
        for ability, findings in zip(abilities, found.values(), strict=True)
    ]


def _check(abilities: Sequence[Ability], level: float, span: float, resamples: int) -> None:
    names = [ability.name for ability in abilities]
    if not names or len(set(names)) < len(names):
        raise UserError(f"abilities: {', '.join(names) or 'none'}; give one at least, each once")
    for field, value, most in (("level", level, 1.0), ("span", span, 2.0)):
        if not 0.05 * (field == "span") < value < most:
            raise UserError(f"{field}: {value:g} is not allowed; give a number below {most:g} such as {most / 20:g}")
    needed = int(np.ceil(sum(len(ability.metrics) for ability in abilities) / level))
    if resamples < needed:
        raise UserError(
            f"resamples: {resamples} can't reach level {level:g} after correction for all tests; give {needed} at least"
        )


def _finding(metric: Metric, change: Change, p: float, axis: Axis, level: float) -> Finding:
    if p < level and change.p_growth < level:
        shape = KINK if change.form == "kink" else JUMP
    elif p >= level and change.p_growth < level and change.power >= ENOUGH_POWER:
        shape = SMOOTH
    else:
        shape = UNKNOWN
    return Finding(metric, change, p, shape, axis.in_unit(change.threshold), _seeds(change))


def _seeds(change: Change) -> tuple[float, float] | None:
    """The dip test of the scores at the place next to the threshold, before or after it, that has most of them."""
    axis, scores = change.measured.axis, change.measured.scores
    places = np.unique(axis)
    after = int(np.clip(np.searchsorted(places, change.threshold.value), 1, len(places) - 1))
    groups = [scores[axis == places[index]] for index in (after - 1, after)]
    most = max(groups, key=len)
    return dip_test(most) if len(most) >= FEWEST else None


def _kind(shapes: Sequence[str]) -> str:
    changed = [shape in (JUMP, KINK) for shape in shapes]
    if len(shapes) > 1 and changed[0] and shapes[1] == SMOOTH:
        return METRIC_MADE
    if len(shapes) > 1 and all(changed):
        return UNDER_BOTH
    if any(changed):
        return UNDER_ONE
    return ALL_SMOOTH if all(shape == SMOOTH for shape in shapes) else NONE
