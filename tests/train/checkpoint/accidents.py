"""Start runs in which something goes wrong; see `tests.train.watch.fault_worker`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.train.runs import ROOT, SMALL, command, environment, start_warm
from tests.warm import Started

WORKER = str(ROOT / "tests" / "train" / "watch" / "fault_worker.py")


def accident(rank: int, batch: int | None, what: str, argument: Any = None) -> dict[str, Any]:
    """Something that happens on a rank before a batch, counted from 1; None: before every one."""
    return {"rank": rank, "batch": batch, "what": [what, argument]}


def start(
    output: Path, *options: str, accidents: list[dict[str, Any]], launcher: str | None = None, ranks: int = 2
) -> subprocess.Popen[str] | Started:
    """Start a run in a session of its own, warm without a launcher's name; its output is one text."""
    if launcher is None:
        return start_warm(output, *options, ranks=ranks, script=WORKER, ACCIDENTS=json.dumps(accidents))
    return subprocess.Popen(
        [*command(launcher, ranks), WORKER, f"--output={output}", *SMALL, *options],
        env=environment() | {"ACCIDENTS": json.dumps(accidents), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def heartbeat(output: Path) -> dict[str, Any]:
    """The heartbeat that a run left."""
    found: dict[str, Any] = json.loads((output / "heartbeat.json").read_text())
    return found


def tracebacks(printed: str) -> list[str]:
    """The lines of what was printed that belong to a traceback of ours."""
    return [line for line in printed.splitlines() if line.startswith("Traceback") or 'File "' in line]
