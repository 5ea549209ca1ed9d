"""`zerobert quantise`: an int8 ONNX folder whose loss of accuracy is certified on the user's examples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from engine.compress.quantise.options import QuantiseConfig
from engine.zero.quiet import silence_libraries
from launch.cli import CommandParser, check_output, split_at_dashes
from launch.scored import check_data, scored_task

if TYPE_CHECKING:
    from engine.predict.model import ModelFolder

DESCRIPTION = """Write a model as an int8 ONNX folder, within a budget of accuracy that labelled examples certify.

  zerobert quantise runs/sst2 --output sst2-int8
  zerobert quantise sst2-onnx --output sst2-int8 --data runs/sst2 --budget 0.5 --method dynamic
  zerobert quantise my-classifier --output fast --data reviews.csv -- --labelled.text review --labelled.label stars

MODEL is a run, an exported or Hugging Face folder with a task's head, or an fp32 ONNX folder. DATA is a run, whose
test examples (or else validation examples) score the model and whose training texts calibrate it, or a labelled file
for both; options of `zerobert train` follow --. Where int8 costs more than the budget, the most sensitive layers stay
float. The report, also in quantise.json of the folder, tells accuracy before and after, bytes, latency, and layers."""


def build_parser() -> CommandParser:
    """The parser of the command, with the fields of `QuantiseConfig`."""
    parser = CommandParser(
        prog="zerobert quantise",
        usage="zerobert quantise MODEL --output DIR [--data DATA] [options] [-- TRAINING]",
        description=DESCRIPTION,
    )
    parser.add_argument("model", type=str, help="a run, an exported or Hugging Face folder, or an fp32 ONNX folder")
    parser.add_argument("--output", type=str, required=True, help="folder to write")
    parser.add_argument(
        "--data", type=str | None, default=None, help="a run, or a labelled file; null: the run that MODEL is"
    )
    parser.add_class_arguments(QuantiseConfig)
    return parser


def main(arguments: list[str]) -> int:
    """Quantise, and print the report.

    Raises:
        UserError: what is wrong with model, options or data.
    """
    own, training = split_at_dashes(arguments)
    values = build_parser().parse_args(own).as_dict()
    given, output, data = (values.pop(name) for name in ("model", "output", "data"))
    config = QuantiseConfig(**values)
    config.validate()
    check_output(output, Path(given))
    check_data(given, data)  # before the model is exported
    silence_libraries()
    from engine.compress.quantise.quantise import quantise

    with as_onnx(given) as model:
        task = scored_task(given, model, data, training, file_is_test=True)
        report = quantise(model, Path(output), task, config, lambda line: print(line, flush=True))
    print(f"\n{report}\nwritten   {output}", flush=True)
    return 0


@contextmanager
def as_onnx(given: str) -> Iterator[ModelFolder]:
    """The ONNX folder that a user names, or one made from the model that she names, which is gone afterwards.

    Raises:
        UserError: no such model, or none that can be a graph.
    """
    from engine.export import deployable, source_of
    from engine.onnx.folder import GraphWish, export_graph
    from engine.predict.model import open_folder

    with deployable(Path(given), None, None) as model:
        if model.is_onnx:
            yield model
            return
        with TemporaryDirectory(prefix="zerobert-") as room:
            folder = Path(room) / "onnx"
            export_graph(source_of(model), folder, GraphWish())
            yield open_folder(str(folder))
