"""`zerobert scaling run`: trains what is missing of a ladder, one run after the other, several at once, or by SLURM."""

from __future__ import annotations

import fnmatch
import os
import time
from collections.abc import Sequence
from pathlib import Path

from engine.errors import UserError, require
from launch.cli import CommandParser, split_at_dashes
from launch.scaling.ladder.cells import Cell, Ladder, plan_ladder, write_record
from launch.scaling.ladder.collect import check_measures
from launch.scaling.ladder.reading import read_ladder
from launch.seeds.plan import Member
from launch.seeds.running import Runs, check_launcher
from launch.slurm.status import clock

DESCRIPTION = """Train the runs of a ladder that are not finished.

  zerobert scaling run launch/recipes/ladder_tiny.yaml
  zerobert scaling run ladder.yaml --runs 2                               two at once
  zerobert scaling run ladder.yaml --only '*/h32-l2/*' '*/h48-l3/*'       sizes, seeds or budgets by pattern
  zerobert scaling run ladder.yaml --launcher "deepspeed --num_accelerators 8"
  zerobert scaling run ladder.yaml --submit -- --gpus-per-node 8 --time 8:00:00

Each run is an ordinary one with its folder and log. The largest budget of each size and seed is trained first; smaller
ones begin with its checkpoints. The same command goes on where it was stopped, and nothing is trained twice. With
--submit what follows -- are options of zerobert submit, and two array jobs are made: one of the largest budgets, and
one behind it of the others.
"""


def build_parser() -> CommandParser:
    """The parser of the command's own options."""
    parser = CommandParser(
        prog="zerobert scaling run",
        usage="zerobert scaling run FILE [options] [--submit -- JOB]",
        description=DESCRIPTION,
    )
    parser.add_argument("file", type=str, help="YAML file of the ladder")
    parser.add_argument("--output", type=str | None, default=None, help="folder of all runs; the file's, or runs/NAME")
    parser.add_argument("--only", type=str, nargs="+", default=[], help="names of runs, as in the plan, or patterns")
    parser.add_argument("--runs", type=int | None, default=None, help="runs at once; 1, or with --submit all of them")
    parser.add_argument(
        "--launcher", type=str, default="", help="what starts a run, as of zerobert seeds; by default python, one rank"
    )
    parser.add_argument("--submit", action="store_true", help="make the runs as SLURM arrays")
    return parser


def main(arguments: list[str]) -> int:
    """Plan, then run or submit what is missing."""
    own, job = split_at_dashes(arguments)
    values = build_parser().parse_args(own)
    require(values.runs is None or values.runs >= 1, "runs", values.runs, "give a whole number of at least 1")
    if len(own) < len(arguments) and not values.submit:
        raise UserError("submit: options of a job stand after -- without it; add --submit")
    ladder = plan_ladder(read_ladder(values.file), None if values.output is None else Path(values.output))
    cells = chosen(ladder, values.only)
    check_measures(ladder.file.held_out, ladder.file.abilities, cells[0].config.data)
    if values.submit:
        if values.launcher:
            raise UserError("launcher: with --submit srun starts the ranks; leave it out, and give --ntasks-per-node")
        from launch.scaling.ladder.array import submit_ladder

        return submit_ladder(ladder, cells, job, values.runs)
    launcher = check_launcher(values.launcher, values.runs or 1, os.environ)
    return run(ladder, cells, Runs(launcher, values.runs or 1))


def chosen(ladder: Ladder, patterns: Sequence[str]) -> list[Cell]:
    """The runs whose names fit a pattern; all of them without patterns.

    Raises:
        UserError: a pattern that fits none, or a run whose trunk is neither there nor chosen.
    """
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(cell.member.name, pattern) for cell in ladder.cells):
            raise UserError(f"only: {pattern!r} fits no run; give such as {ladder.cells[0].member.name}, or a pattern")
    cells = [
        cell
        for cell in ladder.cells
        if not patterns or any(fnmatch.fnmatchcase(cell.member.name, pattern) for pattern in patterns)
    ]
    trunks = {cell.trunk for cell in cells if cell.is_trunk}
    for cell in cells:
        if (
            cell.trunk not in trunks
            and not cell.member.is_finished
            and not Path(cell.config.branch_from or "").is_dir()
        ):
            raise UserError(f"only: {cell.member.name} begins with a checkpoint of {cell.trunk}; choose that too")
    return cells


def run(ladder: Ladder, cells: Sequence[Cell], runs: Runs) -> int:
    """Make the runs that are missing; the exit code."""
    write_record(ladder)
    missing = [cell for cell in cells if not cell.member.is_finished]
    print(f"{len(cells)} run(s), {len(missing)} to make, into {ladder.output}", flush=True)
    executed = {cell.member.name: cell.rung.step_flops * cell.rung.executed(cell.budget) for cell in missing}
    begun, done, codes = time.monotonic(), 0.0, list[int]()

    def told(member: Member, what: str) -> None:
        nonlocal done
        done += executed[member.name]
        left = sum(executed.values()) - done
        after = f"; about {clock(left / done * (time.monotonic() - begun))} left" if left > 0 else ""
        print(f"{member.name}: {what}{after}", flush=True)

    def lost(member: Member, code: int) -> None:
        codes.append(code)
        if runs.stopped_by is None:
            told(member, f"FAILED with exit code {code} (see {member.log})")

    for trunks in (True, False):
        members = [cell.member for cell in missing if cell.is_trunk == trunks]
        code = runs.run_all(members, lambda member: told(member, "finished"), lost)
        if runs.stopped_by is not None:
            return code
        if codes:
            print("runs that begin with a failed one's checkpoints wait; the same command goes on", flush=True)
            return 2 if set(codes) == {2} else 1
    return 0
