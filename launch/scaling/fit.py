"""`zerobert scaling fit`: laws of the loss from points, with intervals, and what they tell of larger runs."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import engine
from engine.durable import sha256_of, write_atomically
from engine.errors import UserError
from engine.scaling.fit import Interval
from engine.scaling.record import as_record
from launch.cli import CommandParser, check_output
from launch.scaling.blocks import as_markdown
from launch.scaling.study import IDENTITY, Study, add_options, check, points_of, study
from launch.scaling.told import sections
from launch.seeds.report import without_nan

DESCRIPTION = """Laws of the loss over size and data, fitted to the points of a ladder, with intervals.

  zerobert scaling fit runs/ladder/points.csv --compute 1e19 1e20 --output fit
  zerobert scaling fit theirs.csv --columns parameters=params,loss=loss_c4 --where train_set=c4 --hold-out-largest 2
  zerobert scaling fit runs/ladder/points.csv --predict 5.5e8:1e10

The file has a row a finished run, with the columns parameters, tokens and loss (nats per token), and may have name,
run (rows of one run aren't independent) and flops. The law that predicts larger runs best is used. --output writes
fit.json, which zerobert plan --compute FLOPS --laws FIT.JSON reads.
"""


def build_parser() -> CommandParser:
    """The parser of the verb."""
    parser = CommandParser(prog="zerobert scaling fit", description=DESCRIPTION)
    parser.add_argument("points", type=str, help="a CSV file of points")
    add_options(parser)
    parser.add_argument("--output", type=str | None, default=None, help="folder to write fit.json to")
    return parser


def main(arguments: list[str]) -> int:
    """Fit, tell, and write what was asked for."""
    options = build_parser().parse_args(arguments)
    check(options)
    if options.output is not None:
        check_output(options.output)
    path = Path(options.points)
    points = points_of(path, options)
    folder = None if options.output is None else made(Path(options.output))
    found = study(points, options)
    print(as_markdown(f"{found.fit.law.name} of {path.name}", list(sections(found))))
    if folder is not None:
        write_fit(folder, found, path, options)
        print(f"written: {folder / 'fit.json'}")
    return 0


def made(folder: Path) -> Path:
    """A folder that can be written.

    Raises:
        UserError: it can't.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(f"output: {str(folder)!r} can't be written ({error.strerror}); give another folder") from error
    return folder


def write_fit(folder: Path, found: Study, path: Path, options: Any) -> None:
    """Write fit.json: the fit, what was read off it, and where it comes from."""
    names = ("columns", "where", "law", "hold_out_largest", "compute", "predict", "resamples", "seed")
    record = {
        **as_record(found.fit),
        "intervals": {name: _ends(each) for name, each in found.fit.parameters().items()},
        "size_over_compute": found.growth and _ends(found.growth),
        "ranking": [
            {"law": each.law.name, "error": each.error, "residual": each.residual} for each in found.candidates
        ],
        "held_out": [
            {"name": each.name, "predicted": _ends(each.predicted), "reached": each.reached, "covered": each.covered}
            for each in found.held
        ],
        "optima": [
            {
                "flops": each.flops, "parameters": _ends(each.parameters), "tokens": _ends(each.tokens),
                "loss": _ends(each.loss), "warnings": list(each.warnings),
            }
            for each in found.optima
        ],
        "predicted": [
            {"parameters": each.parameters, "tokens": each.tokens, "loss": _ends(each.loss)} for each in found.predicted
        ],
        "warnings": [*found.fit.warnings(), *found.notes],
        "identity": {name: found.points.columns[name][0] for name in IDENTITY if name in found.points.columns},
        "source": {"file": path.name, "sha256": sha256_of(path)},
        "options": {name: getattr(options, name) for name in names},
        "version": engine.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    write_atomically(folder / "fit.json", json.dumps(without_nan(record), indent=1, ensure_ascii=False) + "\n")


def _ends(interval: Interval) -> list[float]:
    return [interval.value, interval.low, interval.high]
