"""What earlier starts left in a run's folder: set aside where the run begins anew, cut back where it goes on."""

from __future__ import annotations

import contextlib
import csv
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.train.durable import write_atomically
from engine.train.events import Point
from engine.train.faults import FAULTS_FILE
from engine.train.verify import TABLE

#: what a run adds to or leaves standing, so that a second run's would mix with the first one's
RECORDS = ("tensorboard", "csv", "export", "report", "loaded_weights.json", "profile", TABLE, FAULTS_FILE)
#: what a run that goes on from the folder's checkpoint makes anew at its end
RESULTS = ("report",)
#: what a run writes anew at its start
SETTINGS = ("config.yaml", "deepspeed.json", "deepspeed_reasons.json")


def make_room(output: Path, start: Path | None) -> None:
    """Set aside what stands in a run's folder, and say so; only the results where the run goes on from there.

    Raises:
        UserError: it can't be moved.
    """
    goes_on = start is not None and start.resolve().parent == (output / "checkpoints").resolve()
    move(output, RESULTS if goes_on else RECORDS)


def move(output: Path, names: Sequence[str]) -> None:
    """Set aside what stands under these names, and say so; see `set_aside`."""
    if folder := set_aside(output, names):
        print(f"moved what an earlier run recorded here to {folder}", flush=True)


def set_aside(output: Path, names: Sequence[str] = RECORDS) -> Path | None:
    """Move what an earlier run recorded under these names to <output>/earlier-N, with a copy of its settings.

    Returns:
        That folder; None where there was nothing.

    Raises:
        UserError: it can't be moved.
    """
    records = [output / name for name in names if (output / name).exists()]
    if not records:
        return None
    taken = [int(path.name.removeprefix("earlier-")) for path in output.glob("earlier-*") if path.name[8:].isdecimal()]
    folder = output / f"earlier-{max(taken, default=0) + 1}"
    try:
        folder.mkdir()
        for path in records:
            path.rename(folder / path.name)
        for path in (output / name for name in SETTINGS if (output / name).is_file()):
            shutil.copy2(path, folder / path.name)
    except OSError as error:
        with contextlib.suppress(OSError):
            folder.rmdir()  # fails where something is in it
        raise UserError(
            f"output: records of an earlier run in {output} can't be moved to {folder} ({error.strerror}); "
            "move them away, or choose another --output"
        ) from error
    return folder


class CsvCurves:
    """Stands for DeepSpeed's CSV monitor in its MonitorMaster: one header a file, and no point twice."""

    def __init__(self, monitor: Any, first_step: int) -> None:
        """Args: monitor is DeepSpeed's; first_step the steps done at this start, whose later points don't count."""
        self._monitor, self._first_step = monitor, first_step
        self._there: dict[str, list[str]] = {}
        for path in sorted(Path(monitor.log_dir).glob("*.csv")):
            rows = cut_back(path, first_step)
            self._there[path.stem] = rows[-1]
            monitor.filenames.append(path.stem)  # DeepSpeed writes a header to each file that isn't in it

    def write_events(self, points: Sequence[Point]) -> None:
        """Append points to their files."""
        self._monitor.write_events([point for point in points if not self._is_there(*point)])

    def _is_there(self, tag: str, value: float, step: int) -> bool:
        return step == self._first_step and self._there.get(tag.replace("/", "_")) == [str(step), str(value)]


def cut_back(path: Path, step: int) -> list[list[str]]:
    """Drop the points after a step from the CSV file of a curve; the rows that are left, its header first.

    Headers between points, and a line that a crash cut off, go too.
    """
    text = path.read_bytes().decode()
    whole = text[: text.rfind("\n") + 1]
    header, *rows = list(csv.reader(whole.splitlines())) or [["step", path.stem]]
    kept = [header, *(row for row in rows if len(row) == 2 and row[0].isdecimal() and int(row[0]) <= step)]
    lines = "".join(",".join(row) + "\r\n" for row in kept)
    if lines != text:
        write_atomically(path, lines)
    return kept
