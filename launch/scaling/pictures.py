"""Pictures of a study as SVG that takes the page's colours, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from os.path import commonpath
from pathlib import Path
from typing import Any

import numpy as np

from engine.scaling.emergence.verdict import JUMP, KINK, Finding
from engine.scaling.fit import Fit
from engine.scaling.optimum import Place, flops_per_parameter_token, optimum
from engine.scaling.terms import Array
from launch.forecast.view import COLOURS
from launch.scaling.blocks import Picture
from launch.scaling.study import Study, tells_size
from launch.scaling.told import short

#: inches; at the width of a telephone its letters are still read
SIZE = (4.8, 3.5)
#: colours of Okabe and Ito that are seen on white and on black
SEEN = tuple(COLOURS[index] for index in (1, 4, 2, 5, 6, 0, 7))
#: more sizes are coloured along a scale
MOST_NAMED = len(SEEN)


def draw(paint: Callable[[Any], None], caption: str) -> Picture:
    """A picture with one panel that `paint` fills."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": caption, "font.size": 10, "font.family": "sans-serif"}):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        written = io.StringIO()
        FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None})
    return Picture(for_page(written.getvalue()), caption)


def for_page(svg: str) -> str:
    """The element alone, as wide as its place, with the page's colour for what is black."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1)
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'<g id="patch_1">.*?</g>', "", element, count=1, flags=re.DOTALL)  # the background
    element = re.sub(r'<g id="patch_2">.*?</g>', "", element, count=1, flags=re.DOTALL)  # that of the panel
    return element.replace("#000000", "currentColor")


def colour_of(fit: Fit) -> Callable[[float], Any]:
    """The colour of a size."""
    sizes = np.unique(fit.points.parameters)
    if len(sizes) <= MOST_NAMED:
        named = dict(zip(sizes.tolist(), SEEN, strict=False))
        return lambda size: named[size]
    from matplotlib import colormaps

    scale = colormaps["viridis"]
    low, high = np.log(sizes[0]), np.log(sizes[-1])
    return lambda size: scale(0.15 + 0.75 * float((np.log(size) - low) / (high - low)))


def study_pictures(study: Study) -> list[Picture]:
    """Loss against compute, and residuals."""
    fit = study.fit
    return [
        draw(lambda axes: _loss(axes, study), "Loss against compute: points, the law at each size, and the best that "
             f"a budget gives by the law with its {100 * fit.level:.0f} % band."),
        draw(lambda axes: _residuals(axes, fit, fit.points.flops, "FLOPs"), "Residuals over compute: how far a run's "
             "loss is above the law's."),
        draw(lambda axes: _residuals(axes, fit, fit.points.tokens, "tokens"), "Residuals over tokens."),
    ]  # fmt: skip


def _loss(axes: Any, study: Study) -> None:
    fit, points, colour = study.fit, study.fit.points, colour_of(study.fit)
    per = flops_per_parameter_token(points)
    held = {each.name for each in study.held}
    for number, size in enumerate(sizes := np.unique(points.parameters)):
        own = points.take(points.parameters == size)
        out = np.array([name in held for name in own.names])
        label = short(size) if len(sizes) <= MOST_NAMED or number in (0, len(sizes) - 1) else None
        if not out.all():
            axes.scatter(own.flops[~out], own.losses[~out], color=[colour(size)], s=18, label=label, zorder=3)
        axes.scatter(own.flops[out], own.losses[out], edgecolor=[colour(size)], facecolor="none", s=34, zorder=3,
                     label=f"{short(size)}, held out" if out.any() else None)  # fmt: skip
        data = np.geomspace(own.tokens.min(), own.tokens.max(), 40)
        if len(np.unique(own.tokens)) > 1:
            place = Place(np.full_like(data, size), data, per)
            axes.plot(place.flops, fit.law.predict(fit.theta, place), color=colour(size), linewidth=1, alpha=0.8)
    if tells_size(fit.law):
        budgets = np.geomspace(points.flops.min(), points.flops.max(), 16)
        losses = [optimum(fit, float(flops)).loss for flops in budgets]
        axes.plot(budgets, [each.value for each in losses], color="black", linewidth=1.4, label="best by the law")
        axes.fill_between(budgets, [each.low for each in losses], [each.high for each in losses], color="black",
                          alpha=0.15, linewidth=0)  # fmt: skip
    _log(axes, points.losses)
    axes.set(xlabel="FLOPs", ylabel="loss, nats per token")
    axes.legend(fontsize=8, frameon=False, title="parameters", title_fontsize=8, labelcolor="black")


def _log(axes: Any, losses: Array) -> None:
    """Logarithmic axes, with plain numbers of losses."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator(MaxNLocator(6).tick_values(losses.min(), losses.max())))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.set_ylim(losses.min() * 0.97, losses.max() * 1.03)


def _residuals(axes: Any, fit: Fit, place: Array, unit: str) -> None:
    colour = colour_of(fit)
    axes.axhline(0.0, color="black", linewidth=0.8)
    colours = [colour(size) for size in fit.points.parameters]
    axes.scatter(place, 100 * np.expm1(fit.residuals), color=colours, s=18)
    axes.set(xscale="log", xlabel=unit, ylabel="residual, %")


def held_picture(study: Study) -> Picture:
    """Predictions of held-out runs beside what they reached."""

    def paint(axes: Any) -> None:
        places = np.arange(len(study.held))[::-1]
        for place, each in zip(places, study.held, strict=True):
            interval, reached = each.predicted, each.reached
            low, value, high = (100 * (end / reached - 1) for end in (interval.low, interval.value, interval.high))
            axes.hlines(place, low, high, color=SEEN[0], linewidth=4, alpha=0.6)
            axes.scatter([value], [place], color=SEEN[0], s=26, zorder=3)
        axes.axvline(0.0, color="black", linewidth=1)
        axes.set_yticks(places, short_names([each.name for each in study.held]), fontsize=8)
        axes.set(xlabel="predicted over reached, %", ylim=(-0.6, len(places) - 0.4))

    return draw(paint, f"Predictions with their {100 * study.fit.level:.0f} % intervals; the line is what was reached.")


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the folders that all of them lie in, cut at the front where they are still long.

    >>> short_names(["bert/h64/seed-1", "bert/h64/seed-2"])
    ['seed-1', 'seed-2']
    """
    folder = commonpath([str(Path(name).parent) for name in names])
    own = [name.removeprefix(f"{folder}/") for name in names]
    return [name if len(name) <= 28 else f"…{name[-27:]}" for name in own]


def isoflop_picture(study: Study) -> Picture:
    """The points of each budget over their sizes, with its parabola."""
    assert study.isoflop is not None
    points, budgets = study.points, study.isoflop.budgets

    def paint(axes: Any) -> None:
        for number, budget in enumerate(budgets):
            colour, own = SEEN[number % len(SEEN)], points.take(budget.points)
            axes.scatter(own.parameters, own.losses, color=colour, s=18, label=f"{budget.flops:.2g}")
            sizes = np.log(own.parameters)
            bend = np.polynomial.Polynomial.fit(sizes, np.log(own.losses), 2)
            line = np.linspace(sizes.min(), sizes.max(), 50)
            axes.plot(np.exp(line), np.exp(bend(line)), color=colour, linewidth=1)
            if budget.inside:
                best = budget.best.value
                axes.scatter([best], [np.exp(bend(np.log(best)))], marker="v", color="black", s=30, zorder=4)
        every = np.concatenate([budget.points for budget in budgets])
        _log(axes, points.losses[every])
        axes.set(xlabel="parameters", ylabel="loss, nats per token")
        axes.legend(fontsize=8, frameon=False, title="FLOPs", title_fontsize=8, ncols=2)

    return draw(paint, "Loss over size at fixed compute, with parabolas; triangles are the best sizes.")


def finding_picture(finding: Finding, ability: str, axis: str, unit: str, chance: float | None) -> Picture:
    """Scores of one metric along an axis, the smooth law, and a change where one was found."""
    change = finding.change
    measured = change.measured

    def paint(axes: Any) -> None:
        line = np.linspace(0.0, 1.0, 200)
        place = measured.on_axis(line)
        shown = (lambda values: 10.0**values) if axis != "loss" else (lambda values: -values)
        axes.scatter(shown(measured.axis), measured.scores, color=SEEN[0], s=18, zorder=3)
        axes.plot(shown(place), change.smooth.at(line)[0], color="black", linewidth=1, label="smooth")
        if finding.shape in (JUMP, KINK):
            axes.plot(shown(place), change.change.at(line)[0], color=SEEN[3], linewidth=1.4, label=finding.shape)
            axes.axvspan(finding.threshold.low, finding.threshold.high, color=SEEN[3], alpha=0.15, linewidth=0)
        if chance is not None:
            axes.axhline(chance, color="black", linestyle=":", linewidth=1, label="chance")
        if axis == "loss":
            axes.invert_xaxis()
        else:
            axes.set_xscale("log")
        axes.set(xlabel=f"{axis}, {unit}", ylabel=finding.metric.column)
        axes.legend(fontsize=8, frameon=False)

    return draw(paint, f"{ability}: {finding.metric.column} along {axis}, {finding.shape}.")
