"""The curves as CSV files: one header per file, and no point twice, however often the run was restarted."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.durable import write_atomically
from engine.train.curves.events import Point


class CsvCurves:
    """Replaces DeepSpeed's CSV monitor in its MonitorMaster: one header per file, and no point twice."""

    def __init__(self, monitor: Any, first_step: int) -> None:
        """
        Args:
            monitor: DeepSpeed's CSV monitor.
            first_step: steps done at this start; points of later steps, from an earlier start, are dropped.
        """
        self._monitor, self._first_step = monitor, first_step
        self._there: dict[str, list[str]] = {}
        for path in sorted(Path(monitor.log_dir).glob("*.csv")):
            rows = cut_back(path, first_step)
            self._there[path.stem] = rows[-1]
            monitor.filenames.append(path.stem)  # DeepSpeed writes a header to each file that isn't in this list

    def write_events(self, points: Sequence[Point]) -> None:
        """Append points to their files."""
        self._monitor.write_events([point for point in points if not self._is_there(*point)])

    def _is_there(self, tag: str, value: float, step: int) -> bool:
        return step == self._first_step and self._there.get(tag.replace("/", "_")) == [str(step), str(value)]


def cut_back(path: Path, step: int) -> list[list[str]]:
    """Drop the points after a step from the CSV file of a curve, and headers between points and truncated lines.

    Returns:
        The rows that are left, the header first.
    """
    text = path.read_bytes().decode()
    whole = text[: text.rfind("\n") + 1]
    header, *rows = list(csv.reader(whole.splitlines())) or [["step", path.stem]]
    kept = [header, *(row for row in rows if len(row) == 2 and row[0].isdecimal() and int(row[0]) <= step)]
    lines = "".join(",".join(row) + "\r\n" for row in kept)
    if lines != text:
        write_atomically(path, lines)
    return kept
