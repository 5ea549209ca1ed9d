"""What a check found, and how checks run so that nothing that is broken ends the doctor."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    A problem fails, hangs or spoils some run; a note is worth knowing, and only costs speed or a feature.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


Check = Callable[[], Iterable[Finding]]


def run_check(name: str, check: Check) -> list[Finding]:
    """The findings of a check; what it raises is a problem that says so."""
    findings: list[Finding] = []
    try:
        findings.extend(check())
    except (Exception, SystemExit) as error:  # a broken package may raise anything while it is imported
        lines = str(error).splitlines() or [""]
        found = f"the check failed: {type(error).__name__}: {lines[0]}"
        findings.append(Finding(name, "problem", found, "repair what the message names, and look again"))
    return findings


def find_tool(name: str, *, beside_python: bool = False) -> str | None:
    """Path of a program on PATH, or else beside this Python, where pip installs programs, if that is asked for."""
    beside = Path(sys.executable).parent / name
    return shutil.which(name) or (str(beside) if beside_python and beside.is_file() else None)


def output_of(command: Sequence[str], given: str = "", timeout: float = 20.0) -> str:
    """What a program prints, given a text on its standard input.

    Raises:
        RuntimeError: it fails, can't be started, or takes too long; the message is its last line.
    """
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, errors="replace", timeout=timeout)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{command[0]}: {error}") from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(lines[-1])
    return done.stdout.strip()


def first_line(command: Sequence[str]) -> str:
    """The first line of `output_of` a program."""
    return (output_of(command).splitlines() or [""])[0]


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
