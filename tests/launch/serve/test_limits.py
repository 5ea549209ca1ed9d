"""Bodies, clients and numbers of requests that a server refuses, while it goes on to answer others."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from launch.serve import gate as gate_module
from tests.launch.serve.live import JSON, Live, held, serving, until

ROW = {"text": "a quick fox"}
HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"

#: by name: the body, the status and what its line begins with
BODIES: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 422, "body: give a JSON object with rows"),
    "no JSON": (b'{"rows": [', 422, "body: not JSON at character 10: Expecting value"),
    "not UTF-8": (b'{"rows": [{"text": "\xff"}]}', 400, "There was an error parsing the body"),
    "too deep": (b"[" * 4000, 400, "There was an error parsing the body"),
    "a list": (b"[]", 422, "body: give a JSON object with rows"),
    "no rows": (b"{}", 422, "rows: Field required"),
    "empty rows": (b'{"rows": []}', 422, "rows: List should have at least 1 item"),
    "too many rows": (json.dumps({"rows": [ROW] * 9}).encode(), 422, "rows: List should have at most 8 items"),
    "rows of text": (b'{"rows": ["fox"]}', 422, "rows, line 1: "),
    "another column": (b'{"rows": [{"text": "a"}, {"body": "a"}]}', 422, "rows, line 2: column 'text': Field required"),
    "a column more": (b'{"rows": [{"text": "a", "id": 1}]}', 422, "rows, line 1: column 'id': Extra inputs"),
    "a field more": (b'{"rows": [{"text": "a"}], "top": 1}', 422, "top: Extra inputs are not permitted"),
    "a number": (b'{"rows": [{"text": 1}]}', 422, "rows, line 1: column 'text': Input should be a valid string"),
    "null": (b'{"rows": [{"text": null}]}', 422, "rows, line 1: column 'text': Input should be a valid string"),
    "half a character": (b'{"\\ud800": 1, "rows": [{"text": "a"}]}', 422, "body: give a JSON object with rows"),
    "too many tokens": (
        json.dumps({"rows": [{"text": "fox " * 30}] * 4}).encode(),
        422,
        "rows: 128 tokens in all are not allowed; give at most 100 a request",
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_body_is_one_line(live: Live, name: str) -> None:
    body, status, line = BODIES[name]
    reply = live.ask("POST", "/predict", body)
    assert reply.status == status, reply.content
    assert reply.error.startswith(line)
    assert live.predict([ROW]).status == 200


def test_a_body_needs_its_type(live: Live) -> None:
    body = json.dumps({"rows": [ROW]}).encode()
    assert live.ask("POST", "/predict", body, {"Content-Type": "text/plain"}).status == 422
    assert live.ask("POST", "/predict", body, {"Content-Type": "application/json; charset=utf-8"}).status == 200


@pytest.mark.parametrize("way", ["told", "chunked", "GET"])
def test_ten_megabytes_are_refused_and_the_client_reads_why(live: Live, way: str) -> None:
    body, headers = b"x" * 10_000_000, dict(JSON)
    if way == "chunked":
        headers["Transfer-Encoding"] = "chunked"
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    before = live.metric("process_resident_memory_bytes")
    reply = live.ask("GET" if way == "GET" else "POST", "/predict", body, headers)
    assert (reply.status, reply.headers["connection"]) == (413, "close")
    assert reply.error.startswith("body: more than 4,096 bytes (max_body)")
    assert live.metric("process_resident_memory_bytes") - before < 9e6
    until(lambda: live.service.gate._held == 0)


def test_a_body_that_never_ends_is_cut(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "LINGER", 0.2)
    begun = time.monotonic()
    with live.connect(HEAD + b"Transfer-Encoding: chunked\r\n\r\n") as endless, contextlib.suppress(OSError):
        while time.monotonic() - begun < 10:
            endless.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
    assert time.monotonic() - begun < 5


def read_all(connection: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


WHOLE = json.dumps({"rows": [ROW]}).encode()
#: what slow clients send, and what their answer begins with once they are cut
SLOW = [
    (b"", b""),
    (HEAD, b""),
    (HEAD + b"Content-Length: 50\r\n\r\n{", b"HTTP/1.1 408"),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", b"HTTP/1.1 408"),
    (HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(WHOLE), WHOLE) + HEAD, b"HTTP/1.1 200"),  # one and a half
]


def test_slow_clients_are_cut(live: Live) -> None:
    with contextlib.ExitStack() as stack:
        opened = [(stack.enter_context(live.connect(sent)), answer) for sent, answer in SLOW * 4]
        for connection, answer in opened:
            assert read_all(connection)[:12] == answer
    until(lambda: not live.service.server.server_state.connections)


def test_others_do_not_wait_for_slow_clients(classifier: Path) -> None:
    with serving(classifier, client_timeout=60, grace=1) as live, contextlib.ExitStack() as stack:
        for sent, _ in SLOW * 40:
            stack.enter_context(live.connect(sent))
        assert [live.predict([ROW]).status for _ in range(3)] == [200] * 3
        assert len(live.service.server.server_state.connections) >= 200


def test_a_slow_trickle_does_not_keep_a_connection(live: Live) -> None:
    """Each byte comes in time, and the head doesn't."""
    begun = time.monotonic()
    with live.connect() as connection, contextlib.suppress(OSError):
        for byte in HEAD * 10:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
            if time.monotonic() - begun > 5:
                break
    assert time.monotonic() - begun < 3


def test_a_client_that_does_not_read_is_cut(classifier: Path) -> None:
    """Though it goes on to send."""
    ask = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    with serving(classifier, client_timeout=0.3) as live, live.connect(ask * 100) as deaf:
        server = live.service.server.server_state
        until(lambda: len(server.connections) == 1)

        def cut() -> bool:
            with contextlib.suppress(OSError):
                deaf.sendall(ask)
            return not server.connections

        deaf.settimeout(0.05)
        until(cut)
        assert live.get("/health").status == 200


def test_too_many_rows_that_wait_are_refused(classifier: Path) -> None:
    with serving(classifier, max_queue=4, max_rows=4, max_batch=1) as live, ThreadPoolExecutor(8) as clients:
        with held(live.service) as release:
            computed = clients.submit(live.predict, [ROW])
            until(lambda: live.service.gate.open == 1 and live.service.batcher.waiting == 0)
            waiting = [clients.submit(live.predict, [ROW] * 2) for _ in range(2)]
            until(lambda: live.service.batcher.waiting == 4)
            assert live.metric("zerobert_queue_rows") == 4
            reply = live.predict([ROW])
            assert (reply.status, reply.headers["retry-after"]) == (503, "1")
            assert reply.error == "server: 4 rows wait already (max_queue); ask again later"
            assert live.get("/health").status == 200
            release()
            assert [each.result().status for each in (computed, *waiting)] == [200] * 3
        assert live.predict([ROW]).status == 200
        assert live.metric('zerobert_requests_total{path="/predict",status="503"}') == 1


def test_an_answer_that_takes_too_long_is_504_and_is_not_computed(classifier: Path) -> None:
    with serving(classifier, timeout=0.2, max_batch=1) as live, ThreadPoolExecutor(2) as clients:
        with held(live.service):
            replies = list(clients.map(live.predict, [[ROW], [ROW]]))
            assert [reply.status for reply in replies] == [504, 504]
            assert replies[0].error.startswith("server: no answer in 0.2 s (timeout)")
        assert live.predict([ROW]).status == 200
        assert live.metric("zerobert_rows_total") == 2  # the first one was under way


def test_what_nobody_waits_for_is_not_computed(classifier: Path) -> None:
    with serving(classifier, max_batch=1) as live, ThreadPoolExecutor(1) as clients:
        body = json.dumps({"rows": [ROW]}).encode()
        with held(live.service) as release:
            kept = clients.submit(live.predict, [ROW])
            until(lambda: live.service.gate.open == 1 and live.service.batcher.waiting == 0)
            with live.connect(HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)):
                until(lambda: live.service.batcher.waiting == 1)
            until(lambda: live.service.gate.open == 1)
            release()
            assert kept.result().status == 200
        assert live.metric("zerobert_rows_total") == 1
        assert live.metric('zerobert_requests_total{path="/predict",status="499"}') == 1


def test_long_texts_are_refused_on_demand(classifier: Path) -> None:
    with serving(classifier, {"max_length": 8}, long_texts="refuse") as live:
        reply = live.predict([ROW, {"text": "fox " * 9}])
        assert reply.status == 422
        assert reply.error.startswith("rows: 1 of 2 have more than the 8 tokens that are read; shorten them")
        assert live.predict([ROW]).body["truncated"] == 0


def test_bodies_that_are_held_have_a_bound(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "BODIES", 2)
    begun = HEAD + b"Content-Length: 1024\r\n\r\n" + b" " * 1000
    with serving(classifier, max_body=1024) as live, live.connect(begun), live.connect(begun):
        until(lambda: live.service.gate._held == 2000)
        reply = live.predict([{"text": "fox " * 20}])
        assert (reply.status, reply.error) == (503, "server: too many requests are being read; ask again later")


def test_a_failure_is_500_and_the_next_request_is_answered(classifier: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: Any) -> Tensor:
        raise ArithmeticError("a secret of the model")

    with serving(classifier) as live:
        live.service.predictor.logits = broken  # type: ignore[method-assign]
        with caplog.at_level(logging.ERROR):
            reply = live.predict([ROW])
        assert (reply.status, reply.error) == (500, "server: a failure, of which its log tells")
        assert "a secret of the model" in caplog.text
        del live.service.predictor.logits  # type: ignore[misc]
        assert live.predict([ROW]).status == 200


def test_the_access_log_tells_of_requests_and_not_of_texts(classifier: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "zerobert.access"):
        with serving(classifier, access_log=True) as live:
            live.predict([ROW, ROW])
            live.predict([{"txt": "a secret"}])
        lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "zerobert.access"]
    shown = [(line["method"], line["path"], line["status"], line["rows"]) for line in lines]
    assert shown == [("POST", "/predict", 200, 2), ("POST", "/predict", 422, None)]
    assert all(line["client"] == "127.0.0.1" and line["bytes"] and line["ms"] > 0 for line in lines)
    assert "fox" not in caplog.text
    assert "secret" not in caplog.text
    assert threading.active_count() < 50
