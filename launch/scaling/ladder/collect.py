"""`zerobert scaling collect`: the finished runs of a ladder, or a run's checkpoints, as points.csv and points.json.

A point is measured once and kept beside its export, or in <run>/points for a checkpoint, with what was asked of it.
"""

from __future__ import annotations

import csv
import io
import json
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import engine
from engine.config import DataConfig, RunConfig, require
from engine.data.store.manifest import read_manifest
from engine.durable import write_atomically
from engine.errors import UserError
from engine.scaling.probes.request import LabelledProbe, Request
from launch.cli import CommandParser
from launch.configure.options import parse
from launch.scaling.fit import made
from launch.scaling.ladder.cells import read_record
from launch.scaling.ladder.finetuned import scores_of
from launch.seeds.plan import is_finished
from launch.slurm.status import clock

DESCRIPTION = """Measure the finished runs of a ladder: losses on held-out text, parameters, FLOPs, abilities.

  zerobert scaling collect runs/ladder                    runs/ladder/points.csv and points.json
  zerobert scaling collect runs/ladder/modernbert-mlm/h64-l3/seed-1/20x --held-out wiki=store --output along
                                                          the checkpoints of one run (train.save_at, train.keep)

A point has its parameters counted three ways, the tokens that it saw, exact FLOPs with attention and heads, the loss on
each held-out set with 15 % of the tokens masked, the same ones for all, its standard error, and abilities: held-out
words that are frequent or rare, minimal pairs of grammar, BLiMP's files, classifiers of frozen vectors. What was
measured already isn't measured again. zerobert scaling fit and report read the points.
"""
POINT = "point.json"


@dataclass(frozen=True)
class Measured:
    """A model to measure."""

    name: str
    run: Path
    step: int
    checkpoint: Path | None
    """None: the run's export"""
    columns: Mapping[str, Any]
    """what the ladder says of it"""

    @property
    def kept(self) -> Path:
        """The file of its point."""
        if self.checkpoint is None:
            return self.run / "report" / POINT
        return self.run / "points" / f"{self.checkpoint.name}.json"


def build_parser() -> CommandParser:
    """The parser of the verb."""
    parser = CommandParser(prog="zerobert scaling collect", description=DESCRIPTION)
    parser.add_argument("folder", type=str, help="of a ladder, or of one run")
    parser.add_argument("--output", type=str | None, default=None, help="folder of points.csv; by default that folder")
    parser.add_argument(
        "--held-out", type=str, nargs="+", default=[], help="prepared stores as NAME=STORE; the ladder's"
    )
    parser.add_argument(
        "--finetuned",
        type=str,
        nargs="+",
        default=[],
        metavar="NAME=FOLDER",
        help="tasks whose scores are abilities: in the folder a run of fine-tuning for each point, by the point's name",
    )
    parser.add_argument("--sequences", type=int, default=1000, help="of a held-out set, at most")
    parser.add_argument("--questions", type=int | None, default=None, help="of an ability, at most; 500")
    return parser


def main(arguments: list[str]) -> int:
    """Measure what is new, and write all points."""
    values = build_parser().parse_args(arguments)
    for name in ("sequences", "questions"):
        value = getattr(values, name)
        require(value is None or value >= 2, name, value, "give at least 2")
    folder = Path(values.folder)
    record = read_record(folder)
    measured = of_ladder(folder, record) if record else of_run(folder)
    output = made(Path(values.output) if values.output else folder)
    sets = {**record.get("held_out", {}), **_stores(values.held_out)}
    first = _config(measured[0].run)
    assert first.data.path is not None
    sets = sets or {"own": first.data.path}
    check_held_out(sets, Path(first.data.path))
    request = request_of(
        record.get("abilities", {}), Path(first.data.path), values.questions, first.data.sequence_length
    )
    asked = _asked(sets, request, values.sequences, first.data.sequence_length)
    tuned = scores_of(values.finetuned, measured)

    def measure(each: Measured) -> dict[str, Any]:
        from launch.scaling.ladder.measuring import measure_point

        return measure_point(each, _config(each.run), sets, request, values.sequences)

    points = points_of(measured, asked, measure)
    for ability in tuned[0].abilities:
        free = ability.discontinuous not in points[0]["columns"]
        require(free, "finetuned", ability.name, "an ability of the ladder has that name; give another")
    abilities = [*points[0]["abilities"], *map(asdict, tuned[0].abilities)]
    rows = [
        {"name": each.name, **each.columns, **point["columns"], **scores.columns}
        for each, point, scores in zip(measured, points, tuned, strict=True)
    ]
    write_points(output, rows, abilities, record, asked | {"finetuned": values.finetuned})
    print(f"{len(rows)} point(s): {output / 'points.csv'}", flush=True)
    return 0


def points_of(
    measured: Sequence[Measured], asked: Mapping[str, Any], measure: Callable[[Measured], dict[str, Any]]
) -> list[dict[str, Any]]:
    """The point of each model; one that isn't known is measured, kept beside its model, and told."""
    known = [_known(each, asked) for each in measured]
    missing, done, begun = known.count(None), 0, time.monotonic()
    points = []
    for each, old in zip(measured, known, strict=True):
        point = old
        if point is None:
            point = {"asked": asked, **measure(each)}
            each.kept.parent.mkdir(exist_ok=True)
            write_atomically(each.kept, json.dumps(point, indent=1) + "\n")
            done += 1
            left = missing - done
            after = f"; {left} left, about {clock((time.monotonic() - begun) / done * left)}" if left else ""
            print(f"{each.name}: loss {point['columns']['loss']:.4f}{after}", flush=True)
        points.append(point)
    return points


def of_ladder(folder: Path, record: Mapping[str, Any]) -> list[Measured]:
    """The finished runs of a ladder; the others are counted aloud.

    Raises:
        UserError: none is finished.
    """
    found = []
    for name, told in record["runs"].items():
        run = folder / name
        if is_finished(run):
            same = ("size", "architecture", "objective", "seed")
            columns = {"run": told["trunk"], **{key: told[key] for key in same}}
            found.append(Measured(name, run, told["steps"], None, columns))
    if not found:
        raise UserError(f"collect: no run of {folder} is finished; zerobert scaling run makes them")
    if len(found) < len(record["runs"]):
        print(f"note: {len(record['runs']) - len(found)} of {len(record['runs'])} runs are not finished", flush=True)
    return found


def _config(run: Path) -> RunConfig:
    return parse(["--config", str(run / "config.yaml")])


def of_run(folder: Path) -> list[Measured]:
    """The checkpoints of a run of pre-training.

    Raises:
        UserError: it is no such run, or has none.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"collect: {str(folder)!r} holds no ladder.json and no config.yaml; give a ladder's folder or a run's"
        )
    config = _config(folder)
    require(
        config.task == "pretrain", "task", config.task, f"points are of pre-training, and {folder} is a run of that"
    )
    found = []
    for path in sorted(folder.glob("checkpoints/step-*")):
        if (match := re.fullmatch(r"step-(\d+)", path.name)) and (path / "state.json").is_file():
            step = int(match[1])
            columns = {"run": str(folder), "size": "", "seed": config.seed, "step": step}
            found.append(Measured(path.name, folder, step, path, columns))
    if not found:
        raise UserError(f"collect: {folder} has no checkpoints; train with train.save_at and save_interval")
    return found


def _stores(given: Sequence[str]) -> dict[str, str]:
    """Raises: UserError: no NAME=STORE."""
    stores: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not re.fullmatch(r"\w+", name) or not path or name in stores:
            raise UserError(f"held-out: {text!r} is not allowed; give each set as NAME=STORE, with a name of its own")
        stores[name] = path
    return stores


def check_measures(held_out: Mapping[str, str], abilities: Mapping[str, Any], data: DataConfig) -> None:
    """Refuse what a ladder's file asks of its models and can't be asked, before they are trained.

    Raises:
        UserError: as `check_held_out` and `request_of`.
    """
    if data.path is not None:
        check_held_out(held_out, Path(data.path))
        request_of(abilities, Path(data.path), None, data.sequence_length)


def check_held_out(sets: Mapping[str, str], trained: Path) -> None:
    """
    Raises:
        UserError: a set has nothing that models haven't seen in training, or a name that is another column's.
    """
    seen = read_manifest(trained)
    for name, path in sets.items():
        clash = "its columns would be others' too; give it another name"
        require(name != "error" and not name.startswith("error_"), "held-out", name, clash)
        manifest = read_manifest(Path(path))
        if manifest.fingerprint == seen.fingerprint and not manifest.counts("validation").tokens:
            raise UserError(
                f"held-out: {path} was trained on and holds out nothing, so its loss isn't a held-out one; give other "
                "text as --held-out NAME=STORE or held_out of the ladder, or prepare with --validation_fraction"
            )


def request_of(abilities: Mapping[str, Any], store: Path, questions: int | None, length: int) -> Request:
    """What a ladder's file asks of every model.

    Raises:
        UserError: something that can't be asked.
    """
    probes = tuple(LabelledProbe(name, **told) for name, told in abilities.get("labelled", {}).items())
    pairs = tuple(Path(path) for path in abilities.get("blimp", ()))
    number = questions or abilities.get("questions") or Request.items
    request = Request(
        store=store, pairs=pairs, labelled=probes, items=number, context=min(Request.context, length), length=length
    )
    request.validate()
    return request


def _asked(sets: Mapping[str, str], request: Request, sequences: int, length: int) -> dict[str, Any]:
    """What a point depends on beside its model, as JSON has it.

    Raises:
        UserError: a held-out set is no prepared store.
    """
    stores = {name: read_manifest(Path(path)).fingerprint for name, path in sets.items()}
    assert request.store is not None
    asked = asdict(request) | {"store": read_manifest(request.store).fingerprint}
    told = {"held_out": stores, "sequences": sequences, "length": length, "abilities": asked}
    plain: dict[str, Any] = json.loads(json.dumps(told, default=str))
    return plain


def _known(each: Measured, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The point that was measured before; None where something else was asked, or nothing."""
    try:
        point = json.loads(each.kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return point if isinstance(point, dict) and point.get("asked") == asked else None


def write_points(
    output: Path,
    rows: Sequence[Mapping[str, Any]],
    abilities: Sequence[Mapping[str, Any]],
    record: Mapping[str, Any],
    asked: Mapping[str, Any],
) -> None:
    """Write points.csv and points.json to a folder that can be written."""
    written = io.StringIO()
    writer = csv.DictWriter(written, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([{name: _shown(value) for name, value in row.items()} for row in rows])
    told = {
        "abilities": abilities,
        "ladder": {name: _without_options(run) for name, run in record.get("runs", {}).items()},
        "asked": asked,
        "versions": {"zerobert": engine.__version__, "python": platform.python_version()},
        "machine": platform.processor() or platform.machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    write_atomically(output / "points.csv", written.getvalue())
    write_atomically(output / "points.json", json.dumps(told, indent=1) + "\n")


def _without_options(run: Mapping[str, Any]) -> dict[str, Any]:
    return {key: each for key, each in run.items() if key != "options"}


def _shown(value: Any) -> Any:
    return f"{value:.10g}" if isinstance(value, float) else value
