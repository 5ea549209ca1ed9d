"""What runs that died have left behind: locks that hang later runs, and files that fill the memory."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch.doctor.finding import Finding, size

SHARED_MEMORY = Path("/dev/shm")
#: DeepSpeed's shared-memory all-reduce, 69 MB a rank and run
BUFFERS = "deepspeed_allreduce_buffer*"


def extensions_folder() -> Path:
    """Where torch builds C++ extensions, DeepSpeed's operators among them."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(cache) / "torch_extensions"


def users_of(paths: Sequence[Path]) -> dict[Path, int]:
    """A process, of those that this user may look at, for each of the files that one has open or mapped."""
    wanted = {str(path.resolve()): path for path in paths}
    users: dict[Path, int] = {}
    for process in Path("/proc").iterdir() if paths else ():
        if process.name.isdigit():
            with contextlib.suppress(OSError):  # it ended, or is another user's
                users |= {wanted[name]: int(process.name) for name in files_of(process) if name in wanted}
    return users


def files_of(process: Path) -> Iterator[str]:
    """The files that a process (its folder in /proc) has open or mapped."""
    for link in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed in the meantime
            yield str(link.readlink())
    for line in (process / "maps").read_text(errors="replace").splitlines():
        yield line.split(maxsplit=5)[-1]


def check_locks(folder: Path | None = None) -> Iterator[Finding]:
    """Locks of builds; a build that was killed leaves its own, and every later one waits for it without a word.

    Args:
        folder: in whose folders and their folders the locks lie; by default torch's.
    """
    folder = extensions_folder() if folder is None else folder
    locks = sorted({*folder.glob("*/lock"), *folder.glob("*/*/lock")})
    users = users_of(locks)
    for lock in locks:
        try:
            minutes = (time.time() - lock.stat().st_mtime) / 60
        except FileNotFoundError:  # its build has just ended
            continue
        if lock in users:
            yield Finding("build lock", "note", f"{lock}: process {users[lock]} builds there", "wait for it")
        else:
            found = f"{lock} is held by no process of this machine, for {minutes:.0f} minutes; it hangs every later run"
            remedy = f"rm {lock}, unless another machine with the same home folder builds there"
            yield Finding("build lock", "problem", found, remedy)
    if not locks:
        yield Finding("build locks", "ok", f"none in {folder}")


def check_buffers(folder: Path = SHARED_MEMORY) -> Iterator[Finding]:
    """Shared-memory files of DeepSpeed that no process uses any more."""
    buffers = sorted(folder.glob(BUFFERS))
    users = users_of(buffers)
    leaked = [path for path in buffers if path not in users]
    yield judge_buffers([(path, path.stat().st_size) for path in leaked], folder)


def judge_buffers(leaked: Sequence[tuple[Path, int]], folder: Path) -> Finding:
    """Whether files (with bytes) that nobody uses take memory."""
    if not leaked:
        return Finding("leaked buffers", "ok", f"none in {folder}")
    total = sum(count for _, count in leaked)
    found = f"{len(leaked)} file(s) of runs that ended take {size(total)} of memory in {folder}"
    return Finding("leaked buffers", "problem", found, f"rm {folder}/{BUFFERS} while no DeepSpeed run is alive")
