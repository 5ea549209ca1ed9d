"""Stages that end badly; without imports that take long, for each runs in a process of its own."""

from __future__ import annotations

import subprocess
from typing import Any

from benchmarks.proof.stage import Report, Setting, SkippedError

ROW: dict[str, Any] = {"title": "speed", "rivals": {"ours": {"median_ms": 1.0}, "peer": {"median_ms": 2.0}}}


def slow(_: Setting, report: Report) -> None:
    report.put(ROW)
    subprocess.run(["sleep", "600"])


def failing(_: Setting, report: Report) -> None:
    report.put(ROW)
    raise ValueError("no such thing")


def skipping(_: Setting, __: Report) -> None:
    raise SkippedError("no GPU")
