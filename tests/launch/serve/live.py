"""Servers of tiny models in a thread of the tests, and clients of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.predict.options import PredictConfig
from launch.serve.command import listen
from launch.serve.options import ServeConfig
from launch.serve.service import Service

JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Reply:
    """An answer."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.content)

    @property
    def error(self) -> str:
        """Its line."""
        assert list(self.body) == ["error"], self.body
        text: str = self.body["error"]
        assert len(text.splitlines()) == 1
        return text


@dataclass(frozen=True)
class Live:
    """A server that runs."""

    port: int
    service: Service

    def ask(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = JSON) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> Reply:
        return self.ask("GET", path)

    def predict(self, rows: Sequence[Mapping[str, Any]]) -> Reply:
        return self.ask("POST", "/predict", json.dumps({"rows": list(rows)}).encode())

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").content.decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    def connect(self, first: bytes = b"") -> socket.socket:
        """A connection on which these bytes were sent."""
        opened = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        opened.sendall(first)
        return opened


@contextlib.contextmanager
def serving(folder: Path, wanted: Mapping[str, Any] | None = None, **options: Any) -> Iterator[Live]:
    """A server of a model, from when it is ready until the block is over."""
    service = Service(PredictConfig(str(folder), "rows", "-", **(wanted or {})), ServeConfig(**options))
    listening = listen("127.0.0.1", 0)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)  # so that who doesn't read is noticed soon
    port, ready = listening.getsockname()[1], threading.Event()
    thread = threading.Thread(target=service.run, args=(listening, lambda _: ready.set()))
    thread.start()
    try:
        assert ready.wait(30)
        yield Live(port, service)
    finally:
        service.server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@contextlib.contextmanager
def held(service: Service) -> Iterator[Callable[[], None]]:
    """Let the model compute nothing until the given function is called, or the block is over."""
    free, compute = threading.Event(), service.predictor.logits

    def logits(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
        assert free.wait(30)
        return compute(model, batch)

    service.predictor.logits = logits  # type: ignore[method-assign]
    try:
        yield free.set
    finally:
        free.set()
        service.predictor.logits = compute  # type: ignore[method-assign]


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait for something."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)
