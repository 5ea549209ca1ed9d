"""A trace of a few training steps, for https://ui.perfetto.dev, kept beside the results where it is small enough."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from benchmarks.proof import materials
from benchmarks.proof.runs import run_one, tail
from benchmarks.proof.speed import Case
from benchmarks.proof.stage import Report, Setting
from engine.train.profile.profile import compress

#: bytes of a compressed trace that is kept
LARGEST = 15 << 20
FULL = Case("base", 128, 128, steps=4)
TOY = Case("tiny", 32, 8, steps=4, toy=True)
NAME = "trace.json.gz"


def run(setting: Setting, report: Report) -> None:
    """Record one step.

    Raises:
        RuntimeError: the run failed, or the trace is too large to keep.
    """
    case, store = TOY if setting.toy else FULL, Path(setting.materials) / materials.STORE
    options = [option for option in case.options(store) if not option.startswith("--train.profile")]
    ended = run_one([*options, "--train.profile=1"], Path(setting.scratch) / "traced", setting.device)
    if ended.code:
        tail(ended)
        raise RuntimeError(ended.why)
    summary = json.loads((ended.output / "profile" / "summary.json").read_text())
    trace = Path(summary["traces"][0])
    small = trace if trace.suffix == ".gz" else compress(trace)
    size = small.stat().st_size
    if size > LARGEST:
        raise RuntimeError(f"the trace of one step has {size / 1e6:.0f} MB compressed; {LARGEST / 1e6:.0f} are kept")
    shutil.copy(small, Path(setting.output) / NAME)
    longest = {
        f"{index}. {row['name'][:80]}": {"ms": 1e3 * row["seconds"], "calls": row["calls"]}
        for index, row in enumerate(summary["top"], 1)
    }
    report.put(
        {"title": f"the longest operators of a step of {case.name}; {NAME}, {size / 1e6:.1f} MB", "rivals": longest}
    )
