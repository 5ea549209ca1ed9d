"""What the tests of emergence find where the truth is known, and what two-step predictions are worth on public ladders.

    python -m benchmarks.emergence                        # all
    python -m benchmarks.emergence --only planted olmo    # some; --repeats 50 for a short look

- false_positives: the share of smooth laws, of checkpoints of one run and of noise in which a change is found at 5 %.
- planted: the share of planted jumps that are found beside the power that is told, and verdicts on exact match (p^20 of
  a per-token p that grows evenly), on noise and on a jump under both metrics.
- olmo: two-step predictions of the held-out 7B and 13B for each task, from the 25 smaller runs.
- olmo_verdicts: verdicts on each task, accuracy against bits per byte, along compute and along loss.
- overtraining: the mean of 17 accuracies of the held-out 1B and 7B, for each training set.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import ROOT
from engine.scaling.emergence.abilities import Ability, Metric, accuracy
from engine.scaling.emergence.change import Measurement, compare, find_change, p_change, source
from engine.scaling.emergence.curves import Bounds
from engine.scaling.emergence.noise import Scatter
from engine.scaling.emergence.shapes import shape
from engine.scaling.emergence.two_step import LINKS, two_step
from engine.scaling.emergence.verdict import verdicts
from engine.scaling.fit import Interval
from engine.scaling.points import Points, read_points
from engine.scaling.terms import LAWS, Array

DATA = ROOT.parent / "shared" / "data"
SIZES, SEEDS, ITEMS = 8, 2, 1000
UNIT = (0.0, 1.0)
#: resamples where only the level of 5 % is looked at, and of verdicts: p of 2 in 40 and 5 in 100 are reached
FEW, RESAMPLES, LEVEL = 39, 99, 0.05


def ladder(sizes: int, seeds: int) -> Array:
    """Places of a ladder, 0 to 1."""
    return np.repeat(np.linspace(0.0, 1.0, sizes), seeds)


def measurement(place: Array, means: Array, random: np.random.Generator, noise: float | None) -> Measurement:
    """Scores around means: of `ITEMS` answers, or with a normal scatter."""
    runs = np.arange(len(place))
    if noise is None:
        scores = random.binomial(ITEMS, means) / ITEMS
        return Measurement(18 + 4 * place, scores, Scatter(runs, ITEMS, *UNIT), Bounds(UNIT, UNIT))
    return Measurement(18 + 4 * place, means + noise * random.standard_normal(len(place)), Scatter(runs), Bounds())


SMOOTH: Mapping[str, tuple[Callable[[Array], Array], float | None]] = {
    "logistic over half the range, the least smooth; binomial": (
        lambda place: 0.1 + 0.6 * shape("logistic", 0.5, 0.5, place), None,
    ),
    "power law to a ceiling, binomial": (lambda place: 0.8 - 0.6 * np.exp(-2.0 * place), None),
    "straight line, normal": (lambda place: 0.2 + 0.5 * place, 0.02),
    "noise around a constant, normal": (lambda place: 0.25 + 0.0 * place, 0.02),
}  # fmt: skip


def false_positives(repeats: int, _: int) -> Iterator[str]:
    place = ladder(SIZES, SEEDS)
    for name, (law, noise) in SMOOTH.items():
        means = np.broadcast_to(law(place), (repeats, len(place)))
        yield f"{name}: {_rate(_found(place, means, noise))}"
    place = ladder(24, 1)
    means, scatter = 0.1 + 0.6 * shape("logistic", 0.5, 0.8, place), Scatter(np.zeros(24, np.intp))
    drawn = scatter.draw(means, 0.02**2, 0.5, max(4, repeats // 5), np.random.default_rng(0))
    found = [
        _p(Measurement(18 + 4 * place, scores, scatter, Bounds()), seed) <= LEVEL for seed, scores in enumerate(drawn)
    ]
    yield f"checkpoints of one run, neighbours correlated by 0.5: {_rate(np.array(found))}"


def _p(measured: Measurement, seed: int) -> float:
    """p of a change, without its threshold and power."""
    found = compare(measured, measured.scores[None])
    return p_change(found, source(measured, found, np.random.default_rng([seed, 1])), FEW)


def _found(place: Array, means: Array, noise: float | None) -> NDArray[np.bool_]:
    """Whether a change is found in scores around each of the means [r, n], all repeats at once."""
    random = np.random.default_rng(0)
    parts = []
    for part in np.array_split(means, max(1, len(means) // 50)):
        measured = measurement(place, part[0], random, noise)
        scatter = measured.scatter
        scores = scatter.draw(part, 1.0 if noise is None else noise**2, 0.0, len(part), random)
        found = compare(measured, scores)
        centres, dispersion = (
            np.repeat(each, FEW, axis=0) for each in (found.smooth.at(place), found.dispersion[:, None])
        )
        drawn = compare(measured, scatter.draw(centres, dispersion, 0.0, len(centres), random)).ahead
        parts.append((drawn.reshape(-1, FEW) >= found.ahead[:, None]).sum(axis=1))
    return np.asarray((1 + np.concatenate(parts)) / (1 + FEW) <= LEVEL)


def _rate(found: NDArray[np.bool_]) -> str:
    share_ = float(np.mean(found))
    return f"{share_:.3f} +- {np.sqrt(share_ * (1 - share_) / len(found)):.3f} of {len(found)}"


def planted(repeats: int, _: int) -> Iterator[str]:
    for sizes, seeds in ((5, 1), (5, 3)):
        for noise, height in ((None, 0.1), (0.02, 0.1)):
            yield f"{sizes} sizes x {seeds}, {'binomial' if noise is None else 'normal 0.02'}, jump of {height}: " + (
                _jumps(sizes, seeds, noise, height, repeats)
            )
    yield from _verdicts(max(4, repeats // 10))


def _jumps(sizes: int, seeds: int, noise: float | None, height: float, repeats: int) -> str:
    place = ladder(sizes, seeds)
    places = np.unique(place)
    gaps = (places[1:-1] + places[2:]) / 2
    means = np.stack([0.25 + height * shape("step", gaps[each % len(gaps)], 1.0, place) for each in range(repeats)])
    told = []
    for seed in range(max(1, repeats // 50)):
        measured = measurement(place, means[seed], np.random.default_rng(seed), noise)
        told.append(find_change(measured, height=height, resamples=399, seed=seed).power)
    return f"found {_rate(_found(place, means, noise))}, told {np.mean(told):.2f}"


def study(scores: Mapping[str, Array], sizes: int, seeds: int) -> Points:
    """Points of a made-up ladder with further columns."""
    place = ladder(sizes, seeds)
    names = tuple(f"run {index}" for index in range(len(place)))
    columns = {name: tuple(str(value) for value in values) for name, values in scores.items()}
    flops, parameters = 10.0 ** (18 + 4 * place), 10.0 ** (7 + 2 * place)
    return Points(names, parameters, flops / 6 / parameters, 4.0 - 2.0 * place, flops, names, columns)


def _verdicts(repeats: int) -> Iterator[str]:
    place = ladder(SIZES, SEEDS)
    even, jump, flat = 0.2 + 0.79 * place, np.where(place > 0.6, 0.8, 0.3), np.full(len(place), 0.3)
    cases = {"p^20 of an even p": (even**20, even), "a jump in both": (jump, jump), "noise": (flat, flat)}
    ability = Ability("it", accuracy("exact", ITEMS), Metric("p"))
    for name, (right, probability) in cases.items():
        kinds: Counter[str] = Counter()
        for seed in range(repeats):
            random = np.random.default_rng(seed)
            scores = {
                "exact": random.binomial(ITEMS, right) / ITEMS,
                "p": probability + 0.01 * random.standard_normal(len(place)),
            }
            (verdict,) = verdicts(study(scores, SIZES, SEEDS), [ability], resamples=RESAMPLES, seed=seed)
            kinds[verdict.kind] += 1
        yield f"verdicts on {name}: " + ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())


def _olmo(task: str | None = None) -> Points:
    loss = "loss_c4_en" if task is None else f"bpb_{task}"
    return read_points(DATA / "olmo_ladder" / "points.csv", {"parameters": "params", "loss": loss})


def _tasks(points: Points) -> list[str]:
    """Tasks that have an accuracy."""
    names = [name.removeprefix("acc_") for name in points.columns if name.startswith("acc_")]
    return [name for name in names if np.isfinite(points.numbers(f"acc_{name}")).all()]


def olmo(_: int, resamples: int) -> Iterator[str]:
    for link in LINKS:
        errors, covered = [], []
        for task in _tasks(_olmo()):
            points = _olmo(task)
            large = np.array([model in ("7B", "13B") for model in points.columns["model"]])
            metric, targets = accuracy(f"acc_{task}"), points.take(large)
            fitted = two_step(points.take(~large), metric, LAWS["size_and_data"], link=link, resamples=resamples)
            reached = zip(targets.columns["model"], targets.numbers(metric.column), targets.losses, strict=True)
            told = zip(reached, fitted.predict(targets), fitted.law.predict(targets), strict=True)
            for (name, score, loss), predicted, bits in told:
                errors.append(predicted.value - score)
                covered.append(predicted.holds(score))
                yield (
                    f"{link}, {task}, {name}: bits per byte {bits}, reached {loss:.4f}, {_covered(bits, loss)}; "
                    f"accuracy {predicted}, reached {score:.4f}, off {errors[-1]:+.4f}, {_covered(predicted, score)}"
                )
        yield (
            f"{link}: mean size of the errors {np.mean(np.abs(errors)):.4f}, "
            f"{sum(covered)} of {len(covered)} covered by 90 % intervals"
        )


def _covered(predicted: Interval, reached: float) -> str:
    return "covered" if predicted.holds(reached) else "not covered"


def olmo_verdicts(_: int, resamples: int) -> Iterator[str]:
    points = _olmo()
    abilities = [Ability(task, accuracy(f"acc_{task}"), Metric(f"bpb_{task}", least=0.0)) for task in _tasks(points)]
    for axis in ("compute", "loss"):
        for verdict in verdicts(points, abilities, axis=axis, resamples=resamples):
            yield f"{axis}: {verdict}"


def overtraining(_: int, resamples: int) -> Iterator[str]:
    path = DATA / "overtraining_ladder" / "points.csv"
    columns = {"parameters": "params", "loss": "loss_c4_val"}
    metric = accuracy("mean of accuracies")
    for train_set in sorted(set(read_points(path, columns).columns["train_set"])):
        points = read_points(path, columns, {"train_set": train_set})
        scores = np.mean([points.numbers(name) for name in points.columns if name.startswith("acc_")], axis=0)
        large = np.array([name.split("-")[1].startswith("open_lm") for name in points.names])
        small, targets = points.take(~large), points.take(large)
        for link in LINKS:
            law = LAWS["equal_exponents"]
            fitted = two_step(small, metric, law, scores=scores[~large], link=link, resamples=resamples)
            for name, predicted, true in zip(targets.names, fitted.predict(targets), scores[large], strict=True):
                yield (
                    f"{link}, {name}: predicted {predicted}, reached {true:.4f}, relative error "
                    f"{(predicted.value - true) / true:+.2%}, {_covered(predicted, true)}"
                )


PARTS = (false_positives, planted, olmo, olmo_verdicts, overtraining)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[part.__name__ for part in PARTS])
    parser.add_argument("--repeats", type=int, default=500, help="of planted truths")
    parser.add_argument("--resamples", type=int, default=999, help="of real data")
    arguments = parser.parse_args()
    for part in PARTS:
        if arguments.only is None or part.__name__ in arguments.only:
            print(f"## {part.__name__}", flush=True)
            for line in part(arguments.repeats, arguments.resamples):
                print(line, flush=True)


if __name__ == "__main__":
    main()
