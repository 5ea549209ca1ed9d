"""Fair timing: rivals run in turn in one process, so that a busy machine slows them alike."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated runs."""

    runs: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        low, _, high = statistics.quantiles(self.runs, n=4)
        return (high - low) / 2 / self.median

    @property
    def best(self) -> float:
        return min(self.runs)

    def to_dict(self) -> dict[str, float]:
        return {"median_ms": self.median, "spread": self.spread, "best_ms": self.best}


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


def format_value(value: float | str) -> str:
    """Three significant digits for numbers."""
    return value if isinstance(value, str) else f"{value:.3g}"
