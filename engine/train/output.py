"""The folder of a run: whether it can be written, and that one run at a time writes there.

<output>/lock   held by rank 0 from its start to its end; says which process that is

The lock is one of POSIX, which the kernel gives up when its process dies in whatever way, and which reaches over NFS.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import time
from pathlib import Path
from typing import IO

from engine.errors import UserError

LOCK = "lock"
#: seconds that a start waits for a run which is just ending
PATIENCE = 5.0
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
FOLDERS = ("beats", "checkpoints", "csv", "data", "export", "hang", "profile", "report", "tensorboard")
FILES = ("config.yaml", "deepspeed.json", "deepspeed_reasons.json", "heartbeat.json", "restarts.json", "REQUEUE", LOCK)


def is_used(output: Path) -> bool:
    """Whether the folder is there, and not for its lock alone: a start that fails leaves none."""
    try:
        return [path.name for path in output.iterdir()] != [LOCK]
    except OSError:
        return False


def check_output(output: Path) -> None:
    """Find out whether a run can write its folder; makes nothing.

    Raises:
        UserError: the folder can't be made or written, or something else stands where a run keeps its files.
    """
    at = output
    while not os.path.lexists(at):
        at = at.parent
    if not at.is_dir():
        what = "a link to nothing" if not at.exists() else "a file"
        raise unwritable(output, f"it is {what}" if at == output else f"{at} is {what}")
    if not os.access(at, os.W_OK | os.X_OK):
        raise unwritable(output, "this user may not write there" if at == output else f"this user may not write {at}")
    if at != output:
        return
    for name in FOLDERS:
        path = output / name
        if os.path.lexists(path) and not path.is_dir():
            raise unwritable(output, f"{path} is a file or a link to nothing")
        if path.is_dir() and not os.access(path, os.W_OK | os.X_OK):
            raise unwritable(output, f"this user may not write {path}")
    for name in FILES:
        path = output / name
        if path.is_dir():
            raise unwritable(output, f"{path} is a folder")
        if path.exists() and not os.access(path, os.W_OK):
            raise unwritable(output, f"this user may not write {path}")


def unwritable(output: Path, why: str) -> UserError:
    """The mistake of a folder in which a run can't write."""
    return UserError(f"output: {output} can't be the folder of a run: {why}; correct that, or choose another folder")


def lost_output(output: Path, error: OSError) -> UserError | None:
    """The one line of an error that a file of the run's folder met; None of any other."""
    named = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    if not any(path.absolute().is_relative_to(output.absolute()) for path in named):
        return None
    return unwritable(output, f"{named[0]}: {error.strerror}")


class OutputLock:
    """The lock of a run's folder. Between `take` and `release` no other process has it."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self._file: IO[str] | None = None
        self._made: list[Path] = []

    def take(self, patience: float = PATIENCE) -> None:
        """Make the folder if it isn't there, and lock it; a signal may interrupt the waiting.

        Args:
            patience: seconds to wait for another run's end.

        Raises:
            UserError: another run has it, or it can't be written.
        """
        check_output(self.output)
        self._made = [path for path in (self.output, *self.output.parents) if not path.exists()]
        deadline = time.monotonic() + patience
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            while not self._taken():
                if time.monotonic() > deadline:
                    raise UserError(
                        f"output: {self.output} is in use by {self._holder()}; wait for its end, stop it, or choose "
                        "another folder"
                    )
                time.sleep(0.1)
        except OSError as error:
            raise unwritable(self.output, error.strerror or str(error)) from error

    def _taken(self) -> bool:
        """Try once. The file that was locked may be one that its last holder has just deleted."""
        file = (self.output / LOCK).open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if error.errno in NO_LOCKS:
                print(f"note: {self.output} can't be locked ({error.strerror}); start no other run there", flush=True)
                (self.output / LOCK).unlink(missing_ok=True)
                return True
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        try:
            if os.fstat(file.fileno()).st_ino != (self.output / LOCK).stat().st_ino:
                raise FileNotFoundError
        except FileNotFoundError:
            file.close()
            return False
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file
        return True

    def _holder(self) -> str:
        try:
            return (self.output / LOCK).read_text().strip() or "another run"
        except OSError:
            return "another run"

    def abandon(self) -> None:
        """The run has failed: give the lock up if it has written nothing; a save under way needs it until the end."""
        if not is_used(self.output):
            self.release()

    def release(self) -> None:
        """Give the lock up, and take away the folder that was made for it if nothing else was written."""
        if self._file is not None:
            (self.output / LOCK).unlink(missing_ok=True)
            self._file.close()
            self._file = None
        for path in self._made:
            try:
                path.rmdir()
            except OSError:
                break
        self._made = []


def newest_step(output: Path) -> int | None:
    """The step of a run's newest complete checkpoint."""
    names = (path.parent.name for path in output.glob("checkpoints/step-*/state.json"))
    return max(
        (int(found[1]) for found in (re.fullmatch(r"step-(\d+)", name) for name in names) if found), default=None
    )
