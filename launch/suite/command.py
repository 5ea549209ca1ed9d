"""`zerobert suite`: tasks x settings x seeds from one YAML file, as runs here or as a SLURM array, and one table."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import UserError
from launch.cli import CommandParser, split_at_dashes
from launch.seeds.plan import Member
from launch.seeds.running import Runs, check_launcher
from launch.slurm.status import clock
from launch.suite.plan import Cell, Suite, chosen_cells, plan_suite, prepare, read_cells
from launch.suite.reading import SuiteFile, read_suite

DESCRIPTION = """Train every task with every setting and several seeds, and report one table with intervals.

  zerobert suite launch/recipes/suites/glue_bert.yaml --data glue_data --models bert=MODEL --output runs/glue
  zerobert suite suite.yaml --plan                           what would run
  zerobert suite suite.yaml --only rte --runs 2              tasks, settings or models by name or pattern
  zerobert suite suite.yaml --submit -- --gpus-per-node 1 --time 2:00:00
  zerobert suite runs/glue                                   the report of a suite's folder, made anew

Each run is an ordinary one, in <output>/<model>/<task>/<setting>/seed-N; a setting's folder is one that zerobert
compare takes. The same command goes on where it was stopped, and tries again only what failed. With --submit what
follows -- are options of zerobert submit; an array job has an element a run, and a last job reports."""


@dataclass(frozen=True)
class Command:
    """What the commands that make the runs of a file have to themselves."""

    name: str
    description: str
    read: Callable[[str], SuiteFile]
    report: Callable[[Path, Sequence[Cell]], tuple[str, int]]
    """writes a folder's report; its text, and how many runs are missing"""
    check: Callable[[Suite], None] = lambda _: None
    """refuses what no run alone would refuse"""


def _report(output: Path, cells: Sequence[Cell]) -> tuple[str, int]:
    from launch.suite.report import write_report

    return write_report(output, cells)


SUITE = Command("suite", DESCRIPTION, read_suite, _report)


def build_parser() -> CommandParser:
    """The parser of `zerobert suite`."""
    return parser_of(SUITE)


def main(arguments: list[str]) -> int:
    """Make a suite's runs and its report."""
    return perform(SUITE, arguments)


def parser_of(command: Command) -> CommandParser:
    """The parser of a command's own options."""
    name = command.name
    parser = CommandParser(
        prog=f"zerobert {name}",
        usage=f"zerobert {name} FILE [options] [--submit -- JOB]",
        description=command.description,
    )
    parser.add_argument("file", type=str, help="YAML file; or the folder of its runs, whose report is made anew")
    parser.add_argument("--output", type=str | None, default=None, help="folder of all runs; the file's, or runs/NAME")
    parser.add_argument("--data", type=str | None, default=None, help="folder that the files of data are in")
    parser.add_argument(
        "--models", type=str, nargs="+", default=[], help="models instead of the file's: folders, or NAME=FOLDER"
    )
    parser.add_argument(
        "--only", type=str, nargs="+", default=[], help="names or patterns of models, tasks or settings to run"
    )
    parser.add_argument("--runs", type=int | None, default=None, help="runs at once; 1, or with --submit all of them")
    parser.add_argument(
        "--launcher", type=str, default="", help="what starts a run, as of zerobert seeds; by default python, one rank"
    )
    parser.add_argument("--plan", action="store_true", help="print the runs and write nothing")
    parser.add_argument("--submit", action="store_true", help="make the runs as a SLURM array")
    return parser


def perform(command: Command, arguments: list[str]) -> int:
    """Plan, then run or submit what is missing, and report."""
    own, job = split_at_dashes(arguments)
    values = parser_of(command).parse_args(own)
    if values.runs is not None and values.runs < 1:
        raise UserError(f"runs: {values.runs} is not allowed; give a whole number of at least 1")
    if len(own) < len(arguments) and not values.submit:
        raise UserError("submit: options of a job stand after -- without it; add --submit")
    if Path(values.file).is_dir():
        return report_folder(command, Path(values.file), arguments)
    file = command.read(values.file)
    output, data = (None if path is None else Path(path) for path in (values.output, values.data))
    suite = plan_suite(file, output, data, values.models)
    command.check(suite)
    cells = chosen_cells(suite.cells, values.only)
    if values.plan:
        print(planned(suite, cells), flush=True)
        return 0
    if values.submit:
        from launch.suite.array import submit_suite

        if values.launcher:
            raise UserError("launcher: with --submit srun starts the ranks; leave it out, and give --ntasks-per-node")
        return submit_suite(command.name, suite, cells, job, values.runs)
    launcher = check_launcher(values.launcher, values.runs or 1, os.environ)
    return run(command, suite, cells, Runs(launcher, values.runs or 1))


def report_folder(command: Command, output: Path, arguments: Sequence[str]) -> int:
    """Report on the runs that a folder holds.

    Raises:
        UserError: other options, or no runs of a file in the folder.
    """
    name = command.name
    if len(arguments) > 1:
        raise UserError(f"{name}: {output} is a folder, of which only the report is made; give a file, or no options")
    if not read_cells(output):
        raise UserError(f"{name}: {output} is a folder and holds no runs; give a YAML file, or the folder of its runs")
    return report(command, output, read_cells(output))


def report(command: Command, output: Path, cells: Sequence[Cell]) -> int:
    """Write and print the report; 1 where runs are missing."""
    text, missing = command.report(output, cells)
    print(f"\n{text}\nreport    {output / 'report'}", flush=True)
    return 1 if missing else 0


def planned(suite: Suite, cells: Sequence[Cell]) -> str:
    """What would run: a line a cell, with the options of its first run."""
    lines = []
    for cell in cells:
        finished = sum(member.is_finished for member in cell.members)
        lines.append(f"{cell.name}: {finished} of {len(cell.members)} run(s) finished")
        lines.append(f"  zerobert train {shlex.join(cell.members[0].options)}")
    total = sum(len(cell.members) for cell in cells)
    return "\n".join([*lines, f"{len(cells)} cell(s), {total} run(s), into {suite.output}"])


def run(command: Command, suite: Suite, cells: Sequence[Cell], runs: Runs) -> int:
    """Make the runs that are missing, and report; the exit code."""
    from launch.suite.scores import read_run, told_reason

    everything, missing = prepare(suite, cells)
    of_member = {member.name: cell for cell in cells for member in cell.members}
    codes: dict[str, int] = {}
    begun, done = time.monotonic(), 0

    def told(member: Member, what: str) -> None:
        nonlocal done
        done += 1
        left = len(missing) - done
        pace = (time.monotonic() - begun) / done
        after = f"; {left} left, about {clock(left * pace)}" if left else ""
        print(f"{member.name}: {what}{after}", flush=True)

    def ended(member: Member) -> None:
        cell = of_member[member.name]
        cell.record.write(suite.output / cell.name)
        told(member, str(read_run(cell, member.folder)))

    def lost(member: Member, code: int) -> None:
        codes[member.name] = code
        if runs.stopped_by is None:
            told(member, f"FAILED: {told_reason(member.folder, code)} (see {member.log})")

    print(f"{sum(len(cell.members) for cell in cells)} run(s), {len(missing)} to make, into {suite.output}", flush=True)
    code = runs.run_all(missing, ended, lost)
    if runs.stopped_by is not None:
        return code
    report(command, suite.output, everything)
    return 0 if not codes else 2 if set(codes.values()) == {2} else 1
