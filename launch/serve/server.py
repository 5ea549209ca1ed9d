"""uvicorn, with what it lacks: time-outs for slow clients, and a stop that loses nothing and ends with exit code 0."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from launch.serve.gate import Gate
from launch.serve.options import ServeConfig

#: seconds that a connection may wait for its next request: longer than the proxies that keep them open
KEEP_ALIVE = 75
#: seconds for which idle connections stay open once the server stops: what their clients send now is still answered
IDLE_AT_STOP = 0.5


class Connection(H11Protocol):
    """A client's connection; one that is slow is closed."""

    #: seconds for the head of a request, and for a client to make room for more of an answer
    patience = 10.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await_head()
        else:
            self._head_is_there()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_there()
        self._answer_is_read()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self._unread or self.loop.call_later(self.patience, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._answer_is_read()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection; one whose client hasn't read the last answer would stay, so it is cut."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _await_head(self) -> None:
        """A request has begun."""
        self._head = self._head or self.loop.call_later(self.patience, self._end_head)

    def _head_is_there(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _answer_is_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _end_head(self) -> None:
        self._head = None
        if self.conn.their_state is h11.IDLE:
            self.transport.abort()

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def shutdown(self) -> None:
        """The server stops: the answer under way is the last one, and an idle connection ends soon."""
        if self.idle:
            self.loop.call_later(IDLE_AT_STOP, self._end_idle)
        else:
            super().shutdown()

    def _end_idle(self) -> None:
        if self.idle and not self.transport.is_closing():
            super().shutdown()


class Server(uvicorn.Server):
    """A server that tells its gate when it stops."""

    def __init__(self, config: uvicorn.Config, protocol: type[Connection], gate: Gate) -> None:
        super().__init__(config)
        self._protocol, self._gate = protocol, gate

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        """Stop at SIGTERM and Ctrl-C, as uvicorn does, which then dies of the signal; this one ends well."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, and answer what came on those that there are.

        The system resets connections that it has made and that are still to be accepted when a socket is closed: so
        they are accepted just before. Clients are sent away only then, for they come back at once.
        """
        waiting = [connection for listening in sockets or [] for connection in pending(listening)]
        for server in self.servers:
            server.close()
        self._gate.draining = True
        loop = asyncio.get_running_loop()
        for connection in waiting:
            await loop.connect_accepted_socket(lambda: self._protocol(self.config, self.server_state, {}), connection)
        await super().shutdown(sockets)


def pending(listening: socket.socket) -> Iterator[socket.socket]:
    """The connections that are to be accepted."""
    with contextlib.suppress(OSError):
        while True:
            yield listening.accept()[0]


def build_server(gate: Gate, config: ServeConfig) -> Server:
    """The server of an application."""
    protocol = type("Connection", (Connection,), {"patience": config.client_timeout})
    options = uvicorn.Config(
        gate,  # type: ignore[arg-type]
        http=protocol,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=config.grace,
    )
    return Server(options, protocol, gate)


def raise_file_limit() -> None:
    """Allow as many open files, and so connections, as the system lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
