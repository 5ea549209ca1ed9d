"""`zerobert search --lr-finder`: the loss at growing learning rates in one short run, and a rate that it suggests.

The range test of Smith (2017, "Cyclical Learning Rates for Training Neural Networks"), with rates that grow
geometrically. He reads the rates off the picture; the suggestion is fastai's: a tenth of the rate where the smoothed
loss is lowest (Howard and Gugger 2020, "fastai: A Layered API for Deep Learning").

Shapes: N steps.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.durable import write_atomically
from engine.errors import RunError, UserError
from launch.configure.options import parse
from launch.search.running import Run, points
from launch.seeds.plan import without

#: options of the training that the test gives itself
OWN = ("output", "resume", "optim.learning_rate", "optim.schedule", "optim.min_ratio", "optim.warmup", "optim.decay",
       "optim.power", "train.steps", "train.epochs", "train.log_interval", "train.eval_interval", "train.patience",
       "train.save_interval", "monitor.tensorboard", "fault.non_finite", "fault.spike")  # fmt: skip
RATES, STEPS = (1e-7, 1.0), 200
#: losses whose mean is looked at while the run goes on, and how many times the lowest of these means is an explosion
WINDOW, EXPLOSION = 5, 4.0
#: standard deviation of the weights by which the loss is smoothed, as a share of the steps
WIDTH = 0.02
#: fall of the smoothed loss below which chance may be its reason, in standard errors
CLEAR = 4.0
FEWEST = 20
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Found:
    """What a range test tells; rates are learning rates."""

    rates: list[float]
    """that the run had, [N]"""
    losses: list[float]
    """of the global batch of each step, [N]"""
    smoothed: list[float]
    """[N]"""
    lowest: float
    """rate where the smoothed loss is lowest"""
    steepest: float
    """rate where it falls most steeply over the logarithm of the rate"""
    suggestion: float | None
    """a tenth of `lowest`; None where the loss has not clearly fallen"""
    ended: str
    """why the run ended"""
    notes: list[str]


def find_rate(
    training: Sequence[str], rates: Sequence[float] | None, steps: int | None, launcher: Sequence[str]
) -> int:
    """Run the test, write lr_finder/report.json and lr_finder.png, and print what they tell.

    Args:
        training: options of the training.
        rates: the lowest and the highest; None: `RATES`.
        steps: None: `STEPS`.
        launcher: what starts a run.

    Raises:
        UserError: an option that is wrong, or a test that the folder holds already.
        RunError: the run failed.
    """
    low, high = RATES if rates is None else rates
    count = STEPS if steps is None else steps
    if not 0.0 < low < high < math.inf:
        raise UserError(f"lr-range: {low:g} {high:g} is not allowed; give the lowest rate, above 0, and a higher one")
    if count < FEWEST:
        raise UserError(f"lr-steps: {count} is not allowed; give at least {FEWEST}")
    folder = Path(parse(list(training)).output) / "lr_finder"
    if folder.exists():
        raise UserError(f"output: {folder} holds a range test already; remove it, or give another --output")
    options = range_options(training, folder / "run", low, high, count)
    parse(options)
    try:
        curve, ended = measure(folder / "run", options, launcher, count)
    except UserError:  # the test has not begun, and can be made once that is mended
        shutil.rmtree(folder)
        raise
    found = read(*curve, ended, count)
    write_atomically(folder / "report.json", json.dumps(asdict(found), indent=1) + "\n")
    write_atomically(folder / "lr_finder.png", picture(found))
    print(f"{render(found)}\nreport    {folder}", flush=True)
    return 0


def range_options(training: Sequence[str], output: Path, low: float, high: float, steps: int) -> list[str]:
    """The options of the run: those of the training, with a rate that grows from `low` to `high`."""
    return [
        *without(training, [f"--{name}" for name in OWN]),
        f"--output={output}", "--resume=never", f"--optim.learning_rate={high!r}", "--optim.schedule=range_test",
        f"--optim.min_ratio={low / high!r}", "--optim.warmup=0", f"--train.steps={steps}", "--train.log_interval=1",
        "--train.eval_interval=0", "--train.patience=null", "--train.save_interval=null", "--monitor.tensorboard=true",
        "--fault.non_finite=stop", "--fault.spike=ignore",
    ]  # fmt: skip


def measure(
    output: Path, options: Sequence[str], launcher: Sequence[str], steps: int
) -> tuple[tuple[list[float], list[float]], str]:
    """Make the run until its end, or until its loss explodes: rates and losses, and why it ended.

    Raises:
        UserError: the run refuses its options or data.
        RunError: it failed before there was anything to tell.
    """
    run = Run(output, options, launcher)
    try:
        by_itself = run.watch(lambda: not explodes([loss for _, loss in points(output, "train/loss")]), kill=True)
    except BaseException:
        run.kill()
        raise
    rates, losses = (dict(points(output, f"train/{name}")) for name in ("learning_rate", "loss"))
    taken = sorted(rates.keys() & losses.keys())
    ended = f"after {steps} steps" if by_itself else f"the loss exploded at a rate of {rates[taken[-1]]:.2g}"
    if by_itself and run.code:
        if run.code == 2 or len(taken) < FEWEST:
            message = run.last_words().removeprefix("error: ")
            raise UserError(message) if run.code == 2 else RunError(f"lr-finder: {message} (see {run.log})")
        ended = f"the run stopped: {run.last_words()}"
    return ([rates[step] for step in taken], [losses[step] for step in taken]), ended


def explodes(losses: Sequence[float]) -> bool:
    """Whether the last losses are far above the lowest, or one is no number."""
    if len(losses) < FEWEST:
        return False
    means = np.convolve(losses, np.full(WINDOW, 1.0 / WINDOW), mode="valid")
    return not bool(np.isfinite(means).all()) or bool(means[-1] > EXPLOSION * means.min())


def read(rates: Sequence[float], losses: Sequence[float], ended: str, steps: int) -> Found:
    """What the losses at the rates tell.

    Args:
        steps: that the whole range has.
    """
    finite = [place for place, loss in enumerate(losses) if math.isfinite(loss)]
    x, y = np.asarray(rates, dtype=np.float64)[finite], np.asarray(losses, dtype=np.float64)[finite]
    curve, share = smooth(y, max(1.0, WIDTH * steps))
    best = int(curve.argmin())
    slopes = np.gradient(curve, np.log10(x))[: best + 1]
    steep = int(slopes.argmin())
    error = float((y - curve)[: best + 1].std()) * math.sqrt(share)
    fallen = curve[0] - curve[best] > CLEAR * error
    notes = []
    if not fallen:
        notes.append("the loss has not clearly fallen at any rate, so no rate is suggested; take more --lr-steps")
    elif best >= len(y) - max(2, round(WIDTH * steps)) and len(y) == steps:
        notes.append("the loss was lowest at the end of the range; raise the highest rate of --lr-range")
    suggestion = max(float(x[best]) / 10.0, float(x[0])) if fallen else None
    return Found(
        x.tolist(), y.tolist(), curve.tolist(), float(x[best]), float(x[steep]), suggestion, ended, notes
    )  # fmt: skip


def smooth(values: Numbers, width: float) -> tuple[Numbers, float]:
    """Means weighted by a Gaussian around each place, which moves no minimum to the right as a running mean does.

    Args:
        values: [N].
        width: its standard deviation, in steps.

    Returns:
        The means [N], and the variance of one of them as a share of that of a value.
    """
    places = np.arange(len(values))
    weights = np.exp(-0.5 * ((places[:, None] - places) / width) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    means: Numbers = weights @ values
    return means, float((weights[len(values) // 2] ** 2).sum())


def render(found: Found) -> str:
    """What is found, in words."""
    lines = [
        f"{len(found.rates)} steps from a rate of {found.rates[0]:.2g} to {found.rates[-1]:.2g}; ended: {found.ended}",
        f"loss      {found.smoothed[0]:.4f} at first, lowest {min(found.smoothed):.4f} at {found.lowest:.2g}, steepest "
        f"at {found.steepest:.2g}",
    ]
    if found.suggestion is not None:
        lines.append(f"suggested --optim.learning_rate {found.suggestion:.2g}, a tenth of the rate of the lowest loss")
    return "\n".join([*lines, *(f"note: {note}" for note in found.notes)])


def picture(found: Found) -> bytes:
    """A PNG of the loss over the rate, with the rates that it suggests."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(found.rates, found.losses, color="0.8", linewidth=0.8, label="loss of a step")
    axes.plot(found.rates, found.smoothed, color="tab:blue", label="smoothed")
    marks = {"lowest": (found.lowest, "0.4"), "steepest": (found.steepest, "tab:orange")}
    if found.suggestion is not None:
        marks["suggested"] = (found.suggestion, "tab:green")
    for name, (rate, colour) in marks.items():
        axes.axvline(rate, color=colour, linestyle="--", linewidth=1, label=f"{name}, {rate:.2g}")
    lowest, highest = min(found.smoothed), max(found.smoothed[0], min(found.smoothed))
    room = max(highest - lowest, 1e-6)
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", ylim=(lowest - 0.3 * room, highest + room))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    written = io.BytesIO()
    canvas.print_png(written)
    return written.getvalue()
