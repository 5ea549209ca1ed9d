"""`zerobert seeds`: the same training with several seeds, or on the folds of its data, and one report."""

from __future__ import annotations

import os
from pathlib import Path

from engine.errors import UserError
from launch.cli import CommandParser, split_at_dashes
from launch.seeds.plan import Member, Record, plan
from launch.seeds.running import Runs, check_launcher

DESCRIPTION = """Train with several seeds, or on the folds of small data, and report mean, spread and interval.

  zerobert seeds --seeds 5 -- --config launch/recipes/finetune.yaml --model.init_from MODEL --labelled.train train.tsv
  zerobert seeds --seeds 5 --launcher "deepspeed --num_accelerators 2" -- --config ...
  zerobert seeds --folds 10 -- --config ...

What follows -- are options of `zerobert train`. Each run is an ordinary one, in <output>/seed-N; N begins at the
training's own seed. The same command goes on where it was stopped: runs that are finished are skipped, the one that was
under way resumes. The report is <output>/report. `zerobert compare` takes two such folders."""


def build_parser() -> CommandParser:
    """The parser of the command's own options."""
    parser = CommandParser(
        prog="zerobert seeds",
        usage="zerobert seeds [--seeds N] [--folds K] [options] -- TRAINING",
        description=DESCRIPTION,
    )
    parser.add_argument("--seeds", type=int | None, default=None, help="number of seeds; 5, or 1 with folds")
    parser.add_argument(
        "--folds", type=int | None, default=None, help="folds of labelled.train, by class; each run is tested on one"
    )
    parser.add_argument("--runs", type=int, default=1, help="runs at once, which share the machine")
    parser.add_argument(
        "--launcher",
        type=str,
        default="",
        help='what starts a run, such as "deepspeed --num_accelerators 2"; {port} in it is a free port; '
        "by default python, one rank",
    )
    return parser


def main(arguments: list[str]) -> int:
    """Make the runs that are missing, and report."""
    own, training = split(arguments)
    values = build_parser().parse_args(own)
    for name, least in (("seeds", 1), ("folds", 2), ("runs", 1)):
        value = getattr(values, name)
        if value is not None and value < least:
            raise UserError(f"{name}: {value} is not allowed; give a whole number of at least {least}")
    launcher = check_launcher(values.launcher, values.runs, os.environ)
    seeds = values.seeds if values.seeds or values.folds else 5
    output, record, members = plan(training, seeds, values.folds)
    code = finish(output, record, members, Runs(launcher, values.runs))
    if code or not all(member.is_finished for member in members):
        return code
    from launch.seeds.report import write_report

    print(f"\n{write_report(output, record)}\nreport    {output / 'report'}", flush=True)
    return 0


def split(arguments: list[str], command: str = "seeds --seeds 5") -> tuple[list[str], list[str]]:
    """The command's own options, and the training's, which follow a --.

    Args:
        command: an example of how it is called.

    Raises:
        UserError: there is no --.
    """
    if "--" in arguments:
        return split_at_dashes(arguments)
    if "--help" in arguments or "-h" in arguments:
        return arguments, []
    raise UserError(f"training: its options are missing; give them after --, as in zerobert {command} -- --config R")


def finish(output: Path, record: Record, members: list[Member], runs: Runs) -> int:
    """Run all that are not finished; the exit code."""
    missing = [member for member in members if not member.is_finished]
    for member in members:
        if member not in missing:
            print(f"{member.name} is finished", flush=True)

    def ended(member: Member) -> None:
        record.write(output)
        left = sum(not each.is_finished for each in members)
        print(f"{member.name} has ended; {left} run(s) left", flush=True)

    return runs.run_all(missing, ended)
