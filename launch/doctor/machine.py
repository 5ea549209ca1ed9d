"""Disk, shared memory, limits of the process, and threads against cores."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from launch.doctor.accelerators import gpu_count
from launch.doctor.finding import Finding, size
from launch.doctor.kernels import existing

#: a checkpoint of BERT-base takes 1.3 GB and an export 0.4 GB
LITTLE_DISK, SMALL_DISK = 2 << 30, 20 << 30
LITTLE_TEMPORARY = 256 << 20
#: of a rank: batches that two loader processes have ready, and NCCL's buffers
SHARED_A_RANK = 32 << 20
#: sockets of the ranks, shards, loader pipes and shared tensors
FEW_FILES, SCANT_FILES = 256, 1024


def check_disk(output: Path) -> Iterator[Finding]:
    """Space and the right to write, for a run's output and for temporary files."""
    yield judge_folder("output folder", output, LITTLE_DISK, SMALL_DISK)
    temporary = os.environ.get("TMPDIR", "")
    if temporary and not Path(temporary).is_dir():
        remedy = f"mkdir -p {temporary}, or unset TMPDIR"
        yield Finding("temporary folder", "problem", f"TMPDIR names {temporary}, which is no folder", remedy)
    else:
        yield judge_folder("temporary folder", Path(tempfile.gettempdir()), LITTLE_TEMPORARY, LITTLE_TEMPORARY)


def judge_folder(name: str, folder: Path, least: int, comfortable: int) -> Finding:
    """Whether a folder, or the nearest one above that is there, can be written and has room.

    Args:
        least, comfortable: free bytes, below which there is a problem, or a note.
    """
    above = existing(folder)
    if not above.is_dir():
        return Finding(name, "problem", f"{above} is a file", "give a folder")
    try:
        with tempfile.TemporaryFile(dir=above) as scratch:
            scratch.write(b"0")
    except OSError as error:
        return Finding(name, "problem", f"{above} can't be written ({error.strerror})", "give another folder")
    free = shutil.disk_usage(above).free
    found = f"{folder}: {size(free)} free"
    if free < comfortable:
        remedy = "free some, or give a folder on a larger disk; a checkpoint takes 12 bytes a parameter"
        return Finding(name, "problem" if free < least else "note", found, remedy)
    return Finding(name, "ok", found)


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Room for what loaders and NCCL share; a container often has 64 MiB."""
    if not folder.is_dir():
        yield Finding("shared memory", "problem", f"{folder} is missing", f"mount a tmpfs at {folder}")
        return
    yield judge_shared_memory(shutil.disk_usage(folder).free, max(1, gpu_count()))


def judge_shared_memory(free: int, ranks: int) -> Finding:
    """Whether free bytes of shared memory are enough for that many ranks."""
    need = ranks * SHARED_A_RANK
    found = f"{size(free)} free; {ranks} rank(s) need about {size(need)}"
    if free < need:
        remedy = "docker run --shm-size 1g (or --ipc host), or --data.workers 0"
        return Finding("shared memory", "problem", found + ", or end by a bus error", remedy)
    return Finding("shared memory", "ok", found)


def check_limits() -> Iterator[Finding]:
    """Open files and locked memory."""
    yield judge_files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield judge_locked(locked, Path("/sys/class/infiniband").is_dir())


def judge_files(soft: int, hard: int) -> Finding:
    """Whether a rank may open enough files."""
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= SCANT_FILES:
        return Finding("open files", "ok", "unlimited" if soft == unlimited else f"up to {soft}")
    remedy = f"ulimit -n {min(65536, hard) if hard != unlimited else 65536} before the run"
    return Finding("open files", "problem" if soft < FEW_FILES else "note", f"only {soft}", remedy)


def judge_locked(soft: int, infiniband: bool) -> Finding:
    """Whether memory can be registered with an InfiniBand card."""
    if soft == resource.RLIM_INFINITY or not infiniband:
        found = (
            "unlimited" if soft == resource.RLIM_INFINITY else f"up to {size(soft)}, and no InfiniBand that needs more"
        )
        return Finding("locked memory", "ok", found)
    remedy = "ulimit -l unlimited before the run (in SLURM: PropagateResourceLimitsExcept=MEMLOCK)"
    return Finding("locked memory", "problem", f"{size(soft)}, too little for InfiniBand", remedy)


def check_threads() -> Iterator[Finding]:
    """OMP_NUM_THREADS against the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield judge_threads(os.environ, cores, cpu_quota())


def cpu_quota(group: Path = Path("/sys/fs/cgroup/cpu.max")) -> float | None:
    """Cores' worth of time that a container may use; None without a limit."""
    try:
        quota, period = group.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def judge_threads(env: Mapping[str, str], cores: int, quota: float | None) -> Finding:
    """Whether a rank would start more threads than it has cores."""
    given = env.get("OMP_NUM_THREADS", "")
    usable = cores if quota is None else min(cores, max(1, int(quota)))
    if not given:
        if usable < cores:
            remedy = f"export OMP_NUM_THREADS={usable} (divided by the ranks of the machine)"
            found = f"{cores} cores seen, of which the container may use {quota:g}"
            return Finding("threads", "problem", found + ": too many threads are slower many times over", remedy)
        return Finding("threads", "ok", f"{cores} core(s), divided among the ranks of the machine")
    if not given.isdigit() or int(given) < 1:
        return Finding(
            "threads", "problem", f"OMP_NUM_THREADS={given} is no number", "unset it, or give a whole number"
        )
    found = f"OMP_NUM_THREADS={given} a rank, on {usable} core(s)"
    if int(given) > usable:
        remedy = f"export OMP_NUM_THREADS={usable}, divided by the ranks of the machine; or unset it"
        return Finding("threads", "problem", found + ": more threads than cores are slower many times over", remedy)
    return Finding("threads", "ok", found)
