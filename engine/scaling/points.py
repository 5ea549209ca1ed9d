"""Points of a study of scale: what was trained, and the loss that it reached.

A point is the end of a run. Runs that share their beginning (several token budgets branched from one trunk, or
checkpoints of one run) aren't independent; they share a `run`, and intervals draw whole runs.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.errors import UserError
from engine.scaling.terms import Array

#: fields of a point that a column can give; the first three must be had
REQUIRED = ("parameters", "tokens", "loss")
OPTIONAL = ("name", "run", "flops", "loss_error")
#: FLOPs of a parameter and token where none are given (Kaplan et al. 2020: forward and backward pass of the matrices)
FLOPS_PER_PARAMETER_TOKEN = 6.0
#: losses above are not nats per token: that of 2^29 equally likely words
MOST_LOSS = 20.0
#: FLOPs of a parameter and token, in the median, that no way of counting either of them gives
LEAST_RATIO, MOST_RATIO = 0.1, 1e5


@dataclass(frozen=True)
class Points:
    """n points, arrays of length n."""

    names: tuple[str, ...]
    parameters: Array
    tokens: Array
    losses: Array
    """nats per token"""
    flops: Array
    runs: tuple[str, ...]
    """of each point, the run that it is of"""
    columns: Mapping[str, tuple[str, ...]]
    """what else the file tells of each point, as it is written there"""
    error_column: str | None = None
    """that of the losses' standard errors"""

    def __len__(self) -> int:
        return len(self.names)

    def take(self, which: NDArray[np.intp] | NDArray[np.bool_]) -> Points:
        """The points of these indices, or those that are true."""
        chosen = np.arange(len(self))[which]
        return replace(
            self,
            names=tuple(self.names[index] for index in chosen),
            parameters=self.parameters[chosen],
            tokens=self.tokens[chosen],
            losses=self.losses[chosen],
            flops=self.flops[chosen],
            runs=tuple(self.runs[index] for index in chosen),
            columns={name: tuple(values[index] for index in chosen) for name, values in self.columns.items()},
        )

    @cached_property
    def run_of(self) -> NDArray[np.intp]:
        """The number of each point's run."""
        return np.unique(np.array(self.runs), return_inverse=True)[1]

    @property
    def errors(self) -> Array:
        """Standard errors of the losses, NaN where there is none."""
        return np.full(len(self), np.nan) if self.error_column is None else self.numbers(self.error_column)

    def numbers(self, column: str) -> Array:
        """A further column as numbers, NaN where it is empty.

        Raises:
            UserError: no such column, or one that holds something else.
        """
        if column not in self.columns:
            raise UserError(f"column: {column!r} is not in the points; they have {', '.join(self.columns)}")
        return np.array(
            [_number(text, column, name) for text, name in zip(self.columns[column], self.names, strict=True)]
        )


def read_points(path: Path, columns: Mapping[str, str] | None = None, where: Mapping[str, str] | None = None) -> Points:
    """Points of a CSV file with a header.

    Args:
        columns: the file's name of a field (`REQUIRED`, `OPTIONAL`) where it is another.
        where: rows to take: a column of the file and the value that it has.

    Raises:
        UserError: no such file or column; a value that isn't a positive number, or that can't be what it is called;
            points that are there twice.
    """
    names = {field: field for field in (*REQUIRED, *OPTIONAL)}
    if loss := (columns or {}).get("loss"):  # the error of another loss isn't its own
        names["loss_error"] = loss.replace("loss", "loss_error", 1) if "loss" in loss else f"{loss}_error"
    names |= dict(columns or {})
    unknown = [field for field in names if field not in (*REQUIRED, *OPTIONAL)]
    if unknown:
        raise UserError(f"columns: {unknown[0]!r} is no field; give {', '.join((*REQUIRED, *OPTIONAL))}")
    records = _records(path)
    have = list(records[0][1])
    for field, column in names.items():
        if column not in have and (field in REQUIRED or field in (columns or {})):
            raise UserError(f"columns: {path} has no column {column!r} for {field}; it has {', '.join(have)}")
    for column, value in (where or {}).items():
        if column not in have:
            raise UserError(f"where: {path} has no column {column!r}; it has {', '.join(have)}")
        if not any(record[column] == value for _, record in records):
            seen = ", ".join(sorted({record[column] for _, record in records})[:8])
            raise UserError(f"where: no row of {path} has {column}={value!r}; there are {seen}")
        records = [(row, record) for row, record in records if record[column] == value]
    return _points(records, names, path)


def _records(path: Path) -> list[tuple[int, dict[str, str]]]:
    """The file's rows with their numbers; the header is row 1."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            records = list(enumerate(reader, start=2))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"points: {path} cannot be read as CSV ({error}); give a file with a header") from error
    if not records:
        raise UserError(f"points: {path} has no rows below its header; give the file of a study")
    for name, count in Counter(reader.fieldnames or ()).items():
        if count > 1:
            raise UserError(f"points: {path} has {count} columns {name!r}; rename all but one")
    for row, record in records:
        if None in record or None in record.values():
            raise UserError(f"points: row {row} of {path} has not as many fields as the header; mend it")
    return records


def _points(numbered: Sequence[tuple[int, Mapping[str, str]]], names: Mapping[str, str], path: Path) -> Points:
    def column(field: str) -> Array:
        return np.array([_positive(record[names[field]], names[field], path, row) for row, record in numbered])

    records = [record for _, record in numbered]
    parameters, tokens, losses = (column(field) for field in REQUIRED)
    _refuse_units(parameters, tokens, losses, names, path)
    has = {field for field in OPTIONAL if names[field] in records[0]}
    labels = tuple(record[names["name"]] if "name" in has else f"row {row}" for row, record in numbered)
    flops = column("flops") if "flops" in has else FLOPS_PER_PARAMETER_TOKEN * parameters * tokens
    runs = labels
    if "run" in has:  # a point without one is of no other's run
        runs = tuple(record[names["run"]] or label for record, label in zip(records, labels, strict=True))
    if "name" not in has and "run" not in has:
        runs = tuple(str(row) for row, _ in numbered)
    _refuse_other_flops(flops / parameters / tokens, names["flops"], path)
    further = {name: tuple(record[name] for record in records) for name in records[0]}
    _refuse_twice(list(zip(runs, parameters, tokens, losses, strict=True)), labels, path)
    error_column = names["loss_error"] if "loss_error" in has else None
    points = Points(labels, parameters, tokens, losses, flops, runs, further, error_column)
    _refuse_negative(points.errors, error_column, path)
    return points


def _number(text: str, column: str, place: str) -> float:
    if not text.strip():
        return math.nan
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"column: {column!r} of {place} is {text!r}, which is not a number; correct it") from error


def _positive(text: str, column: str, path: Path, row: int) -> float:
    value = _number(text, column, f"row {row} of {path}")
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"points: {column} in row {row} of {path} is {text!r}; give a positive number or leave it out")
    return value


def _refuse_units(parameters: Array, tokens: Array, losses: Array, names: Mapping[str, str], path: Path) -> None:
    """Refuse numbers in other units, which would be fitted without a word.

    Raises:
        UserError: parameters or tokens in millions or billions, or losses that aren't nats per token.
    """
    for field, values in (("parameters", parameters), ("tokens", tokens)):
        if values.max() < 1e4:
            raise UserError(
                f"points: {names[field]} of {path} are at most {values.max():g}, which looks like millions; "
                "give plain numbers"
            )
    if losses.max() > MOST_LOSS:
        raise UserError(
            f"points: {names['loss']} of {path} reaches {losses.max():g}, which is not nats per token; "
            "give losses, not perplexities"
        )


def _refuse_negative(errors: Array, column: str | None, path: Path) -> None:
    """Raises: UserError: standard errors below nothing."""
    if (errors < 0).any():
        raise UserError(f"points: {column} of {path} has {errors[errors < 0][0]:g}; give standard errors of 0 or more")


def _refuse_other_flops(ratios: Array, column: str, path: Path) -> None:
    """
    Raises:
        UserError: compute in another unit than FLOPs, which N and D of a budget would follow from.
    """
    ratio = float(np.median(ratios))
    if not LEAST_RATIO <= ratio <= MOST_RATIO:
        raise UserError(
            f"points: {column} of {path} has {ratio:.3g} a parameter and token, which isn't FLOPs (6 are usual); give "
            "plain FLOPs of the whole run, or rename the column"
        )


def _refuse_twice(keys: Sequence[tuple[object, ...]], labels: Sequence[str], path: Path) -> None:
    doubled = [key for key, count in Counter(keys).items() if count > 1]
    if doubled:
        same = [label for key, label in zip(keys, labels, strict=True) if key == doubled[0]]
        raise UserError(f"points: {path} has {same[0]} twice ({same[1]}), with the same loss; leave one out")
