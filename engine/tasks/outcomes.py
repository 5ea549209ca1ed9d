"""What a run got on each example that it reports on: `report/outcomes.tsv`, from which two runs can be compared.

A tab-separated row an example, in the order of the file of the examples:

    index   from 0
    true    what is right, as text (or its hash), by which two runs are known to be of the same examples
    ...     the example's share in the run's scores, as numbers; columns that belong together tell a score

    NAME                        NAME is the mean of the column: accuracy (of 0 and 1), exact_match, f1 of an answer
    NAME.tp NAME.fp NAME.fn     NAME is micro F1, 2 TP / (2 TP + FP + FN) of their sums; 0 where all are 0
    pearson.true pearson.predicted, and spearman.true spearman.predicted: a correlation of two columns

Shapes: N examples, K columns of a score, R resamples.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.durable import write_atomically
from engine.errors import UserError

OUTCOMES_FILE = "outcomes.tsv"
#: a classifier's file, which is enough to tell its accuracy; that of numbers has no confidence
PREDICTIONS_FILE = "predictions.tsv"
#: the columns before the scores
FIRST = ("index", "true")
#: characters of what is right above which its hash stands for it
LONGEST = 1000
COUNTS = ("tp", "fp", "fn")
PAIR = ("true", "predicted")
CORRELATIONS = ("pearson", "spearman")

#: resamples of an interval, and drawn examples that are in memory at once
RESAMPLES, AT_ONCE = 2_000, 1 << 21

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Outcomes:
    """What a run got on N examples."""

    truth: tuple[str, ...]
    """what is right of each"""
    scores: dict[str, Numbers]
    """each example's share of a score by its name, [N, K]; K is 1 for a mean, 3 for counts, 2 for a correlation"""

    def __len__(self) -> int:
        return len(self.truth)


def write_outcomes(folder: Path, truth: Sequence[str], scores: Mapping[str, Numbers]) -> None:
    """Write outcomes.tsv, the run's main score first.

    Args:
        folder: of the report; made where it is missing.
        truth: what is right of each example.
        scores: as `Outcomes.scores`; [N] is as [N, 1].
    """
    columns = [np.asarray(values, dtype=np.float64).reshape(len(truth), -1) for values in scores.values()]
    names = [
        name if values.shape[1] == 1 else f"{name}.{part}"
        for name, values in zip(scores, columns, strict=True)
        for part in {1: ("",), 2: PAIR, 3: COUNTS}[values.shape[1]]
    ]
    table = io.StringIO()
    writer = csv.writer(table, delimiter="\t", lineterminator="\n")
    writer.writerow([*FIRST, *names])
    for index, row in enumerate(np.concatenate(columns, axis=1).tolist()):
        writer.writerow([index, _short(truth[index]), *(f"{value:.9g}" for value in row)])
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / OUTCOMES_FILE, table.getvalue())


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"


def read_outcomes(folder: Path) -> Outcomes:
    """What a report tells of single examples: outcomes.tsv, or the accuracy that a classifier's predictions.tsv tells.

    Raises:
        UserError: neither is there, or the file isn't as it was written.
    """
    path = folder / OUTCOMES_FILE
    if not path.is_file():
        path = folder / PREDICTIONS_FILE
        if not (path.is_file() and _is_of_classes(path)):
            raise UserError(f"{folder}: it tells nothing of single examples; it holds no {OUTCOMES_FILE}")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file, delimiter="\t")
        columns = dict(zip(header, zip(*rows, strict=True), strict=True))
        if path.name == PREDICTIONS_FILE:
            pairs = zip(columns["true"], columns["predicted"], strict=True)
            right = np.array([[true == predicted] for true, predicted in pairs], dtype=np.float64)
            return Outcomes(columns["true"], {"accuracy": right})
        numbers = {name: np.array(values, dtype=np.float64) for name, values in columns.items() if name not in FIRST}
        return Outcomes(columns["true"], _joined(numbers))
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise UserError(f"{path}: it is not what a run wrote there ({error}); run its report again") from error


def _is_of_classes(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return "confidence" in file.readline().split()


def _joined(numbers: Mapping[str, Numbers]) -> dict[str, Numbers]:
    """The columns of each score side by side, [N, K]."""
    scores: dict[str, Numbers] = {}
    for column in numbers:
        name, _, part = column.rpartition(".")
        parts = next((parts for parts in (COUNTS, PAIR) if name and part in parts), None)
        if parts is None:
            scores[column] = numbers[column][:, None]
        elif name not in scores:
            scores[name] = np.stack([numbers[f"{name}.{each}"] for each in parts], axis=1)
    return scores


def score_of(name: str, shares: Numbers) -> Numbers:
    """A score of examples, from their shares [..., N, K]; NaN for a correlation of a constant."""
    if shares.shape[-1] == 1:
        mean: Numbers = shares[..., 0].mean(axis=-1)
        return mean
    if shares.shape[-1] == len(COUNTS):
        right, wrong, missed = np.moveaxis(shares.sum(axis=-2), -1, 0)
        found: Numbers = 2.0 * right / np.maximum(2.0 * right + wrong + missed, 1e-300)
        return found
    if name == "spearman":
        from scipy.stats import rankdata

        shares = rankdata(shares, axis=-2)
    centred = shares - shares.mean(axis=-2, keepdims=True)
    covariance = (centred[..., 0] * centred[..., 1]).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation: Numbers = covariance / np.sqrt((centred**2).sum(axis=-2).prod(axis=-1))
    return correlation


def interval(name: str, shares: Numbers) -> tuple[float, float]:
    """The 95 % interval of a score, by the percentile bootstrap over examples (Efron 1979); the same in every call.

    Args:
        name: of the score.
        shares: of the examples, [N, K], as `Outcomes.scores`.
    """
    generator, count = np.random.default_rng(RESAMPLES), len(shares)
    size = max(1, AT_ONCE // count)
    drawn = (
        generator.integers(count, size=(min(size, RESAMPLES - start), count)) for start in range(0, RESAMPLES, size)
    )
    found = np.concatenate([score_of(name, shares[each]) for each in drawn])
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
