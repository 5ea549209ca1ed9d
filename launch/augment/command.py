"""`zerobert augment`: a file of labelled examples with new ones made of them."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from engine.zero.quiet import silence_libraries
from launch.augment.options import AugmentConfig
from launch.cli import CommandParser

DESCRIPTION = """Write the rows of a labelled file, each followed by new rows that are made of it.

  zerobert augment --input train.jsonl --output more.jsonl --copies 4
  zerobert augment --input train.csv --output even.csv --text review --label stars --balance true
  zerobert augment --input ner.conll --output more.jsonl --task token_classification
  zerobert augment --input train.jsonl --output more.jsonl --method eda_neighbours --model runs/base/export

Labels are copied, and tags move with their words. A new row differs from all others of its row; its column
augmented is its number, and 0 in the rows of the input. Give a run on the output its own labelled.validation: a tenth
held out of it would hold copies of what is learned. A command that was killed goes on when it is given again."""

#: options that must be given
_HELP = {
    "input": "labelled rows: .csv, .tsv, .jsonl, .parquet, of token_classification also CoNLL columns; also with .gz, "
    ".xz, .bz2",
    "output": "file to write: .jsonl, .csv or .tsv; of token_classification .jsonl",
}


def build_parser() -> CommandParser:
    """The parser of the command, with the fields of `AugmentConfig`."""
    parser = CommandParser(prog="zerobert augment", description=DESCRIPTION)
    for name, told in _HELP.items():
        parser.add_argument(f"--{name}", type=str, required=True, metavar="FILE", help=told)
    parser.add_class_arguments(AugmentConfig, skip=set(_HELP))
    parser.add_argument("--overwrite", action="store_true", help="replace an output, whatever it is")
    return parser


def main(arguments: list[str]) -> int:
    """Augment; the exit status.

    Raises:
        UserError: what is wrong with options, model, input or output.
    """
    values = build_parser().parse_args(arguments).as_dict()
    overwrite = values.pop("overwrite")
    config = AugmentConfig(**values)
    config.validate()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true" if config.processes == 1 else "false")
    silence_libraries()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    from engine.data.text.progress import ReadingProgress
    from launch.augment.stream import augment_file

    size = Path(config.input).stat().st_size if Path(config.input).is_file() else 0
    progress = ReadingProgress(size, "augment")
    try:
        summary = augment_file(config, overwrite=overwrite, read=progress.update)
    finally:
        progress.close()
    if summary is not None:
        print(summary.line(config.output), flush=True)
    return 0
