"""`zerobert predict`: a trained model's predictions of every row of a file or a pipe."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from engine.predict.options import STANDARD, PredictConfig
from engine.zero.quiet import silence_libraries
from launch.cli import CommandParser

DESCRIPTION = """Add a model's predictions to the rows of a file or a pipe, in order; other columns stay as they are.

  zerobert predict runs/sst2 --input reviews.csv --output predicted.jsonl --probabilities true
  zerobert predict my-classifier --input pairs.parquet --text premise --text_pair claim --output predicted.csv
  zerobert predict org/ner-model --input articles.txt.gz --output spans.jsonl --processes 8
  cat reviews.txt | zerobert predict runs/sst2 --input - --format txt --output - | head

MODEL is a run's folder, an exported one, or a Hugging Face folder (or a model's name on the hub) of one of our
architectures with a task's head. Classes of texts, several labels, numbers, spans of texts, answers to questions, and
choices among options are predicted.

A run that was killed goes on where it stopped when the command is given again; FILE.progress.json beside the output
tells how far it has come. Under mpirun the ranks, on any nodes, are the processes."""


def build_parser() -> CommandParser:
    """The parser of the command, with the fields of `PredictConfig`."""
    parser = CommandParser(prog="zerobert predict", description=DESCRIPTION)
    parser.add_argument("model", type=str, help=_HELP["model"])
    parser.add_argument("--input", type=str, required=True, metavar="FILE", help=_HELP["input"])
    parser.add_argument("--output", type=str, required=True, metavar="FILE", help=_HELP["output"])
    parser.add_class_arguments(PredictConfig, skip=set(_HELP))
    parser.add_argument("--overwrite", action="store_true", help="replace an output, whatever it is")
    return parser


#: options that must be given
_HELP = {
    "model": "a run's folder, an exported one, a Hugging Face folder with a task's head, or a model's name on the hub",
    "input": "rows: .csv, .tsv, .jsonl, .parquet, or .txt with a text a line; the text formats also .gz, .xz, .bz2; - "
    "reads the standard input",
    "output": "file to write: .jsonl, .csv or .tsv; - writes JSON lines to the standard output",
}


def main(arguments: list[str]) -> int:
    """Predict; the exit status.

    Raises:
        UserError: what is wrong with model, options, input or output.
    """
    values = build_parser().parse_args(arguments).as_dict()
    overwrite = values.pop("overwrite")
    config = PredictConfig(**values)
    config.validate()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if config.processes == 1 else "false")
    silence_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from engine.data.text.progress import ReadingProgress
    from engine.predict.stream import predict_file
    from engine.train.heap import keep_heap

    keep_heap()
    size = Path(config.input).stat().st_size if Path(config.input).is_file() else 0
    progress = ReadingProgress(size, "predict")
    try:
        summary = predict_file(config, overwrite=overwrite, read=progress.update)
    except BrokenPipeError:  # the reader of the pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        progress.close()
    if summary is not None:
        told = sys.stderr if config.output == STANDARD else sys.stdout
        print(summary.line(config.output), file=told, flush=True)
    return 0
