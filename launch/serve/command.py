"""`zerobert serve`: a trained model's predictions over HTTP."""

from __future__ import annotations

import errno
import importlib.util
import logging
import os
import socket
import sys
from dataclasses import fields

from engine.errors import UserError
from engine.predict.options import PredictConfig
from engine.zero.quiet import silence_libraries
from launch.cli import CommandParser
from launch.serve.options import ServeConfig

DESCRIPTION = """Serve a model's predictions over HTTP, what several clients ask for at a time in the same batches.

  zerobert serve runs/sst2
  zerobert serve my-classifier --port 9000 --threads 4 --probabilities true
  curl localhost:8000/predict -H 'Content-Type: application/json' -d '{"rows": [{"text": "a fine film"}]}'

MODEL is what zerobert predict takes, and predictions are the same. POST /predict; GET / (the model), /docs and
/openapi.json (what requests have), /health, /ready, and /metrics (Prometheus).

It listens at this machine alone unless --host says otherwise: there is no password. SIGTERM and Ctrl-C stop it once
all that it has accepted is answered."""

#: options of a prediction from a file that have no meaning here, or are given otherwise
SKIPPED = {"model", "input", "output", "format", "prefix", "processes", "chunk_rows"}
MODEL = "a run's folder, an exported one, a Hugging Face folder with a task's head, or a model's name on the hub"
NEEDED = ("fastapi", "uvicorn", "prometheus_client")
#: connections that the system holds until they are accepted
BACKLOG = 2048


def build_parser() -> CommandParser:
    """The parser of the command, with the fields of `ServeConfig` and those of `PredictConfig` that apply."""
    parser = CommandParser(prog="zerobert serve", description=DESCRIPTION)
    parser.add_argument("model", type=str, help=MODEL)
    parser.add_class_arguments(ServeConfig)
    parser.add_class_arguments(PredictConfig, skip=SKIPPED)
    return parser


def main(arguments: list[str]) -> int:
    """Serve; the exit status.

    Raises:
        UserError: what is wrong with model or options, or an address that can't be had.
        RunError: requests that weren't answered before the end.
    """
    values = build_parser().parse_args(arguments).as_dict()
    config = ServeConfig(**{field.name: values.pop(field.name) for field in fields(ServeConfig)})
    config.validate()
    wanted = PredictConfig(**values, input="rows", output="-")
    wanted.validate()
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(f"serve needs {absent[0].replace('_', '-')}; pip install 'zerobert[serve]'")
    with listen(config.host, config.port) as listening:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a request is too small for it
        silence_libraries()
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        logging.getLogger("zerobert.access").setLevel(logging.INFO)
        logging.getLogger("uvicorn").setLevel(logging.ERROR)  # no line for each client that speaks no HTTP
        from engine.train.heap import keep_heap
        from launch.serve.service import Service

        keep_heap()
        Service(wanted, config).run(listening, lambda line: print(line, flush=True))
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        UserError: the address is taken, unknown, or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(f"host: {host!r} is no address that is known here ({error.strerror}); give another") from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port: {port} is in use at {host}; give another, or 0 for a free one") from error
        field, value = ("port", port) if error.errno == errno.EACCES else ("host", host)
        raise UserError(f"{field}: {value!r} can't be listened at ({error.strerror}); give another") from error
    return listening
