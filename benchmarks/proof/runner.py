"""Runs the stages one after the other within a budget, and keeps what each has found."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.all import SKIPPED, last_line, provenance
from benchmarks.common import ROOT, goal_line, missed
from benchmarks.proof.stage import STAGES, Setting
from benchmarks.proof.worker import command
from benchmarks.startup import end_session
from engine.durable import write_atomically

#: seconds that a stage has to write its last row after its time is over
GRACE_S = 2.0
#: lines of a stage's output that are kept where it failed
LINES = 15
DOCUMENT = "proof.json"


def limit(name: str, names: Sequence[str], left: float) -> float:
    """Seconds of a stage: its share of those that are left, by the weights of it and of the later ones."""
    later = names[names.index(name) :]
    return left * STAGES[name].weight / sum(STAGES[other].weight for other in later)


def run_stage(name: str, setting: Setting, folder: Path) -> dict[str, Any]:
    """Run a stage to its end or to the end of its time: its state, seconds, rows, and output where it failed."""
    rows, log = folder / f"{name}.rows", folder / f"{name}.log"
    rows.unlink(missing_ok=True)  # an earlier result must not pass for this run's
    start = time.monotonic()
    code: int | None = None
    with log.open("w") as output:
        process = subprocess.Popen(
            command(name, setting, rows), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(setting.seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            stop(process)
    content = json.loads(rows.read_text()) if rows.exists() else []
    rows.unlink(missing_ok=True)
    return outcome(code, log.read_text(errors="replace"), content) | {
        "seconds": round(time.monotonic() - start, 1),
        "limit": round(setting.seconds, 1),
        "rows": content,
    }


def outcome(code: int | None, printed: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the exit code (None: ended at the limit), the output and the rows mean: ok, missed (a goal), skipped,
    failed or timed out; why; and the last lines where it failed."""
    last = last_line(printed)
    if code == 0 and last.startswith(SKIPPED):
        return {"state": "skipped", "reason": last.removeprefix(SKIPPED).strip()}
    tail = {"output": printed.splitlines()[-LINES:]}
    lines = missed(rows)
    reason = "; ".join(lines)
    if code is None:
        return {"state": "timed out", "reason": "; ".join(["ended at its limit", *lines])} | tail
    if code:
        return {"state": "failed", "reason": "; ".join([f"exit code {code}: {last}", *lines])} | tail
    return {"state": "missed" if lines else "ok", "reason": reason} | (tail if lines else {})


def stop(process: subprocess.Popen[str]) -> None:
    """End what a stage has started, itself at last."""
    if process.poll() is None:
        with contextlib.suppress(OSError):
            os.kill(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    end_session(process)


def run(names: Sequence[str], device: str, budget: float, materials: Path, output: Path) -> dict[str, Any]:
    """Run stages within `budget` seconds; after each, everything known is in `output`/proof.json."""
    start = time.monotonic()
    document: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.gpu_proof", *sys.argv[1:]]),
        **kit_provenance(materials),
        "device": device,
        "budget_s": budget,
        "stages": {},
    }
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="proof-") as scratch:
        for name in names:
            seconds = limit(name, names, budget - (time.monotonic() - start))
            print(f"{name}: {STAGES[name].what}; at most {seconds:.0f} s …", flush=True)
            own = Path(scratch) / name
            own.mkdir()
            setting = Setting(
                device, str(materials.absolute()), str(own), str(output.absolute()), seconds, time.time() + seconds
            )
            found = run_stage(name, setting, output) if seconds > 1 else out_of_time()
            document["stages"][name] = found
            document["seconds"] = round(time.monotonic() - start, 1)
            write_atomically(output / DOCUMENT, json.dumps(document, indent=1) + "\n")
            why = f": {found['reason']}" if found["reason"] else ""
            print(f"{name}: {found['state']}, {found['seconds']:.0f} s{why}", flush=True)
    return document


def out_of_time() -> dict[str, Any]:
    """A stage that the budget has left nothing for."""
    return {"state": "skipped", "reason": "the budget was spent", "seconds": 0.0, "limit": 0.0, "rows": []}


def kit_provenance(materials: Path) -> dict[str, str]:
    """Date and commit; the commit is the kit's where this tree came with one."""
    own = provenance()
    with contextlib.suppress(OSError, ValueError, KeyError):
        own["commit"] = json.loads((materials / "kit.json").read_text())["commit"]
    return own


def summary(document: Mapping[str, Any]) -> str:
    """The table at the end: a line a stage, with its goals under it."""
    lines = [f"{'stage':<12} {'state':<10} {'seconds':>8} {'of':>6}"]
    for name, found in document["stages"].items():
        lines.append(f"{name:<12} {found['state']:<10} {found['seconds']:>8.0f} {found['limit']:>6.0f}")
        held = [goal_line(one) for row in found["rows"] for one in row.get("goals", [])]
        lines += [f"  {line}" for line in held]
        if not held and found["reason"]:
            lines.append(f"  {found['reason']}")
    return "\n".join(lines)
