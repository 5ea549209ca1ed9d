"""`zerobert prepare`: raw text -> vocabulary and token store."""

from __future__ import annotations

import logging
import sys

from engine.data.store.executor import open_executor
from engine.data.store.prepare import PrepareConfig, prepare
from launch.cli import CommandParser

DESCRIPTION = """Turn raw text into a token store for pre-training.

  zerobert prepare --output data/python
  zerobert prepare --source wiki.jsonl.xz --text_field text --output data/wiki
  zerobert prepare --source a.txt books/ --documents file --tokenizer path/to/bert --output data/books
  mpirun -n 16 zerobert prepare --source crawl/ --output data/crawl

The store has the same bytes for every number of workers. A run that was killed goes on where it stopped when
the command is given again. Under mpirun the output folder must be on a file system that all nodes share."""

#: fields that read better as plain options than as YAML lists and booleans
PLAIN = {"source", "special_tokens", "overwrite"}


def build_parser() -> CommandParser:
    """The parser of the command, with the fields of `PrepareConfig`."""
    parser = CommandParser(prog="zerobert prepare", description=DESCRIPTION)
    parser.add_argument(
        "--source",
        nargs="+",
        metavar="PATH",
        default=["embedded"],
        help="files, folders of files (recursive), saved `datasets` folders, datasets:NAME[:CONFIG], or embedded: the "
        "documentation that comes with Python, which needs no network. Files: .txt, .md or no suffix, .jsonl, .json "
        "of lines (each also .gz, .xz, .bz2), .parquet; files of WikiExtractor are recognised",
    )
    parser.add_class_arguments(PrepareConfig, skip=PLAIN)
    parser.add_argument(
        "--special_tokens",
        nargs="+",
        metavar="TOKEN",
        default=[],
        help="further special tokens: of a learned vocabulary, after [PAD] [UNK] [CLS] [SEP] [MASK]; of a given "
        "tokenizer, after its last token unless it has them",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a store that was made with other settings")
    return parser


def parse(arguments: list[str]) -> PrepareConfig:
    """The command line as a configuration.

    Raises:
        UserError: an unknown option or a value of the wrong type.
    """
    return PrepareConfig(**build_parser().parse_args(arguments).as_dict())


def main(arguments: list[str]) -> int:
    """Run the command; the exit status.

    Raises:
        UserError: what is wrong with the options or the text.
    """
    config = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    for library in ("httpx", "httpx2"):  # which tell of each request to the hub
        logging.getLogger(library).setLevel(logging.WARNING)
    with open_executor(config.workers) as opened:
        if opened is not None:
            prepare(config, *opened)
    return 0
