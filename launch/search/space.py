"""The space of a search: which fields of a training are tried, and over which values.

optim.learning_rate: {low: 1e-5, high: 1e-3, log: true}
train.epochs: {low: 2, high: 10, step: 1}
labelled.label_smoothing: [0, 0.05, 0.1]
optim.schedule: [linear, cosine]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from math import floor, isfinite
from pathlib import Path
from typing import Any

from engine.errors import UserError
from launch.configure.recipe import Kind, Reader, field_types, read_nodes

#: fields that the search gives each trial itself
OWN = ("output", "resume", "debug")
SPACE = Kind("space", "optim.learning_rate: [1e-5, 3e-5]", "give a YAML file of fields and their values")
KEYS = ("low", "high", "log", "step")
Value = str | int | float | bool | None


@dataclass(frozen=True)
class Choice:
    """A field that takes one of some values."""

    field: str
    values: tuple[Value, ...]

    @property
    def grid(self) -> tuple[Value, ...] | None:
        """All values."""
        return self.values

    def suggest(self, trial: Any) -> Value:
        """A value for a trial of Optuna's."""
        found: Value = trial.suggest_categorical(self.field, list(self.values))
        return found

    @property
    def extremes(self) -> tuple[Value, ...]:
        """Values whose checks stand for all."""
        return self.values


@dataclass(frozen=True)
class Interval:
    """A field that takes numbers between two bounds, both included."""

    field: str
    low: float
    high: float
    log: bool
    step: float | None
    whole: bool
    """whether the numbers are whole"""

    @property
    def grid(self) -> tuple[Value, ...] | None:
        """All values, where there are finitely many; None otherwise."""
        step = self.step or (1 if self.whole and not self.log else None)
        if step is None:
            return None
        count = floor((self.high - self.low) / step + 1e-9) + 1
        values = [self.low + number * step for number in range(count)]
        return tuple(int(value) if self.whole else value for value in values)

    def suggest(self, trial: Any) -> Value:
        """A value for a trial of Optuna's."""
        if self.whole:
            step = int(self.step or 1)
            number: int = trial.suggest_int(self.field, int(self.low), int(self.high), step=step, log=self.log)
            return number
        value: float = trial.suggest_float(self.field, self.low, self.high, step=self.step, log=self.log)
        return value

    @property
    def extremes(self) -> tuple[Value, ...]:
        """Values whose checks stand for all."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)


Dimension = Choice | Interval


def read_space(path: Path) -> list[Dimension]:
    """The dimensions of a space file.

    Raises:
        UserError: names the file, the field, the value and the remedy.
    """
    values = Reader(str(path), SPACE.field).section(read_nodes(str(path), SPACE), "")
    return [_dimension(path, field, given) for field, given in _flat(values).items()]


def _flat(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names, also where the file nests sections."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        is_field = field_types().get(f"{prefix}{name}", (dict,)) != (dict,)
        nested = isinstance(value, dict) and not is_field and not set(value) <= set(KEYS)
        found |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def _dimension(path: Path, field: str, given: Any) -> Dimension:
    kinds = field_types().get(field)
    if kinds is None or kinds == (dict,):
        raise UserError(f"space: {field} in {path} is no field of a training; zerobert train --help lists them")
    if field in OWN:
        raise UserError(f"space: {field} in {path} is not allowed; the search gives it to each trial itself")
    if isinstance(given, list):
        return _choice(path, field, given)
    if isinstance(given, dict):
        return _interval(path, field, given, kinds)
    raise UserError(f"space: {field}: {given!r} in {path} is not allowed; give a list, or {{low: ..., high: ...}}")


def _choice(path: Path, field: str, given: Sequence[Any]) -> Choice:
    values = tuple(given)
    wrong = next((value for value in values if isinstance(value, (list, dict))), None)
    if wrong is not None:
        raise UserError(f"space: {field}: {wrong!r} in {path} is not allowed; give plain values")
    if len(set(values)) < max(2, len(values)):  # 1 and 1.0 train the same
        raise UserError(f"space: {field}: {list(values)} in {path} is not allowed; give two different values or more")
    return Choice(field, values)


def _interval(path: Path, field: str, given: Mapping[str, Any], kinds: Sequence[type]) -> Interval:
    values = dict(given)

    def refuse(what: str, remedy: str) -> UserError:
        return UserError(f"space: {field}: {what} in {path} is not allowed; {remedy}")

    if not {int, float} & set(kinds):
        raise refuse(str(dict(given)), "the field is no number: give a list of values")
    whole = int in kinds and float not in kinds
    unknown = next((name for name in values if name not in KEYS), None)
    if unknown is not None:
        raise refuse(str(unknown), f"a range has {', '.join(KEYS)}")
    for name in ("low", "high", *({"step"} & values.keys())):
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
            raise refuse(f"{name} {value!r}", "give a finite number")
        if whole and value != int(value):
            raise refuse(f"{name} {value!r}", "the field takes whole numbers")
    log, low, high, step = values.get("log", False), values["low"], values["high"], values.get("step")
    if not isinstance(log, bool):
        raise refuse(f"log {log!r}", "give true or false")
    if low >= high:
        raise refuse(f"low {low!r} with high {high!r}", "the range is empty: low must be below high")
    if log and low <= 0:
        raise refuse(f"log with low {low!r}", "give a low above 0")
    if step is not None and (log or not 0 < step <= high - low):
        raise refuse(f"step {step!r}", "give one above 0 that fits the range, and no log")
    if step is not None and (rest := (Decimal(str(high)) - Decimal(str(low))) % Decimal(str(step))):
        raise refuse(f"high {high!r}", f"no step of {step!r} from {low!r} meets it: give {Decimal(str(high)) - rest}")
    return Interval(field, low, high, log, step, whole)
