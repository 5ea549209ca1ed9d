"""What offload to NVMe needs of the machine: a disk with direct I/O and room, and DeepSpeed's asynchronous I/O.

Each process swaps into a folder of its own below the user's, so that runs don't meet there, and removes it at its end.
A lock on the folder, which the kernel releases when a process dies, tells the next process what a dead one left.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import mmap
import os
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from engine import dist
from engine.errors import UserError

PREFIX = "zerobert-swap-"
#: bytes a parameter: fp32 weight, gradient, two moments
BYTES = 16
#: seconds before a build is told of
PATIENCE = 5.0
#: of a write that bypasses the page cache
ALIGNED = 4096
PROGRAM = "#include <libaio.h>\nint main() { return io_submit(0, 0, nullptr); }\n"


def check_offload(path: str) -> None:
    """Find out before the training whether a run can swap into a folder; builds DeepSpeed's async_io once.

    Raises:
        UserError: the folder or what async_io is built with is missing.
    """
    check_folder(Path(path))
    load_async_io()


def check_folder(path: Path) -> None:
    """Write a block to the folder as DeepSpeed does, past the page cache; makes the folder.

    Raises:
        UserError: it can't be made or written, or its file system has no direct I/O.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=PREFIX) as file, mmap.mmap(-1, ALIGNED) as block:
            descriptor = os.open(file.name, os.O_WRONLY | os.O_DIRECT)
            try:
                os.write(descriptor, block)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise UserError(f"zero.nvme_path: {path} can't be used ({error.strerror}); {_remedy(error)}") from error


def _remedy(error: OSError) -> str:
    if error.errno == errno.EINVAL:
        return "its file system has no direct I/O; give a folder on a local disk"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free space there or give another folder"
    return "give a folder that this user can write to"


def load_async_io() -> None:
    """Build DeepSpeed's async_io, a minute at the first run on a machine, unless DeepSpeed was installed with it.

    Raises:
        UserError: a tool or libaio is missing, or the build fails.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    if not _is_installed(builder):
        check_tools(os.environ)
    notice = threading.Timer(PATIENCE, print, [_notice(builder.NAME)], {"flush": True})
    if os.environ.get("LOCAL_RANK", "0") == "0":
        notice.start()
    try:
        builder.load(verbose=False)
    except Exception as error:
        why = next((line for line in str(error).splitlines() if "error" in line.lower()), type(error).__name__)
        raise UserError(
            f"zero.offload_optimizer: 'nvme' needs DeepSpeed's async_io, and building it failed ({why.strip()}); "
            "mend that, or choose cpu"
        ) from error
    finally:
        notice.cancel()


def _notice(name: str) -> str:
    """What to say of a build that takes long, or waits for one that died."""
    from torch.utils.cpp_extension import _get_build_directory

    lock = Path(_get_build_directory(name, False)) / "lock"
    return (
        f"note: building DeepSpeed's {name}, minutes and once on a machine; if nothing is being compiled, an earlier "
        f"build was killed: then remove {lock}"
    )


def _is_installed(builder: Any) -> bool:
    """Whether DeepSpeed came with the compiled operator."""
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get(builder.NAME, False))


def check_tools(env: Mapping[str, str]) -> None:
    """Whether async_io can be built: ninja, a C++ compiler and libaio's header and library.

    Raises:
        UserError: names the first that is missing.
    """
    compiler = env.get("CXX", "c++")
    needed = {"ninja": "pip install ninja", compiler.split()[0]: "apt-get install g++"}
    for tool, remedy in needed.items():
        if shutil.which(tool, path=env.get("PATH", "")) is None:
            raise _missing(tool, remedy)
    with tempfile.TemporaryDirectory() as folder:
        (source := Path(folder) / "aio.cpp").write_text(PROGRAM)
        flags = [*env.get("CFLAGS", "").split(), str(source), *env.get("LDFLAGS", "").split(), "-laio"]
        command = [*compiler.split(), *flags, "-o", str(Path(folder) / "aio")]
        if subprocess.run(command, env=dict(env), capture_output=True, check=False).returncode:
            raise _missing("libaio", "apt-get install libaio-dev")


def _missing(what: str, remedy: str) -> UserError:
    return UserError(f"zero.offload_optimizer: 'nvme' needs {what}, which is not there ({remedy}); or choose cpu")


def with_swap_folder(config: dict[str, Any], model: nn.Module, share: float) -> dict[str, Any]:
    """The DeepSpeed configuration with a swap folder of this process's own, which goes when `model` does; collective.

    Without offload to NVMe it is the given one.

    Args:
        share: this machine's ranks among all.

    Raises:
        UserError: on every rank, if on any the disk has no room for its part, or the folder can't be made.
    """
    section = config["zero_optimization"].get("offload_optimizer", {})
    if section.get("device") != "nvme":
        return config
    needed = int(sum(p.numel() for p in model.parameters() if p.requires_grad) * BYTES * share)
    folder = dist.agreed(lambda: claim(Path(section["nvme_path"]), needed))
    weakref.finalize(model, remove, folder, os.getpid())
    own = copy.deepcopy(config)
    own["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(folder)
    return own


def claim(parent: Path, needed: int) -> Path:
    """A new folder that is locked as long as this process lives; folders of dead processes are removed.

    Args:
        needed: bytes that all ranks of this machine write. The first step writes all of them, later ones the same.

    Raises:
        UserError: there is less room, or the folder can't be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _locked(parent):
            for left in parent.glob(f"{PREFIX}*"):
                remove_abandoned(left)
            free = shutil.disk_usage(parent).free
            if free < needed:
                raise UserError(
                    f"zero.nvme_path: {parent} has {free / 1e9:.1f} GB free, and the optimizer needs "
                    f"{needed / 1e9:.1f} GB; free space there or give another folder"
                )
            folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
            _lock(folder)
            return folder
    except OSError as error:
        raise UserError(f"zero.nvme_path: {parent} can't be used ({error.strerror}); {_remedy(error)}") from error


def remove_abandoned(folder: Path) -> None:
    """Remove a swap folder unless a process has it locked."""
    with contextlib.suppress(OSError):
        os.close(_lock(folder, fcntl.LOCK_NB))
        shutil.rmtree(folder)


def remove(folder: Path, process: int) -> None:
    """Remove a swap folder; processes forked from the one that made it leave it alone."""
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = _lock(folder)
    try:
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path, flags: int = 0) -> int:
    """Lock a folder itself, with no file left in it; the descriptor holds the lock."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
