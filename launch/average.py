"""`zerobert average`: the mean of the weights of several models, as one export."""

from __future__ import annotations

from pathlib import Path

from engine.errors import UserError
from engine.zero.quiet import silence_libraries
from launch.cli import CommandParser, check_output
from launch.export import add_check

DESCRIPTION = """Write the mean of the weights of several models as a folder that transformers opens.

  zerobert average runs/sst2 --last 3 --output averaged         the last checkpoints of a run
  zerobert average runs/sst2/seed-* --output soup               the exports of several runs (Wortsman et al. 2022)

Configuration, classes and tokenizer must be the same. The mean of runs is good only where all end in one basin of the
loss: the same start model and data, and heads that begin alike. So compare its score with theirs: zerobert predict."""


def build_parser() -> CommandParser:
    """The parser of the command."""
    parser = CommandParser(prog="zerobert average", description=DESCRIPTION)
    parser.add_argument("folders", type=str, nargs="+", help="exports, checkpoints, or runs, whose exports are taken")
    parser.add_argument("--output", type=str, required=True, help="folder to write")
    parser.add_argument(
        "--last", type=int | None, default=None, help="so many of the newest checkpoints of one run instead"
    )
    add_check(parser)
    return parser


def main(arguments: list[str]) -> int:
    """Read the models one after the other, and write their mean."""
    values = build_parser().parse_args(arguments)
    silence_libraries()
    print(average([Path(folder) for folder in values.folders], Path(values.output), values.last, values.check))
    return 0


def average(folders: list[Path], output: Path, last: int | None, check: bool) -> str:
    """Write the mean; what was written and compared, in words.

    Raises:
        UserError: a folder that is no model, models that differ, or fewer than two.
    """
    from engine import average as models

    check_output(str(output))
    if last is not None:
        if last < 2:
            raise UserError(f"last: {last} is not allowed; give at least 2")
        if len(folders) > 1:
            raise UserError(f"last: {last} is not allowed; it takes one run and {len(folders)} folders are given")
        folders = models.last_checkpoints(folders[0], last)
    paths = [folder.resolve() for folder in folders]
    twice = next((folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1), None)
    if twice is not None:
        raise UserError(f"folders: {str(twice)!r} is given twice; leave one out")
    if len(folders) < 2:
        raise UserError(f"folders: {str(folders[0])!r} is one alone; give two or more, or --last N of a run")
    members = [models.open_member(folder) for folder in folders]
    compared = models.average(members, output, check=check)
    told = ", ".join(str(member.path) for member in members)
    lines = [f"averaged {len(members)} models ({told}) to {output}"]
    lines.append(f"checked: {compared or 'nothing, as --check false says'}")
    if len({member.run for member in members}) > 1:
        lines.append(
            "note: the mean of several runs is good only if they end in one basin of the loss: compare its score with "
            "theirs"
        )
    if any(member.tuned for member in members):
        lines.append("note: thresholds that were tuned for single models are left out: predictions take the usual ones")
    return "\n".join(lines)
