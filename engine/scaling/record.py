"""A fit as JSON: all that predictions, intervals and optima of later need, without fitting again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.errors import UserError
from engine.scaling.fit import Fit
from engine.scaling.points import Points
from engine.scaling.terms import LAWS

#: of the fields that `as_record` writes
FORMAT = 1
#: fields of points that a law is fitted to and read with
_ARRAYS = ("parameters", "tokens", "losses", "flops")


def as_record(fit: Fit) -> dict[str, Any]:
    """A fit as plain values; `from_record` reads them back."""
    points = fit.points
    return {
        "format": FORMAT,
        "law": fit.law.name,
        "formula": fit.law.formula,
        "fields": list(fit.law.fields),
        "theta": fit.theta.tolist(),
        "samples": fit.samples.tolist(),
        "value": fit.value,
        "level": fit.level,
        "disagreement": fit.disagreement,
        "points": {
            "names": list(points.names),
            "runs": list(points.runs),
            **{name: getattr(points, name).tolist() for name in _ARRAYS},
        },
    }


def from_record(record: Mapping[str, Any]) -> Fit:
    """The fit that `as_record` wrote.

    Raises:
        UserError: what is no such record, or of another version.
    """
    try:
        if record["format"] != FORMAT:
            raise UserError(f"laws: format {record['format']!r} isn't {FORMAT}; write it again by zerobert scaling fit")
        law, given = LAWS[record["law"]], record["points"]
        arrays = {name: np.array(given[name], dtype=np.float64) for name in _ARRAYS}
        theta, samples = (np.array(record[name], dtype=np.float64) for name in ("theta", "samples"))
        names, runs = tuple(map(str, given["names"])), tuple(map(str, given["runs"]))
        shapes = {
            theta.shape == samples.shape[1:] == (len(law.fields),),
            *(len(each) == len(names) for each in arrays.values()),
        }
        if (
            shapes != {True}
            or len(runs) != len(names)
            or not len(samples)
            or not all(np.isfinite(each).all() for each in (theta, *arrays.values()))
        ):
            raise ValueError("its numbers don't belong together")
        value, level, apart = (float(record[name]) for name in ("value", "level", "disagreement"))
        if not 0.0 < level < 1.0:
            raise ValueError(f"level {level:g}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"laws: not a fit ({error!r}); give the fit.json of zerobert scaling fit") from error
    points = Points(names=names, runs=runs, columns={}, error_column=None, **arrays)
    return Fit(law, points, theta, value, samples, level, apart)
