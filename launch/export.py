"""`zerobert export`: a run's weights as a Hugging Face folder, on a machine of any kind, without ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import UserError
from engine.zero.quiet import silence_libraries
from launch.cli import CommandParser

if TYPE_CHECKING:
    from engine.export import Wish

DESCRIPTION = """Write a run's weights as a folder that transformers opens.

  zerobert export runs/sst2 --output my-classifier                  the best weights of a fine-tuning run
  zerobert export runs/sst2 --weights last --output my-classifier   those of its newest checkpoint
  zerobert export runs/base/checkpoints/step-020000 --output bert   those of that step
  zerobert export runs/lora --merge --output my-classifier          adapters computed into the weights below them

Labels and tokenizer are those of the run, whatever its data files hold today. Before the folder gets its name,
transformers opens it and must compute the logits that our modules compute."""


def build_parser() -> CommandParser:
    """The parser of the command."""
    parser = CommandParser(prog="zerobert export", description=DESCRIPTION)
    parser.add_argument("run", type=str, help="output folder of a run, or one of its step-NNNNNN folders")
    parser.add_argument("--output", type=str, required=True, help="folder to write")
    parser.add_argument(
        "--weights",
        choices=("best", "last"),
        help="best: of the best evaluation, where the task has a metric for it; last: of the newest checkpoint; "
        "by default the best if there are any",
    )
    add_check(parser)
    parser.add_argument("--merge", action="store_true", help="compute adapters into the weights that they are beside")
    parser.add_argument("--base", type=str | None, default=None, help="where the weights below adapters are, if moved")
    return parser


def add_check(parser: CommandParser) -> None:
    """The option to leave out the comparison of what is written."""
    parser.add_argument(
        "--check",
        type=bool,
        nargs="?",
        const=True,
        default=True,
        help="compare the folder with the model in transformers, and write nothing that differs; false skips it",
    )


def main(arguments: list[str]) -> int:
    """Put whole fp32 weights together from the ranks' files and write them."""
    values = build_parser().parse_args(arguments)
    silence_libraries()
    from engine.export import Wish

    wish = Wish(values.check, values.merge, values.base)
    print(export(Path(values.run), Path(values.output), values.weights, wish), flush=True)
    return 0


def export(run: Path, output: Path, weights: str | None, wish: Wish) -> str:
    """Write the wanted weights; what was written and compared, in words.

    Raises:
        UserError: they aren't there or are damaged, or transformers makes another model of what was written.
    """
    if not str(output) or str(output) == ".":
        raise UserError("output: '.' is not allowed; name the folder to write")
    from engine.export import best_of, export_best, export_checkpoint, find_checkpoint

    best = None if weights == "last" else best_of(run)
    if best is None and weights == "best":
        raise UserError(f"weights: {str(run)!r} has no best weights; take --weights last")
    if best is not None:
        compared = export_best(run, output, wish)
        told = f"the best {best['metric']}, {best['value']:.4f} at step {best['step']}"
        line = f"exported {run / 'export'} ({told}) to {output}; --weights last takes the newest checkpoint"
    else:
        checkpoint = find_checkpoint(run)
        state, compared = export_checkpoint(checkpoint, output, wish)
        told = "" if state.best is None else f"; the best evaluation was {state.best:.4f} at step {state.best_step}"
        line = f"exported {checkpoint} to {output}{told}"
    nothing = "nothing, as --check false says" if not wish.check else "nothing: peft doesn't have the method"
    return f"{line}\nchecked: {compared or nothing}"
