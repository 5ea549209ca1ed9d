"""`zerobert ablate`: whether switches help, by runs with and without each, paired by seed and training examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.ablate.reading import read_ablation
from launch.cli import CommandParser
from launch.suite.command import Command, parser_of, perform
from launch.suite.plan import Cell, Suite

DESCRIPTION = """Did it help? Train with and without each switch, at several sizes of training data, with several seeds.

  zerobert ablate launch/recipes/ablations/regularisers.yaml --data glue_data --models bert=MODEL --output runs/ablation
  zerobert ablate ablation.yaml --plan                          what would run
  zerobert ablate ablation.yaml --only 'r_drop,*' 'base,*'      tasks, settings or models by name or pattern
  zerobert ablate ablation.yaml --submit -- --gpus-per-node 1 --time 2:00:00
  zerobert ablate runs/ablation                                 the report of a folder, made anew

The file is a suite's with switches and sizes in place of settings:

  switches:
    r_drop: {regularise.r_drop: 1.0}
  sizes: [50, 200, all]

Each run is an ordinary one, in <output>/<model>/<task>/<switch>,n=<size>/seed-N, with base for those without a switch.
Runs with the same seed and size learn from the same examples (labelled.limit) and are pairs. The report has the mean
effect of each switch on the score, its 95 % interval, p by Student's t-test for pairs, Holm's correction for all
comparisons, and a verdict. The same command goes on where it was stopped, and tries again only what failed."""


def _check(suite: Suite) -> None:
    from launch.ablate.check import check_ablation

    check_ablation(suite)


def _report(output: Path, cells: Sequence[Cell]) -> tuple[str, int]:
    from launch.ablate.report import write_report

    return write_report(output, cells)


ABLATE = Command("ablate", DESCRIPTION, read_ablation, _report, _check)


def build_parser() -> CommandParser:
    """The parser of `zerobert ablate`."""
    return parser_of(ABLATE)


def main(arguments: list[str]) -> int:
    """Make an ablation's runs and its report."""
    return perform(ABLATE, arguments)
