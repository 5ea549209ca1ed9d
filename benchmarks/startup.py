"""From the command to the end of the first step, against a bare script under the same launcher.

    python -m benchmarks.startup

Each rival is `deepspeed --num_accelerators 2` on CPU ranks of one thread. The clock starts before the launcher and
stops when rank 0 prints that its first step is done; what a run does after that (evaluation, export) is not waited
for. The bare script (`benchmarks/bare_start.py`) imports DeepSpeed, builds torch layers of the same size, wraps them by
the very DeepSpeed configuration of the run, and steps once on random ids: no data, no curves, no certificate. The
processor time is that of the launcher and all ranks; another program's load lengthens it less than the wall clock.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import ROOT, Timing, add_unjudged, finish, goal

WIDTH, LAYERS, HEADS, LENGTH, BATCH = 64, 2, 2, 64, 16
#: seconds after which a start counts as hung
LIMIT = 300
#: rivals as options of zerobert's run; the bare script is one more
RUNS: dict[str, list[str]] = {"zerobert": [], "zerobert, certificate off": ["--train.verify_update=0"]}
BARE = "bare script"
#: seconds later than the bare script that are allowed
TARGET = 2.0


class Starts(NamedTuple):
    """Seconds from the command to the first step, of each round."""

    wall: list[float]
    processor: list[float]


def launcher(ranks: int) -> list[str]:
    """The command up to the script, at a free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    deepspeed = Path(sys.executable).with_name("deepspeed")
    return [sys.executable, str(deepspeed), "--quiet", f"--num_accelerators={ranks}", f"--master_port={port}"]


def training(data: Path, output: Path, options: list[str]) -> list[str]:
    """The arguments of a pre-training run of the tiny model that would go on after its first step."""
    return [
        str(ROOT / "launch" / "train.py"), f"--data.path={data}", f"--output={output}",
        f"--model.hidden_size={WIDTH}", f"--model.layers={LAYERS}", f"--model.heads={HEADS}",
        f"--model.max_positions={LENGTH}", f"--data.sequence_length={LENGTH}", f"--train.global_batch={BATCH}",
        "--train.steps=100000", "--train.log_interval=1", "--train.eval_interval=0", "--train.save_interval=null",
        *options,
    ]  # fmt: skip


def bare(config: Path, vocabulary: int) -> list[str]:
    """The arguments of the bare script."""
    sizes = {"vocabulary": vocabulary, "width": WIDTH, "layers": LAYERS, "heads": HEADS, "length": LENGTH}
    script = Path(__file__).with_name("bare_start.py")
    return [str(script), f"--deepspeed_config={config}", *(f"--{name}={size}" for name, size in sizes.items())]


def time_first_step(command: list[str]) -> tuple[float, float]:
    """Start `command`, wait for its line "step 1…", and end it; wall and processor seconds until that line.

    Raises:
        RuntimeError: with what was printed, if the line never came.
    """
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout is not None
    printed = []
    try:
        for line in process.stdout:
            if line.startswith("step 1"):
                return time.perf_counter() - start, processor_seconds(process.pid)
            printed.append(line)
            if time.perf_counter() - start > LIMIT:
                break
    finally:
        end_session(process)
    raise RuntimeError("no first step:\n" + "".join(printed))


def members(session: int) -> Iterator[tuple[int, list[str]]]:
    """Process id, and the fields of /proc/PID/stat after the name, of each process of a session.

    DeepSpeed's launcher, its ranks and their loaders share the session that the benchmark gave to the launcher.
    """
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session:
                    yield int(entry.name), fields


def processor_seconds(session: int) -> float:
    """User and system time of a session's processes and of those that they have waited for."""
    ticks = sum(int(field) for _, fields in members(session) for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def end_session(process: subprocess.Popen[str]) -> None:
    """End every process of the launcher's session and wait for the launcher."""
    for identifier, _ in members(process.pid):
        with contextlib.suppress(OSError):
            os.kill(identifier, signal.SIGKILL)
    process.communicate()


def measure(rivals: dict[str, Callable[[], list[str]]], ranks: int, repeats: int) -> dict[str, Starts]:
    """Starts of each rival, one after the other in every round, after one round unmeasured."""
    starts = {name: Starts([], []) for name in rivals}
    for round_number in range(repeats + 1):
        for name, arguments in rivals.items():
            wall, processor = time_first_step([*launcher(ranks), *arguments()])
            if round_number:
                starts[name].wall.append(wall)
                starts[name].processor.append(processor)
    return starts


def table(starts: dict[str, Starts]) -> dict[str, dict[str, Any]]:
    """Seconds of each rival, and the median over the rounds of how much later it is than the bare script."""
    rows: dict[str, dict[str, Any]] = {}
    for name, own in starts.items():
        later = [a - b for a, b in zip(own.wall, starts[BARE].wall, strict=True)]
        more = [a - b for a, b in zip(own.processor, starts[BARE].processor, strict=True)]
        rows[name] = {
            "median_s": statistics.median(own.wall),
            "spread": Timing(own.wall).spread,
            "best_s": min(own.wall),
            "later_s": statistics.median(later),
            "processor_s": statistics.median(own.processor),
            "more_processor_s": statistics.median(more),
        }
    return rows


def goals(rows: dict[str, dict[str, Any]], judged: bool) -> list[dict[str, Any]]:
    """What a run as users start it is held to."""
    later = rows[next(iter(RUNS))]["later_s"]
    return [goal("seconds later than the bare script", later, at_most=TARGET, judged=judged)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="rounds, at least 5 (default 7)")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    add_unjudged(parser)
    given = parser.parse_args()
    assert given.repeats >= 5
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the session of the start under way too
    from engine.data.store.prepare import PrepareConfig, prepare
    from engine.data.tokenizer.wordpiece import load_tokenizer

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data, first = folder / "data", folder / "first"
        prepare(PrepareConfig(output=str(data), vocab_size=4096))
        vocabulary = load_tokenizer(data / "tokenizer").vocab_size
        time_first_step([*launcher(given.ranks), *training(data, first, [])])  # writes deepspeed.json

        def run(options: list[str]) -> list[str]:
            return training(data, Path(tempfile.mkdtemp(dir=folder)), options)

        rivals: dict[str, Callable[[], list[str]]] = {name: partial(run, options) for name, options in RUNS.items()}
        rivals[BARE] = partial(bare, first / "deepspeed.json", vocabulary)
        rows = table(measure(rivals, given.ranks, given.repeats))
    title = f"from `deepspeed` to the end of the first step, {given.ranks} CPU ranks"
    held_to = goals(rows, judged=not given.unjudged)
    return finish([{"title": title, "rivals": rows, "goals": held_to}], given.json)


if __name__ == "__main__":
    sys.exit(main())
