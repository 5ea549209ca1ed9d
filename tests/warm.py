"""Processes that have imported what a run imports: a small run takes a second, its imports five.

One server a test session imports the libraries, and forks for each command. A fork has its own session, environment,
working folder and files, executes the script as `__main__`, and ends as any process of Python does. Ranks that are
started together get the variables that a launcher would give them. What a test says of launchers, of imports or of
signals needs real ones.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

#: seconds that ranks get after one of them has failed, as launchers give them
GRACE = 20.0


def preload() -> None:
    """Import what runs import, make what they make once, and start no thread, which forks would lose."""
    from engine.zero.quiet import import_deepspeed, silence_libraries

    silence_libraries()
    import_deepspeed()
    import datasets  # noqa: F401
    import deepspeed.module_inject.auto_ep_layer
    import deepspeed.ops.op_builder.all_ops
    import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    import sklearn.metrics  # noqa: F401
    import tensorboard.plugins.hparams.api_pb2  # noqa: F401
    import torch._dynamo
    import torch.utils.serialization
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import engine
    import launch
    from launch.configure.options import build_parser

    for package in (engine, launch):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    build_parser()
    get_checkpoint_conversion_mapping("bert")
    gc.freeze()  # what all forks share is no garbage of theirs


def serve(address: str) -> None:
    """Fork for every request, until the session that asked for this server has ended."""
    preload()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(16)
        print("ready", flush=True)
        while True:
            if 0 in select.select([0, listener], [], [])[0]:
                os._exit(0)
            connection, _ = listener.accept()
            with connection:
                message, files, _, _ = socket.recv_fds(connection, 1 << 20, 2)
                if os.fork() == 0:
                    listener.close()
                    supervise(connection, json.loads(message), files)
            for file in files:
                os.close(file)


def supervise(connection: socket.socket, request: dict[str, list[str]], files: Sequence[int]) -> None:
    """Start the ranks and tell how they ended; returns, or raises, in the ranks alone."""
    os.setsid()
    connection.sendall(f"{os.getpid():<16}".encode())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ranks = []
    for variables in request["ranks"]:
        ranks.append(os.fork())
        if ranks[-1] == 0:
            connection.detach()
            execute(request["command"], json.loads(variables), request["folder"][0], files)
    for file in files:
        os.close(file)
    connection.sendall(str(end_of(ranks)).encode())
    os._exit(0)


def end_of(ranks: Sequence[int]) -> int:
    """The exit code of the ranks: the first that isn't 0. A failed rank's companions end soon, or are ended."""
    code, left, deadline = 0, set(ranks), float("inf")
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            time.sleep(0.01)
            if time.monotonic() > deadline:
                deadline = float("inf")
                for rank in left:
                    os.kill(rank, signal.SIGKILL)
            continue
        left.discard(pid)
        ended = os.waitstatus_to_exitcode(status)
        if ended and not code:
            code, deadline = ended, time.monotonic() + GRACE
    return code


def execute(command: list[str], variables: dict[str, str], folder: str, files: Sequence[int]) -> NoReturn:
    """Become the process that a command line would have started."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    empty = os.open(os.devnull, os.O_RDONLY)
    for target, file in enumerate((empty, *files)):
        os.dup2(file, target)
    os.closerange(3, 64)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
    sys.exit(0)


class Started:
    """Ranks that go on: the part of `subprocess.Popen` that tests use, its pid that of the session of all ranks."""

    def __init__(self, command: list[str], connection: socket.socket, files: Sequence[TextIO]) -> None:
        self.returncode: int | None = None
        self._command, self._connection, self._files = command, connection, files
        self.pid = int(connection.recv(16))

    def poll(self) -> int | None:
        """The exit code, -9 if the whole session was killed, None while the ranks go on."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.returncode = int(self._connection.recv(16) or -signal.SIGKILL)
        return self.returncode

    def communicate(self, timeout: float = 240.0) -> tuple[str, str]:
        """What was printed until the end of the ranks, as Popen gives it.

        Raises:
            subprocess.TimeoutExpired: the ranks took too long; they go on.
        """
        if not select.select([self._connection], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self._command, timeout)
        self.poll()
        self._connection.close()
        for file in self._files:
            file.seek(0)
        printed, complained = (file.read() for file in self._files)
        for file in self._files:
            file.close()
        return printed, complained


class Server:
    """The one server of this process, started at the first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="warm")
        self._address = str(Path(self._folder.name) / "socket")

    def _warm_up(self, variables: Mapping[str, str]) -> None:
        with self._lock:
            if self._process is None:
                command = [sys.executable, "-m", "tests.warm", self._address]
                self._process = subprocess.Popen(
                    command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                    cwd=Path(__file__).resolve().parents[1], start_new_session=True,
                )  # fmt: skip
                assert self._process.stdout is not None
                assert self._process.stdout.readline() == "ready\n"

    def start(
        self, command: Sequence[str], ranks: Sequence[Mapping[str, str]], folder: Path, *, joined: bool = False
    ) -> Started:
        """Execute a script with its arguments once for each of the ranks' environments.

        With `joined` what is printed to standard error comes with the output, in its place.
        """
        self._warm_up(ranks[0])
        printed, complained = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115  Started closes them
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._address)
        variables = [json.dumps(dict(environment)) for environment in ranks]
        request = {"command": list(command), "ranks": variables, "folder": [str(folder)]}
        files = [printed.fileno(), (printed if joined else complained).fileno()]
        socket.send_fds(connection, [json.dumps(request).encode()], files)
        return Started(list(command), connection, (printed, complained))

    def run(
        self,
        command: Sequence[str],
        ranks: Sequence[Mapping[str, str]],
        folder: Path,
        *,
        joined: bool = False,
        timeout: float = 240.0,
    ) -> subprocess.CompletedProcess[str]:
        """Start, and wait for the end as `Started.communicate` does."""
        started = self.start(command, ranks, folder, joined=joined)
        printed, complained = started.communicate(timeout)
        assert started.returncode is not None
        return subprocess.CompletedProcess(list(command), started.returncode, printed, complained)


SERVER = Server()

if __name__ == "__main__":
    serve(sys.argv[1])
