"""Every family of kernels, and the tests that need a GPU, under NVIDIA's compute-sanitizer."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from benchmarks.all import last_line
from benchmarks.common import goal
from benchmarks.proof import kernels
from benchmarks.proof.runs import run_commands
from benchmarks.proof.stage import Report, Setting, SkippedError

#: in the order of their worth: accesses out of bounds, races in shared memory, barriers, reads of what nobody wrote
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
#: exit code for what the sanitizer finds; our own process's codes pass through
FOUND = 97
AT_ONCE = 4


def command(sanitizer: str, tool: str, arguments: list[str]) -> list[str]:
    """A command under a tool, which also looks at torch's kernels in that process."""
    return [sanitizer, f"--tool={tool}", f"--error-exitcode={FOUND}", "--target-processes=application-only", *arguments]


def errors(printed: str) -> float | None:
    """What the sanitizer counted; None where it never came to that."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", printed)
    return float(found[-1]) if found else None


def run(setting: Setting, report: Report) -> None:
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if setting.device == "cpu":
        raise SkippedError("there is no GPU here")
    if sanitizer is None:
        raise SkippedError("compute-sanitizer is not installed; it comes with the CUDA toolkit")
    names = kernels.families(setting.device)
    commands = {
        f"{tool}: {name}": command(sanitizer, tool, kernels.command(name, setting.device))
        for tool in TOOLS
        for name in names
    }
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    commands |= {
        f"memcheck: {name}": command(sanitizer, "memcheck", [*pytest, *arguments])
        for name, arguments in kernels.tests().items()
    }
    rivals: dict[str, dict[str, Any]] = {}
    for name, ended in run_commands(commands, Path(setting.scratch), setting.device, AT_ONCE, kernels.LONGEST):
        count = errors(ended.printed)
        told = f"exit code {ended.code}: {last_line(ended.printed)}" if count is None else f"{count:.0f} error(s)"
        rivals[name] = {"result": told, "seconds": ended.seconds} | ({} if count is None else {"errors": count})
        if count != 0:
            print(f"--- {name}\n{ended.printed[-3000:]}", flush=True)
        wrong = sum(values.get("errors", 0.0) for values in rivals.values())
        held = goal(f"errors in {len(rivals)} of {len(commands)} processes", wrong, at_most=0)
        report.put({"title": "compute-sanitizer", "rivals": rivals, "goals": [held]})
