"""The folder of a run: checks that it can be written, and that only one run at a time writes to it.

<output>/lock   held by rank 0 from its start to its end; contains which process that is

It is a POSIX record lock, which the kernel releases however the process dies, and which works over NFS.
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
#: seconds that a start waits for an earlier run that is just ending
PATIENCE = 5.0
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
FOLDERS = ("beats", "checkpoints", "csv", "data", "export", "hang", "profile", "report", "tensorboard")
FILES = ("config.yaml", "deepspeed.json", "deepspeed_reasons.json", "heartbeat.json", "restarts.json", "REQUEUE", LOCK)


def checkpoint_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:06d}"


def is_used(output: Path) -> bool:
    """Whether the folder exists, unless all that it holds is the lock: a start that fails leaves no such folder."""
    try:
        return [path.name for path in output.iterdir()] != [LOCK]
    except OSError:
        return False


def check_output(output: Path) -> None:
    """Check that a run can write its folder, without creating anything.

    Raises:
        UserError: the folder can't be made or written, or a file of another kind is where a run keeps its own.
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
    """The error of a folder that a run can't write to."""
    return UserError(f"output: {output} can't be the folder of a run: {why}; correct that, or choose another folder")


def lost_output(output: Path, error: OSError) -> UserError | None:
    """The error to report for an OSError of a file in the run's folder; None for one of any other file."""
    named = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    if not any(path.absolute().is_relative_to(output.absolute()) for path in named):
        return None
    return unwritable(output, f"{named[0]}: {error.strerror}")


class OutputLock:
    """The lock of a run's folder. Between `take` and `release` no other process holds it."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self._file: IO[str] | None = None
        self._made: list[Path] = []

    def take(self, patience: float = PATIENCE) -> None:
        """Make the folder if it doesn't exist, and lock it; a signal may interrupt the waiting.

        Args:
            patience: seconds to wait for another run's end.

        Raises:
            UserError: another run holds it, or it can't be written.
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
        """Try once. It also fails if the last holder deleted the file between opening and locking it."""
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
        """The run has failed: release the lock if the folder is unused; a save in progress needs it until the end."""
        if not is_used(self.output):
            self.release()

    def release(self) -> None:
        """Release the lock, and remove the folder that was made for it if nothing else was written there."""
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
    """The step of a run's newest complete checkpoint; None without one."""
    names = (path.parent.name for path in output.glob("checkpoints/step-*/state.json"))
    return max(
        (int(match[1]) for match in (re.fullmatch(r"step-(\d+)", name) for name in names) if match), default=None
    )
