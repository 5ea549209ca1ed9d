"""Fair timing: rivals run in turn in one process, so that a busy machine slows them alike."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: results of a goal, beside "met"
MISSED, UNJUDGED = "MISSED", "not judged, the run is too short"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated runs."""

    runs: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def spread(self) -> float:
        """See `spread`."""
        return spread(self.runs)

    @property
    def best(self) -> float:
        return min(self.runs)

    def to_dict(self) -> dict[str, float]:
        return {"median_ms": self.median, "spread": self.spread, "best_ms": self.best}


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles, as a share of the median; 0 of one value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / statistics.median(values)


def machine() -> dict[str, str | float]:
    """What the figures of a benchmark depend on: processor, memory, software, and the fastest matrix products.

    Measures for about a second; a busy machine shows a lower GEMM peak.
    """
    import torch

    from engine.kernels.gemm import measure_peak

    cores = len(os.sched_getaffinity(0))
    facts: dict[str, str | float] = {
        "cpu": processor(Path("/proc/cpuinfo").read_text()),
        "cores": cores,
        "memory_GB": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    for dtype in (torch.float32, torch.bfloat16):
        peak = measure_peak(dtype, torch.device("cpu"))
        facts[f"gemm_{peak.precision}_GFLOPS"] = peak.flops / 1e9
    torch.set_num_threads(before)
    return facts


def processor(cpuinfo: str) -> str:
    """The model that Linux names in /proc/cpuinfo, or the architecture where it names none."""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return found[1] if found else platform.machine()


def interleaved(rivals: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Timing]:
    """Time each rival `repeats` times (at least 5), one after the other in every round, after one run unmeasured."""
    assert repeats >= 5
    for run in rivals.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, run in rivals.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: Timing(runs) for name, runs in times.items()}


def run_ranks(module: str, ranks: int, arguments: list[str]) -> None:
    """Run `python -m module` on CPU ranks of one thread, started by torchrun.

    Raises:
        RuntimeError: with what was printed, if a rank failed.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [*launcher, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)


def goal(
    figure: str,
    value: float | None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    judged: bool = True,
) -> dict[str, Any]:
    """One of a row's "goals": a figure that is held to one bound.

    Args:
        figure: what is held to it, in words.
        value: as measured; None if it wasn't, or wasn't reached, which misses the goal as NaN does.
        judged: False where the run is too short or too small to tell: the goal is told and can't be missed.
    """
    assert (at_least is None) != (at_most is None), "a goal has one bound"
    if at_least is not None:
        bound, met = f"at least {at_least:g}", value is not None and value >= at_least
    else:
        bound, met = f"at most {at_most:g}", value is not None and at_most is not None and value <= at_most
    result = ("met" if met else MISSED) if judged else UNJUDGED
    return {"figure": figure, "goal": bound, "value": value, "result": result}


def goal_line(found: Mapping[str, Any]) -> str:
    """A goal for people, its result first."""
    value = "no result" if found["value"] is None else format_value(found["value"])
    return f"{found['result']}: {found['figure']} {value}, goal {found['goal']}"


def missed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The missed goals of all rows, each a line."""
    return [goal_line(one) for row in rows for one in row.get("goals", []) if one["result"] == MISSED]


def finish(rows: list[dict[str, Any]], as_json: bool) -> int:
    """Print the results of a benchmark that has goals; its exit code, 1 if one is missed.

    A document of JSON holds the goals; those that are missed are also told on stderr.
    """
    emit(rows, as_json)
    lines = missed(rows)
    if as_json:
        print(*lines, sep="\n", end="\n" if lines else "", file=sys.stderr)
    return 1 if lines else 0


def add_unjudged(parser: argparse.ArgumentParser) -> None:
    """The option of a benchmark that has goals, for a run that is too short for them."""
    parser.add_argument("--unjudged", action="store_true", help="a short run: tell the goals, and don't judge them")


def options(description: str) -> argparse.ArgumentParser:
    """The command line that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=9, help="runs of each rival, at least 5 (default 9)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads to try")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    return parser


def emit(rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print results as JSON, or as one table a title with columns aligned."""
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        print(f"\n{row['title']}")
        width = max(len(name) for name in row["rivals"])
        for name, values in row["rivals"].items():
            cells = "  ".join(f"{key} {format_value(value)}" for key, value in values.items())
            print(f"  {name:<{width}}  {cells}")
        for one in row.get("goals", []):
            print(f"  {goal_line(one)}")


def format_value(value: float | str) -> str:
    """Three significant digits for numbers."""
    return value if isinstance(value, str) else f"{value:.3g}"
