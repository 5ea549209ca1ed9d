"""What a server is asked for; without torch, so that a command line can ask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engine.errors import UserError, require

#: least values of the options that are numbers
LEAST = {
    "port": 0,
    "threads": 1,
    "max_batch": 1,
    "max_wait_ms": 0,
    "max_queue": 1,
    "max_rows": 1,
    "max_tokens": 4,
    "max_body": 1024,
}
LAST_PORT = 65535


@dataclass(frozen=True)
class ServeConfig:
    """Where the server listens, how it gathers requests, and what it refuses."""

    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0: all of this machine's, for everybody who reaches it: there is no password"""
    port: int = 8000
    """0: a free one, which the line at the start tells"""
    threads: int | None = None
    """CPU threads that compute; null: OMP_NUM_THREADS, else one a core"""
    max_batch: int = 32
    """rows of several requests that are computed together; a request with more is computed alone"""
    max_wait_ms: float = 0.0
    """milliseconds that a request may wait for others to be computed with; 0: only while earlier ones are computed"""
    max_queue: int = 1024
    """rows that may wait; a request that comes when there is no room is answered by 503"""
    max_rows: int = 256
    """rows of a request"""
    max_tokens: int = 32768
    """tokens of a request, of all its rows and their windows"""
    max_body: int = 1_048_576
    """bytes of a request's body; all that are held at once may have 64 times as many"""
    long_texts: Literal["cut", "refuse"] = "cut"
    """texts with more tokens than the model reads, of classification and embeddings: cut them as `zerobert predict`
    does, and tell how many in the answer, or refuse the request"""
    timeout: float = 30.0
    """seconds from the end of a request to its answer, else 504"""
    client_timeout: float = 10.0
    """seconds that a client has to send the head of a request, and then its body, and to read from an answer"""
    grace: int = 30
    """seconds after SIGTERM or Ctrl-C in which all that was accepted is answered"""
    access_log: bool = False
    """write a JSON line for each request to stderr: time, client, path, status, duration, sizes; never its texts"""

    def validate(self) -> None:
        """Refuse values that no model makes right.

        Raises:
            UserError: names the option, its value and the remedy.
        """
        require(bool(self.host.strip()), "host", self.host, "give an address or a name")
        for name, least in LEAST.items():
            value = getattr(self, name)
            require(value is None or least <= value < float("inf"), name, value, f"give at least {least}")
        require(self.port <= LAST_PORT, "port", self.port, f"give at most {LAST_PORT}")
        for name in ("timeout", "client_timeout", "grace"):
            value = getattr(self, name)
            require(0 < value < float("inf"), name, value, "give a number of seconds above 0")
        if self.max_rows > self.max_queue:
            raise UserError(f"max_queue: {self.max_queue} has no room for the {self.max_rows} of max_rows; raise it")
