"""Files of earlier starts in a run's folder: a new run sets all of them aside, a resumed one its results."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from engine.errors import UserError
from engine.train.certificate.certificate import TABLE
from engine.train.watch.faults import FAULTS_FILE

#: what a run appends to or doesn't overwrite, so that a second run would mix its own with the first one's
RECORDS = ("tensorboard", "csv", "export", "report", "loaded_weights.json", "profile", TABLE, FAULTS_FILE)
#: what a run that resumes from the folder's own checkpoint makes anew at its end
RESULTS = ("report",)
#: what a run writes anew at its start
SETTINGS = ("config.yaml", "deepspeed.json", "deepspeed_reasons.json")


def make_room(output: Path, start: Path | None) -> None:
    """Set aside what an earlier run left in the folder, and say so; only its results if `start` is a checkpoint there.

    Raises:
        UserError: it can't be moved.
    """
    goes_on = start is not None and start.resolve().parent == (output / "checkpoints").resolve()
    move(output, RESULTS if goes_on else RECORDS)


def move(output: Path, names: Sequence[str]) -> None:
    """Set aside the files and folders of these names, and say so; see `set_aside`."""
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
            folder.rmdir()  # fails if anything was moved into it
        raise UserError(
            f"output: records of an earlier run in {output} can't be moved to {folder} ({error.strerror}); "
            "move them away, or choose another --output"
        ) from error
    return folder
