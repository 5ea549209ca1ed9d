"""`zerobert scaling report`: one page on a ladder: laws, predictions, advice, abilities under both kinds of metric."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import engine
from engine.durable import sha256_of, write_atomically
from engine.errors import UserError, require
from engine.scaling.emergence.verdict import Verdict
from engine.scaling.points import Points
from launch.cli import CommandParser, check_output
from launch.scaling.abilities import (
    Judged,
    Known,
    check_columns,
    judge,
    named_abilities,
    record_beside,
    recorded_abilities,
)
from launch.scaling.blocks import Notes, Picture, Section, Table, as_html, as_markdown
from launch.scaling.fit import made, write_fit
from launch.scaling.study import Study, add_options, check, points_of, study
from launch.scaling.told import advice, sections, short

DESCRIPTION = """One page on how loss and abilities grow with scale, as HTML that needs no other file and as Markdown.

  zerobert scaling report runs/ladder --compute 1e20 --output report
  zerobert scaling report theirs.csv --columns parameters=params,loss=loss_c4 --output report \\
      --ability arc=acc_arc:logp_arc piqa=acc_piqa --items arc=1000 piqa=1838
  zerobert scaling report runs/ladder --checkpoints checkpoints.csv --output report

Written are report.html, report.md and fit.json. Abilities are those of points.json beside the file, or those of
--ability.
"""

#: longer tables are folded on the page
LONG = 30


@dataclass(frozen=True)
class Judgements:
    """Verdicts on abilities: of the ladder, and of checkpoints within runs."""

    abilities: list[Known]
    of_ladder: list[Judged]
    of_checkpoints: list[Judged]


def build_parser() -> CommandParser:
    """The parser of the verb."""
    parser = CommandParser(prog="zerobert scaling report", description=DESCRIPTION)
    parser.add_argument("points", type=str, help="a CSV file of points, or the folder with points.csv")
    add_options(parser)
    add = parser.add_argument
    add("--ability", type=str, nargs="+", default=[], metavar="NAME=ACCURACY[:CONTINUOUS]", help="abilities by their "
        "columns, in place of those of points.json")  # fmt: skip
    add("--items", type=str, nargs="+", default=[], metavar="[NAME=]NUMBER", help="questions of each, or of all")
    add("--checkpoints", type=str | None, default=None, help="a second CSV file, of checkpoints within runs, for the "
        "abilities along tokens")  # fmt: skip
    parser.add_argument("--output", type=str, required=True, help="folder to write the report to")
    return parser


def main(arguments: list[str]) -> int:
    """Fit, judge, and write the page."""
    options = build_parser().parse_args(arguments)
    check(options)
    check_output(options.output)
    items = options["items"]  # as an attribute it is the method of a mapping
    require(not items or bool(options.ability), "items", " ".join(items), "name abilities by --ability")
    path = points_file(options.points)
    points = points_of(path, options)
    recorded = recorded_abilities(path)
    abilities = named_abilities(options.ability, items) or recorded
    check_columns(points, abilities)
    checkpoints = None if options.checkpoints is None else checkpoints_of(Path(options.checkpoints), options, abilities)
    folder = made(Path(options.output))
    found = study(points, options)
    drawn = (options.resamples, options.seed)
    judged = Judgements(
        abilities,
        [judge(points, abilities, axis, *drawn) for axis in ("compute", "loss")] if abilities else [],
        [] if checkpoints is None else [judge(checkpoints, abilities, "tokens", *drawn)],
    )
    title = f"Scaling of {Path(options.points).name}"
    parts = list(all_sections(found, judged, path, options))
    text = as_markdown(title, parts)
    write_atomically(folder / "report.html", as_html(title, parts))
    write_atomically(folder / "report.md", text)
    write_fit(folder, found, path, options)
    print(text)
    print(f"written: {folder / 'report.html'}")
    return 0


def points_file(given: str) -> Path:
    """The CSV file that is given, or that of the folder.

    Raises:
        UserError: a folder without one.
    """
    path = Path(given)
    if not path.is_dir():
        return path
    if not (path / "points.csv").is_file():
        raise UserError(f"points: {given!r} has no points.csv; run zerobert scaling collect {given} first")
    return path / "points.csv"


def checkpoints_of(path: Path, options: Any, abilities: Sequence[Known]) -> Points:
    """The checkpoints within runs, whose abilities are looked at along tokens.

    Raises:
        UserError: no ability is known, or a column of one is missing.
    """
    require(bool(abilities), "checkpoints", str(path), "they are for abilities; name some by --ability")
    points = points_of(path, options)
    check_columns(points, abilities)
    return points


def all_sections(found: Study, judged: Judgements, path: Path, options: Any) -> Iterator[Section]:
    """The whole page."""
    from launch.scaling.pictures import held_picture, isoflop_picture, study_pictures

    pictures = {
        "Law": study_pictures(found),
        "Predictions of the largest runs": [held_picture(found)] if found.held else [],
        "IsoFLOP": [isoflop_picture(found)] if found.isoflop else [],
    }
    yield summary(found, judged)
    for part in sections(found):
        yield Section(part.title, [*part.blocks, *pictures.get(part.title, [])])
    yield from ability_sections(judged)
    if spread := seeds_table(found):
        yield spread
    yield ladder(found)
    yield provenance(path, options)


def summary(found: Study, judged: Judgements) -> Section:
    """What there is to know, in a few sentences."""
    fit = found.fit
    told = [f"Of {len(found.candidates)} laws {fit.law.name} is used: L = {formula(found)}."]
    told += [advice(best, fit.level) for best in found.optima]
    if found.held:
        worst = max(found.held, key=lambda each: abs(each.error))
        covered = sum(each.covered for each in found.held)
        told.append(
            f"Held-out largest runs: {covered} of {len(found.held)} inside of their {100 * fit.level:.0f} % intervals, "
            f"the worst off by {100 * worst.error:+.1f} % ({worst.name})."
        )
    for each in (*judged.of_ladder, *judged.of_checkpoints):
        kinds: dict[str, list[str]] = {}
        for verdict in each.verdicts:
            kinds.setdefault(verdict.kind, []).append(verdict.ability.name)
        told += [f"Along {each.axis}, {kind}: {', '.join(names)}." for kind, names in kinds.items()]
    return Section("In short", [*told, Notes(fit.warnings())])


def formula(found: Study) -> str:
    """The law with its numbers."""
    values = {name: f"{interval.value:.4g}" for name, interval in found.fit.parameters().items()}
    return re.sub(r"[A-Za-z]+", lambda word: values.get(word[0], word[0]), found.fit.law.formula)


def ability_sections(judged: Judgements) -> Iterator[Section]:
    """A section an axis: verdicts in words, and a picture for each metric of each ability."""
    from launch.scaling.pictures import finding_picture

    chance = {each.ability.name: each.chance for each in judged.abilities}
    for each in (*judged.of_ladder, *judged.of_checkpoints):
        tests = sum(len(verdict.findings) for verdict in each.verdicts)
        text = (
            f"{len(each.verdicts)} abilities, {tests} tests, corrected together (Holm 1979). A jump under the metric "
            "that counts right answers alone, while the continuous one grows smoothly, is made by the metric."
        )
        pictures = [
            finding_picture(finding, verdict.ability.name, each.axis, verdict.axis.unit,
                            chance[verdict.ability.name] if number == 0 else None)
            for verdict in each.verdicts
            for number, finding in enumerate(verdict.findings)
        ]  # fmt: skip
        words = [str(verdict) for verdict in each.verdicts]
        header = ["ability", "verdict", "right answers", "continuous", "p", "p", "power", "power"]
        rows = [_verdict_row(verdict) for verdict in each.verdicts]
        blocks: list[str | Table | Notes | Picture] = [
            text,
            *([Table(header, rows)] if rows else []),
            *words,
            Notes(each.left_out),
            *pictures,
        ]
        yield Section(f"Abilities along {each.axis}", blocks)


def _verdict_row(verdict: Verdict) -> list[str]:
    found: list[Any] = [*verdict.findings, None][:2]
    shapes, corrected, powers = zip(
        *(
            ("", "", "") if each is None else (each.shape, f"{each.p_holm:.2g}", f"{each.change.power:.2f}")
            for each in found
        ),
        strict=True,
    )
    return [verdict.ability.name, verdict.kind, *shapes, *corrected, *powers]


def seeds_table(found: Study) -> Section | None:
    """How runs of one size and budget spread; None where there are no two such."""
    points = found.points
    keys = list(zip(points.parameters.tolist(), points.tokens.tolist(), strict=True))
    groups = {key: np.array([other == key for other in keys]) for key in dict.fromkeys(keys)}
    several = {key: points.losses[which] for key, which in groups.items() if which.sum() > 1}
    if not several:
        return None
    rows = [
        [short(size), short(tokens), str(len(losses)), f"{losses.mean():.4f}", f"{losses.std(ddof=1):.4f}",
         f"{losses.min():.4f} to {losses.max():.4f}"]
        for (size, tokens), losses in several.items()
    ]  # fmt: skip
    free = sum(len(losses) - 1 for losses in several.values())
    square = sum(float(((np.log(losses) - np.log(losses).mean()) ** 2).sum()) for losses in several.values()) / free
    residual = float(np.sqrt(np.mean(found.fit.residuals**2)))
    text = (
        f"Runs of one size and budget, which differ in their seed, spread by {100 * square**0.5:.2g} % (standard "
        f"deviation, {free} degrees of freedom); the residuals of the law are {100 * residual:.2g} %."
    )
    header = ["parameters", "tokens", "runs", "mean loss", "standard deviation", "lowest to highest"]
    return Section("Seeds", [text, Table(header, rows, folded=len(rows) > LONG)])


def ladder(found: Study) -> Section:
    """Every point beside the law."""
    points = found.points
    predicted, errors = found.fit.law.predict(found.fit.theta, points), points.errors
    rows = [
        [
            points.names[index], short(points.parameters[index]), short(points.tokens[index]),
            f"{points.tokens[index] / points.parameters[index]:.3g}", f"{points.flops[index]:.3g}",
            f"{points.losses[index]:.4f}" + ("" if np.isnan(errors[index]) else f" ± {errors[index]:.4f}"),
            f"{predicted[index]:.4f}", f"{100 * np.expm1(found.fit.residuals[index]):+.2f} %",
        ]
        for index in np.argsort(points.flops, kind="stable")
    ]  # fmt: skip
    header = ["run", "parameters", "tokens", "tokens per parameter", "FLOPs", "loss", "law", "residual"]
    return Section("Ladder", [Table(header, rows, folded=len(rows) > LONG)])


def provenance(path: Path, options: Any) -> Section:
    """Where the numbers come from."""
    rows = [["points", path.name], ["SHA-256", sha256_of(path)], ["zerobert", engine.__version__]]
    for name in ("columns", "where", "law", "resamples", "seed"):
        value = getattr(options, name)
        rows.append([name, " ".join(value) if isinstance(value, list) else str(value)])
    rows += [
        [name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)]
        for name, value in record_beside(path).items()
        if name not in ("abilities", "ladder")
    ]
    return Section("Where this comes from", [Table(["", ""], [row for row in rows if row[1]])])
