"""`zerobert scaling VERB`: a module of this package for each of VERBS."""

from __future__ import annotations

import importlib

from jsonargparse import ArgumentParser

from launch.cli import CommandParser, unknown_command

#: verb -> module of this package with its `main` and `build_parser`, and what it does
VERBS = {
    "plan": ("ladder.plan", "the runs of a ladder of sizes, their FLOPs and predicted time"),
    "run": ("ladder.run", "trains what is missing of a ladder, here or as SLURM arrays"),
    "collect": ("ladder.collect", "finished runs, or a run's checkpoints -> points.csv"),
    "fit": ("fit", "points.csv -> laws with intervals, the best size of a budget, predictions of the largest runs"),
    "report": ("report", "points.csv -> one page: laws, residuals, predictions, advice, abilities under both metrics"),
}

DESCRIPTION = """How loss and abilities grow with scale: train a ladder of sizes, fit laws, and test for emergence.

  zerobert scaling plan ladder.yaml                     the runs of a ladder, and what they cost
  zerobert scaling run ladder.yaml --output runs/ladder train them; the same command goes on where it stopped
  zerobert scaling collect runs/ladder                  runs -> runs/ladder/points.csv
  zerobert scaling fit runs/ladder/points.csv --compute 1e20 --output fit
  zerobert scaling report runs/ladder --compute 1e20 --output report

zerobert scaling VERB --help tells a verb's options. fit and report read other people's ladders too (--columns).
"""


def build_parser() -> CommandParser:
    """The parser of the command, without its verbs."""
    return CommandParser(prog="zerobert scaling", description=DESCRIPTION)


def add_verbs(parser: ArgumentParser) -> None:
    """Add the parser of each verb, which jsonargparse takes only after `parser` has been put into another one."""
    verbs = parser.add_subcommands(dest="verb", title="verbs", description="each has its own --help")
    for verb, (module, what) in VERBS.items():
        verbs.add_subcommand(verb, importlib.import_module(f"launch.scaling.{module}").build_parser(), help=what)


def main(arguments: list[str]) -> int:
    """Run the named verb."""
    first, *others = arguments or ["--help"]
    if first in VERBS:
        return int(importlib.import_module(f"launch.scaling.{VERBS[first][0]}").main(others))
    if first not in ("-h", "--help", "help"):
        raise unknown_command("verb", first, VERBS)
    if others:
        return main([others[0], "--help"])
    parser = build_parser()
    add_verbs(parser)
    parser.parse_args(["--help"])
    return 0
