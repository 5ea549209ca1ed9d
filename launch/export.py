"""`zerobert export`: a run's weights as a Hugging Face folder or an ONNX graph, on any machine, without ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from engine.errors import UserError
from engine.zero.quiet import silence_libraries
from launch.cli import CommandParser, check_output

if TYPE_CHECKING:
    from engine.export import Wish

Format = Literal["huggingface", "onnx", "triton"]
GraphPrecision = Literal["fp32", "fp16"]

DESCRIPTION = """Write a run's weights as a folder that transformers opens, or as a graph that onnxruntime computes.

  zerobert export runs/sst2 --output my-classifier                  the best weights of a fine-tuning run
  zerobert export runs/sst2 --weights last --output my-classifier   those of its newest checkpoint
  zerobert export runs/base/checkpoints/step-020000 --output bert   those of that step
  zerobert export runs/lora --merge --output my-classifier          adapters computed into the weights below them
  zerobert export runs/sst2 --format onnx --output sst2-onnx        a graph, of a run or any folder with a task's head
  zerobert export my-classifier --format onnx --precision fp16 --samples reviews.csv --output fast
  zerobert export runs/sst2 --format triton --output models/sst2    a model of a Triton repository

Labels and tokenizer are those of the run, whatever its data files hold today. Before the folder gets its name,
transformers opens it and must compute the logits that our modules compute; so must onnxruntime of a graph."""


def build_parser() -> CommandParser:
    """The parser of the command."""
    parser = CommandParser(prog="zerobert export", description=DESCRIPTION)
    parser.add_argument(
        "run",
        type=str,
        help="output folder of a run, or one of its step-NNNNNN folders; of a graph also an exported folder, or any "
        "Hugging Face folder of our architectures with a task's head",
    )
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
    parser.add_argument(
        "--format",
        type=Format,
        default="huggingface",
        help="huggingface: weights; onnx: a graph, with adapters computed into the weights; triton: a graph as a model "
        "of a Triton repository, called as the output folder",
    )
    parser.add_argument(
        "--precision",
        type=Literal["fp32", "fp16", "int8"] | None,
        default=None,
        help="of a graph; fp32 unless it is given. int8 is made by zerobert quantise, which measures what it costs",
    )
    parser.add_argument(
        "--samples",
        type=str | None,
        default=None,
        metavar="FILE",
        help="rows that a graph is compared on; random ids without them",
    )
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
    run, output = Path(values.run), Path(values.output)
    check_output(str(output), run)
    if values.precision == "int8":
        raise UserError(
            "precision: 'int8' is not allowed here; give fp32 or fp16, or let zerobert quantise write the graph, which "
            "measures what int8 costs"
        )
    graph = values.format != "huggingface"
    for name, needless in (("precision", not graph), ("samples", not graph), ("merge", graph)):
        if needless and values[name]:
            why = "always merges" if graph else "has no such thing"
            raise UserError(f"{name}: {values[name]!r} has no effect: format {values.format} {why}; leave it out")
    silence_libraries()
    from engine.export import Wish

    wish = Wish(values.check, values.merge, values.base)
    if graph:
        told = export_onnx(run, output, values.weights, wish, values.precision or "fp32", values.samples, values.format)
    else:
        told = export(run, output, values.weights, wish)
    print(told, flush=True)
    return 0


def export_onnx(
    run: Path,
    output: Path,
    weights: str | None,
    wish: Wish,
    precision: GraphPrecision = "fp32",
    samples: str | None = None,
    kind: str = "onnx",
) -> str:
    """Write a model as an ONNX graph; what was written and compared, in words.

    Args:
        samples: a file of rows to compare it on; None: random ids.
        kind: "onnx" or "triton".

    Raises:
        UserError: no such model or weights, a missing package, or a graph that computes something else.
    """
    from engine.export import deployable, samples_of, source_of
    from engine.onnx.folder import GraphWish, export_graph

    with deployable(run, weights, wish.base) as model:
        given = None if samples is None else samples_of(model, samples)
        found = export_graph(source_of(model), output, GraphWish(precision, given, wish.check, kind == "triton"))
    return f"exported {run} to {output}: {found}"


def export(run: Path, output: Path, weights: str | None, wish: Wish) -> str:
    """Write the wanted weights; what was written and compared, in words.

    Raises:
        UserError: they aren't there or are damaged, or transformers makes another model of what was written.
    """
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
