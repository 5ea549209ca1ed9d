"""What stands before the application (an ASGI middleware): it reads bodies within limits, counts, and logs.

A request comes to the application with all of its body. One whose body is too large, too slow or one too many is
answered here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from launch.serve.metrics import Metrics
from launch.serve.options import ServeConfig

access = logging.getLogger("zerobert.access")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: seconds in which the rest of a refused body is thrown away, so that its client comes to read why: a connection that
#: is closed with bytes unread is reset, and its answer may be lost
LINGER = 1.0
#: bodies of the largest size that may be held at once
BODIES = 64
#: nginx's status of a client that went away before its answer
GONE = 499


class RefusedError(Exception):
    """A request that doesn't come to the application."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class GoneError(Exception):
    """The client went away while it sent its request."""


@dataclass
class Exchange:
    """A request and its answer, as far as they have come."""

    scope: Scope
    status: int = GONE
    received: int = 0
    """bytes of the body that are held"""


class Gate:
    """The ASGI application that uvicorn calls.

    Attributes:
        draining: whether the server stops: each answer is then the last of its connection.
        open: requests whose answer isn't over.
        lost: requests that the server stopped before their answer.
    """

    def __init__(self, app: App, paths: frozenset[str], config: ServeConfig, metrics: Metrics) -> None:
        """Args: paths are those of the application; others are counted together."""
        self.draining, self.open, self.lost = False, 0, 0
        self._app, self._paths, self._config, self._metrics = app, paths, config, metrics
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, exchange = time.monotonic(), Exchange(scope)
        self.open += 1

        async def answered(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                if self.draining:
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        try:
            await self._handle(exchange, receive, answered)
        except GoneError:
            exchange.status = GONE
        finally:
            self.open -= 1
            self._held -= exchange.received
            path = scope["path"] if scope["path"] in self._paths else "other"
            seconds = time.monotonic() - begun
            self._metrics.request(path, exchange.status, seconds)
            if self._config.access_log:
                access.info("%s", line(exchange, seconds))

    async def _handle(self, exchange: Exchange, receive: Receive, send: Send) -> None:
        try:
            body = await asyncio.wait_for(self._body(exchange, receive), self._config.client_timeout)
        except RefusedError as error:
            return await refuse(receive, send, error)
        except asyncio.TimeoutError:
            told = f"body: not whole after {self._config.client_timeout:g} s; send it faster"
            return await refuse(receive, send, RefusedError(408, told), linger=0.0)
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            await self._app(exchange.scope, replay, send)
        except asyncio.CancelledError:  # by the server, at the end of the grace time
            self.lost += 1
            if exchange.status == GONE:
                await refuse(receive, send, RefusedError(503, "server: it stops; ask another one"), linger=0.0)

    async def _body(self, exchange: Exchange, receive: Receive) -> bytes:
        """The body of a request.

        Raises:
            RefusedError: it is too large, or too many are held.
            GoneError: the client went away.
        """
        told = int(dict(exchange.scope["headers"]).get(b"content-length", b"0"))
        self._check(told, self._held + told)
        parts = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise GoneError
            parts.append(message.get("body", b""))
            exchange.received += len(parts[-1])
            self._held += len(parts[-1])
            self._check(exchange.received, self._held)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _check(self, size: int, held: int) -> None:
        """Args: size is that of one body, and held that of all."""
        most = self._config.max_body
        if size > most:
            raise RefusedError(413, f"body: more than {most:,} bytes (max_body); send fewer rows, or shorter ones")
        if held > BODIES * most:
            raise RefusedError(503, "server: too many requests are being read; ask again later")


async def refuse(receive: Receive, send: Send, error: RefusedError, linger: float = LINGER) -> None:
    """Answer a request that is not read to its end, and end its connection.

    Args:
        linger: seconds in which the rest of it is thrown away.
    """
    body = json.dumps({"error": str(error)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] + ([(b"retry-after", b"1")] if error.status == 503 else [])
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(_discard(receive), linger)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
        pass


def line(exchange: Exchange, seconds: float) -> str:
    """A request in the access log."""
    scope = exchange.scope
    client = scope.get("client")
    fields = {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "client": client[0] if client else None,
        "method": scope["method"],
        "path": scope["path"],
        "status": exchange.status,
        "ms": round(seconds * 1e3, 2),
        "bytes": exchange.received,
        "rows": scope.get("rows"),
    }
    return json.dumps(fields)
