"""A model, its queue, its application and its server, put together."""

from __future__ import annotations

import socket
from collections.abc import Callable

from engine.errors import RunError
from engine.predict.model import open_folder
from engine.predict.options import PredictConfig
from engine.predict.predictor import Predictor, predictor_of
from engine.predict.rows import Row
from engine.predict.stream import columns_of, resolved
from engine.predict.worker import device_for
from launch.serve.app import build_app
from launch.serve.batcher import Batcher
from launch.serve.metrics import Metrics
from launch.serve.options import ServeConfig
from launch.serve.schema import example_row
from launch.serve.server import build_server, raise_file_limit


class Service:
    """What serves a model."""

    def __init__(self, wanted: PredictConfig, config: ServeConfig) -> None:
        """The weights are not read yet.

        Raises:
            UserError: what is wrong with the model or the options.
        """
        self._config = config
        self.predictor = open_predictor(wanted)
        metrics = Metrics()
        self.batcher = Batcher(self.predictor, device_for(self.predictor.model, wanted.device), config, metrics)
        self.gate = build_app(self.predictor, self.batcher, config, metrics)
        self.server = build_server(self.gate, config)

    def run(self, listening: socket.socket, told: Callable[[str], object]) -> None:
        """Open the model, and serve it until a signal comes.

        Args:
            told: called with a line once the model is open.

        Raises:
            UserError: the model can't be opened.
            RunError: not all requests were answered within the grace time.
        """
        line = self.line(listening)  # the server closes the socket
        self.batcher.start(example_row(self.predictor), lambda: told(line), self._fail)
        raise_file_limit()
        try:
            self.server.run([listening])
        finally:
            self.batcher.close(self._config.grace)
        if self.batcher.failure is not None:
            raise self.batcher.failure
        if self.gate.lost:
            raise RunError(f"grace: {self.gate.lost} requests had no answer after {self._config.grace} s; give more")

    def _fail(self) -> None:
        self.server.should_exit = True

    def line(self, listening: socket.socket) -> str:
        """Where the server is, and what it serves."""
        host, port = listening.getsockname()[:2]
        at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        model, threads, device = self.predictor.model, self.batcher.threads, self.batcher.device.type
        what = f"{threads} {'threads' if threads > 1 else 'thread'}" if device == "cpu" else device
        return f"serving {model.folder} ({model.head}, {self.predictor.config.precision}, {what}) at http://{at}"


def open_predictor(wanted: PredictConfig) -> Predictor:
    """The predictor of a model; where nobody names the column of the text, it is what a line of txt becomes.

    Raises:
        UserError: what is wrong with the model or the options.
    """
    folder = open_folder(wanted.model, wanted.base)
    columns = columns_of(wanted, folder)
    return predictor_of(folder, resolved(wanted, columns, Row(0, {columns.usual[0]: ""})))
