"""A study in words and tables, the same in the terminal, in Markdown and on the page."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from engine.scaling.fit import Interval
from engine.scaling.optimum import Optimum, flops_per_parameter_token
from engine.scaling.points import Points
from launch.scaling.blocks import Notes, Section, Table
from launch.scaling.study import Study

#: of thousands, from none on
_PREFIXES = ("", " k", " M", " B", " T")


def short(value: float) -> str:
    """A count of parameters or tokens.

    >>> short(1.239e8), short(950.0), short(2e17)
    ('124 M', '950', '2e+17')
    """
    power = int(math.log10(value) // 3) if math.isfinite(value) and value >= 1 else 0
    return f"{value:.3g}" if power >= len(_PREFIXES) else f"{value / 1000**power:.3g}{_PREFIXES[power]}"


def between(interval: Interval) -> str:
    """A count with its interval."""
    return f"{short(interval.value)} [{short(interval.low)}, {short(interval.high)}]"


def sections(study: Study) -> Iterator[Section]:
    """All of a study, without pictures."""
    yield law_section(study)
    if study.optima:
        yield advice_section(study)
    if study.predicted:
        yield predicted_section(study)
    if study.held:
        yield held_section(study)
    yield ranking_section(study)
    if study.isoflop:
        yield isoflop_section(study)


def spans(points: Points) -> str:
    """What was trained."""
    parts = [
        f"{len(points)} points of {len(set(points.runs))} independent runs",
        f"{len(np.unique(points.parameters))} sizes from {_range(points.parameters)} parameters",
        f"{_range(points.tokens)} tokens",
        f"{points.flops.min():.3g} to {points.flops.max():.3g} FLOPs",
        f"losses from {points.losses.min():.4g} to {points.losses.max():.4g}",
    ]
    return ", ".join(parts) + f"; C = {flops_per_parameter_token(points):.3g} N D in the median."


def _range(values: np.ndarray) -> str:  # type: ignore[type-arg]
    return f"{short(float(values.min()))} to {short(float(values.max()))}"


def law_section(study: Study) -> Section:
    """The fitted law, its parameters and what is to be doubted."""
    fit = study.fit
    rows = []
    for field, (name, interval) in zip(fit.law.fields, fit.parameters().items(), strict=True):
        held = study.profiles.get(field)
        profiled = "" if held is None else f"[{held.low:.4g}, {held.high:.4g}]"
        rows.append([name, f"{interval.value:.4g}", f"[{interval.low:.4g}, {interval.high:.4g}]", profiled])
    if study.growth is not None:
        a = study.growth
        rows.append(["a of N* ~ C^a", f"{a.value:.4g}", f"[{a.low:.4g}, {a.high:.4g}]", ""])
    level = f"{100 * fit.level:.0f} %"
    table = Table(["parameter", "value", f"{level} of the runs", f"{level} by its profile"], rows)
    residual = float(np.sqrt(np.mean(fit.residuals**2)))
    summary = f"{fit.law.name}: L = {fit.law.formula}, in nats per token; residuals of {100 * residual:.2g} %."
    notes = [f"{note[0].upper()}{note[1:]}." for note in study.notes]
    return Section("Law", [spans(study.points), summary, table, *notes, Notes(fit.warnings())])


def advice_section(study: Study) -> Section:
    """The best use of each budget."""
    rows, notes = [], []
    for best in study.optima:
        rows.append([f"{best.flops:.3g}", between(best.parameters), between(best.tokens), str(best.loss)])
        notes += [f"{best.flops:.3g} FLOPs: {text}" for text in best.warnings]
    sentences = [advice(best, study.fit.level) for best in study.optima]
    return Section("Advice", [*sentences, Table(["FLOPs", "parameters", "tokens", "loss"], rows), Notes(notes)])


def advice(best: Optimum, level: float) -> str:
    """One budget in a sentence."""
    return (
        f"For {best.flops:.3g} FLOPs train N = {between(best.parameters)} parameters on D = {between(best.tokens)} "
        f"tokens ({100 * level:.0f} % intervals): {best.tokens.value / best.parameters.value:.3g} tokens per parameter."
    )


def predicted_section(study: Study) -> Section:
    """Runs that aren't among the points."""
    level = f"{100 * study.fit.level:.0f} %"
    rows = [
        [short(each.parameters), short(each.tokens), f"{each.loss.value:.4g}",
         f"[{each.loss.low:.4g}, {each.loss.high:.4g}]"]
        for each in study.predicted
    ]  # fmt: skip
    text = f"{study.fit.law.name}, fitted to all points; the intervals hold a single run."
    return Section("Predictions", [text, Table(["parameters", "tokens", "loss", level], rows)])


def held_section(study: Study) -> Section:
    """Predictions of runs that the law was not fitted to."""
    assert study.held_law is not None
    rows = [
        [
            each.name, f"{each.predicted.value:.4g}", f"[{each.predicted.low:.4g}, {each.predicted.high:.4g}]",
            f"{each.reached:.4g}", f"{100 * each.error:+.2f} %", "yes" if each.covered else "no",
        ]
        for each in study.held
    ]  # fmt: skip
    covered = sum(each.covered for each in study.held)
    worst = max(abs(each.error) for each in study.held)
    level = f"{100 * study.fit.level:.0f} %"
    text = (
        f"{study.held_law.name}, chosen and fitted without the largest sizes, predicts them to within "
        f"{100 * worst:.2g} %; {covered} of {len(rows)} are inside of their {level} intervals."
    )
    notes = []
    signs = {each.error > 0 for each in study.held}
    if len(rows) > 2 and len(signs) == 1:
        notes.append("all errors have one sign: larger runs leave the trend of the smaller ones")
    table = Table(["run", "predicted", level, "reached", "error", "covered"], rows)
    return Section("Predictions of the largest runs", [text, table, Notes(notes)])


def ranking_section(study: Study) -> Section:
    """Which law predicts larger runs."""
    rows = [
        [
            each.law.name, each.law.formula, "" if math.isinf(each.error) else f"{100 * each.error:.3g} %",
            f"{100 * each.residual:.3g} %", "used" if each.law is study.fit.law else "",
        ]
        for each in study.candidates
    ]  # fmt: skip
    text = (
        "Each law is fitted to the runs of least compute (half of them, 65 % and 80 %) and predicts the others; the "
        "error is the root mean square of log(predicted / reached)."
    )
    return Section("Which law predicts", [text, Table(["law", "L =", "error", "residual", ""], rows)])


def isoflop_section(study: Study) -> Section:
    """The best size of each budget that has sizes enough, without any law."""
    assert study.isoflop is not None
    rows, beyond = [], 0
    for budget in study.isoflop.budgets:
        best = between(budget.best) if math.isfinite(budget.best.value) else "none: no parabola"
        beyond += not budget.inside
        rows.append([f"{budget.flops:.3g}", str(len(budget.points)), best, "yes" if budget.inside else "no"])
    exponent = study.isoflop.exponent
    text = "Parabolas of log loss over log N at each budget, which assume no law"
    text += f": N* ~ C^{exponent}." if math.isfinite(exponent.value) else "; too few have a best size for an exponent."
    notes = [f"the best size of {beyond} budget(s) is beyond the sizes that were trained"] if beyond else []
    return Section("IsoFLOP", [text, Table(["FLOPs", "points", "best size", "inside"], rows), Notes(notes)])
