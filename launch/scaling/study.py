"""A study of points: the laws ranked, one of them fitted, and all that is read off it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import UserError, require
from engine.scaling.choice import Candidate, HeldOut, predict_largest, rank
from engine.scaling.fit import RESAMPLES, Fit, Interval, check_enough, fit
from engine.scaling.isoflop import IsoFlop, isoflop
from engine.scaling.optimum import Optimum, Place, flops_per_parameter_token, optimum
from engine.scaling.points import Points, read_points
from engine.scaling.profile import profile
from engine.scaling.terms import EXPONENTS, LAWS, Law
from launch.cli import CommandParser

#: with fewer resamples the ends of a 90 % interval are hardly seen
FEWEST_RESAMPLES = 20
#: columns whose values mark curves of their own
IDENTITY = ("objective", "architecture")


@dataclass(frozen=True)
class Predicted:
    """A run that isn't among the points, and the loss it should reach."""

    parameters: float
    tokens: float
    loss: Interval


@dataclass(frozen=True)
class Study:
    """What is known of points."""

    candidates: list[Candidate]
    """all laws that the points can hold, from the best predictor on"""
    fit: Fit
    held_law: Law | None
    """the law that the runs of `held` are predicted by; None: none are held out"""
    held: list[HeldOut]
    optima: list[Optimum]
    predicted: list[Predicted]
    isoflop: IsoFlop | None
    profiles: dict[str, Interval]
    """intervals of the exponents by their profiles"""
    notes: tuple[str, ...]

    @property
    def points(self) -> Points:
        return self.fit.points

    @property
    def growth(self) -> Interval | None:
        """a of N* ~ C^a (Hoffmann et al. 2022, equation 4); None of a law that doesn't tell size from data."""
        fields = self.fit.law.fields
        if not tells_size(self.fit.law):
            return None
        alpha, beta = fields.index("alpha"), fields.index("beta" if "beta" in fields else "alpha")
        one, many = (
            theta[..., beta] / (theta[..., alpha] + theta[..., beta]) for theta in (self.fit.theta, self.fit.samples)
        )
        return self.fit.interval(one, many)


def tells_size(law: Law) -> bool:
    """Whether a law has a term of the size and one of the data."""
    return "log_A" in law.fields and "log_B" in law.fields


def add_options(parser: CommandParser) -> None:
    """The options of `read_study`."""
    add = parser.add_argument
    add("--columns", type=str, nargs="+", default=[], metavar="FIELD=COLUMN", help="the file's own names: parameters="
        "params,loss=loss_c4 and so on, of name, run, parameters, tokens, flops and loss")  # fmt: skip
    add("--where", type=str, nargs="+", default=[], metavar="COLUMN=VALUE", help="rows to take, such as train_set=c4")
    add("--law", type=str, default="auto", help="auto (the best predictor that tells size from data), "
        f"{', '.join(LAWS)}")  # fmt: skip
    add("--hold-out-largest", type=int | None, default=None, help="sizes to predict from the smaller ones; 1 if not "
        "given and enough are left, 0 for none")  # fmt: skip
    add("--compute", type=float, nargs="+", default=[], help="FLOPs of budgets to tell the best size and tokens of")
    add("--predict", type=str, nargs="+", default=[], metavar="PARAMETERS:TOKENS", help="runs to predict the loss of, "
        "such as 7e9:1.4e12")  # fmt: skip
    add("--resamples", type=int, default=RESAMPLES, help="of the runs, for 90 %% intervals; in a report also for "
        "the tests of abilities")  # fmt: skip
    add("--seed", type=int, default=0, help="of the resamples")


def pairs(field: str, words: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE words, also several in one with commas between them.

    Raises:
        UserError: something else, or a name that is given twice.
    """
    found: dict[str, str] = {}
    for word in (part for each in words for part in each.split(",")):
        name, equals, value = word.partition("=")
        require(bool(name and equals and value), field, word, "give NAME=VALUE")
        require(name not in found, field, word, f"{name} is given twice; give it once")
        found[name] = value
    return found


def runs_of(words: Sequence[str]) -> list[tuple[float, float]]:
    """N and D of PARAMETERS:TOKENS words.

    Raises:
        UserError: something else.
    """
    found = []
    for word in words:
        try:
            parameters, tokens = (float(part) for part in word.split(":"))
        except ValueError:
            parameters = tokens = math.nan
        fits = all(math.isfinite(value) and value > 0 for value in (parameters, tokens))
        require(fits, "predict", word, "give PARAMETERS:TOKENS, such as 7e9:1.4e12")
        found.append((parameters, tokens))
    return found


def points_of(path: Path, options: Any) -> Points:
    """The points of a file by the options.

    Raises:
        UserError: they can't be read, or are of several curves.
    """
    points = read_points(path, pairs("columns", options.columns), pairs("where", options.where))
    for column in IDENTITY:
        seen = sorted(set(points.columns.get(column, ())))
        if len(seen) > 1:
            raise UserError(
                f"points: {column} has {len(seen)} values, {', '.join(seen)}, whose curves differ; take one by --where "
                f"{column}={seen[0]}"
            )
    return points


def check(options: Any) -> None:
    """Refuse options that no study can be made with.

    Raises:
        UserError: names the option.
    """
    require(options.law == "auto" or options.law in LAWS, "law", options.law, f"give auto, {', '.join(LAWS)}")
    enough = options.resamples >= FEWEST_RESAMPLES
    require(enough, "resamples", options.resamples, f"give {FEWEST_RESAMPLES} or more")
    require(options.seed >= 0, "seed", options.seed, "give 0 or more")
    largest = options.hold_out_largest
    require(largest is None or largest >= 0, "hold-out-largest", largest, "give a number of sizes, or 0 for none")
    for flops in options.compute:
        require(math.isfinite(flops) and flops > 0, "compute", flops, "give positive numbers such as 1e20")
    runs_of(options.predict)


def study(points: Points, options: Any) -> Study:
    """Rank the laws, fit one, and read off what the points allow.

    Raises:
        UserError: the points can't hold a law, or not the one that is asked for.
    """
    candidates = rank(points, list(LAWS.values()))
    law, notes = chosen(options.law, candidates)
    if options.law == "auto" and not tells_size(law):
        notes = [*notes, *_why_not(points)]
    if options.compute and not tells_size(law):
        raise UserError(f"compute: {law.name} doesn't tell size from data, so it has no best size; leave compute out")
    found = fit(points, law, resamples=options.resamples, seed=options.seed)
    held_law, held, more = _held_out(points, options)
    try:
        parabolas = isoflop(points, resamples=options.resamples, seed=options.seed)
    except UserError:
        parabolas, more = None, [*more, "no budget has sizes enough for an IsoFLOP parabola"]
    profiles = {name: profile(found, name).interval for name in law.fields if name in EXPONENTS}
    optima = [optimum(found, flops) for flops in options.compute]
    predicted = predict(found, runs_of(options.predict), options.seed)
    return Study(candidates, found, held_law, held, optima, predicted, parabolas, profiles, (*notes, *more))


def predict(found: Fit, runs: Sequence[tuple[float, float]], seed: int) -> list[Predicted]:
    """The losses of runs by a law, at the points' own FLOPs per parameter and token."""
    if not runs:
        return []
    parameters, tokens = np.array(runs).T
    losses = found.predict(Place(parameters, tokens, flops_per_parameter_token(found.points)), seed)
    return [Predicted(*run, loss) for run, loss in zip(runs, losses, strict=True)]


def chosen(name: str, candidates: Sequence[Candidate]) -> tuple[Law, list[str]]:
    """The law to use, and what to tell about the choice."""
    best = candidates[0].law
    law = LAWS[name] if name != "auto" else next((each.law for each in candidates if tells_size(each.law)), best)
    if law is best:
        return law, []
    reason = "doesn't tell size from data" if not tells_size(best) else "isn't what was asked for"
    return law, [f"{best.name} predicts larger runs better than {law.name}, but {reason}"]


def _why_not(points: Points) -> list[str]:
    """Why no law that tells size from data is fitted."""
    try:
        check_enough(LAWS["no_floor"], points)
    except UserError as error:
        return [f"no law that tells size from data can be fitted: {error}"]
    return []


def _held_out(points: Points, options: Any) -> tuple[Law | None, list[HeldOut], list[str]]:
    """The largest sizes predicted by a law that was chosen without them."""
    sizes, kept = options.hold_out_largest, np.unique(points.parameters)
    if sizes == 0:
        return None, [], []
    count = 1 if sizes is None else sizes
    try:
        require(count < len(kept), "hold-out-largest", count, f"there are {len(kept)} sizes; give fewer")
        small = points.take(points.parameters < kept[-count])
        law = chosen(options.law, rank(small, list(LAWS.values())))[0]
        return law, predict_largest(points, law, count, options.resamples, options.seed), []
    except UserError as error:
        if sizes is not None:
            raise
        return None, [], [f"no size is held out: {error}"]
