"""A signal ends a server once all that it accepted is answered."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engine.errors import RunError
from engine.predict.options import PredictConfig
from launch.serve.command import listen
from launch.serve.options import ServeConfig
from launch.serve.service import Service
from tests.conftest import ROOT
from tests.launch.serve.live import JSON, held, until

BODY = json.dumps({"rows": [{"text": "a quick fox"}]}).encode()


@dataclass
class Client:
    """Asks again and again until its server takes no connection."""

    port: int
    keeps: bool = True
    """its connection, for the next request"""
    asked: int = 0
    statuses: list[int] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        while True:
            if connection.sock is None:
                try:
                    connection.connect()
                except ConnectionRefusedError:
                    return
            self.asked += 1
            try:
                connection.request("POST", "/predict", BODY, JSON if self.keeps else {**JSON, "Connection": "close"})
                answer = connection.getresponse()
                answer.read()
                self.statuses.append(answer.status)
            except (OSError, http.client.HTTPException) as error:
                self.lost.append(repr(error))
                connection.close()


@contextlib.contextmanager
def clients(port: int, count: int) -> object:
    made = [Client(port, keeps=index % 2 == 0) for index in range(count)]
    threads = [threading.Thread(target=each.run) for each in made]
    for thread in threads:
        thread.start()
    yield made
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def check(made: list[Client]) -> None:
    """All is answered; but the system may make a connection in the microseconds before its socket is closed."""
    assert [each.lost for each in made if each.keeps] == [[]] * (len(made) // 2)
    assert sum(len(each.lost) for each in made) <= 1
    assert all(set(each.statuses) == {200} for each in made)
    assert sum(each.asked for each in made) > 16


def after(ready: threading.Event, do: object) -> threading.Thread:
    """A thread that does something once the server is ready."""

    def act() -> None:
        assert ready.wait(30)
        do()  # type: ignore[operator]

    thread = threading.Thread(target=act)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_all_that_was_accepted_is_answered(classifier: Path, number: signal.Signals) -> None:
    service = Service(PredictConfig(str(classifier), "rows", "-"), ServeConfig(grace=20))
    listening, ready = listen("127.0.0.1", 0), threading.Event()
    port, made = listening.getsockname()[1], list[Client]()

    def load() -> None:
        with clients(port, 8) as found:  # type: ignore[attr-defined]
            made.extend(found)
            time.sleep(0.5)
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = after(ready, load)
    service.run(listening, lambda _: ready.set())
    thread.join(30)
    assert signal.getsignal(number) is before
    check(made)


def test_idle_connections_do_not_hold_up_the_stop_and_are_answered_at_its_begin(classifier: Path) -> None:
    service = Service(PredictConfig(str(classifier), "rows", "-"), ServeConfig(grace=20))
    listening, ready = listen("127.0.0.1", 0), threading.Event()
    port, found = listening.getsockname()[1], list[object]()

    def idle() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("POST", "/predict", BODY, JSON)
        connection.getresponse().read()
        with socket.create_connection(("127.0.0.1", port)):
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: service.gate.draining)
            connection.request("GET", "/ready")
            answer = connection.getresponse()
            found.extend((answer.status, answer.headers["connection"], json.loads(answer.read())))
            until(lambda: not service.server.server_state.connections)

    begun = time.monotonic()
    thread = after(ready, idle)
    service.run(listening, lambda _: ready.set())
    thread.join(30)
    assert found == [503, "close", {"error": "server: it stops"}]
    assert time.monotonic() - begun < 10


def test_what_has_no_answer_after_the_grace_time_gets_503_and_the_command_fails(classifier: Path) -> None:
    service = Service(PredictConfig(str(classifier), "rows", "-"), ServeConfig(grace=1))
    listening, ready = listen("127.0.0.1", 0), threading.Event()
    port, found = listening.getsockname()[1], list[object]()

    def ask() -> None:
        with held(service):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            connection.request("POST", "/predict", BODY, JSON)
            until(lambda: service.gate.open == 1)
            os.kill(os.getpid(), signal.SIGTERM)
            answer = connection.getresponse()
            found.extend((answer.status, json.loads(answer.read())))

    thread = after(ready, ask)
    with pytest.raises(RunError, match="grace: 1 requests had no answer after 1 s; give more"):
        service.run(listening, lambda _: ready.set())
    thread.join(30)
    assert found == [503, {"error": "server: it stops; ask another one"}]


@pytest.mark.slow
def test_the_command_under_load_ends_with_0(classifier: Path) -> None:
    command = [sys.executable, "-m", "launch", "serve", str(classifier), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        assert line.startswith(f"serving {classifier} (sequence_classification, fp32, "), process.stderr.read()
        with clients(int(line.rpartition(":")[2]), 16) as made:  # type: ignore[attr-defined]
            time.sleep(2)
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert process.stdout.read() == ""
        assert "Traceback" not in process.stderr.read()
    check(made)
