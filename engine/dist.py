"""Ranks, devices, seeds, and the only calls of collectives.

Every function works in one process with no process group, where it is the identity.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor

from engine.errors import SharedError, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among the processes of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and speaks to the user."""
        return self.rank == 0


def _active() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized() and torch_dist.get_world_size() > 1


def sum_over_ranks(value: Tensor, group: Any = None) -> Tensor:
    """The sum of `value` over the ranks of a process group, all by default, in a new tensor; collective.

    A tensor of a CPU-offloaded optimizer travels through the GPU, where its ranks' group is.
    """
    if not _active():
        return value.clone()
    on_gpu = value.device.type == "cpu" and torch_dist.get_backend(group) == "nccl"
    total = value.cuda() if on_gpu else value.clone()
    torch_dist.all_reduce(total, group=group)
    return total.to(value.device)


def place() -> tuple[int, int]:
    """This process's rank and the number of ranks."""
    return (torch_dist.get_rank(), torch_dist.get_world_size()) if _active() else (0, 1)


def maximum(value: int) -> int:
    """The largest of the ranks' whole numbers, on every rank; waits for the device; collective."""
    if not _active():
        return value
    largest = torch.tensor(value, device="cuda" if torch_dist.get_backend() == "nccl" else "cpu")
    torch_dist.all_reduce(largest, op=torch_dist.ReduceOp.MAX)
    return int(largest)


def gather_objects(value: T) -> list[T]:
    """Every rank's picklable value, in rank order, on every rank; collective."""
    if not _active():
        return [value]
    gathered: list[T | None] = [None] * torch_dist.get_world_size()
    torch_dist.all_gather_object(gathered, value)
    return gathered  # type: ignore[return-value]


def gather_rows(rows: Tensor) -> list[Tensor]:
    """Every rank's rows, in rank order, on every rank; collective.

    Args:
        rows: [n, ...] on the device that the ranks' back end works on; n may differ over the ranks.
    """
    if not _active():
        return [rows]
    world = torch_dist.get_world_size()
    counts = torch.empty(world, dtype=torch.int64, device=rows.device)
    torch_dist.all_gather_into_tensor(counts, torch.tensor([len(rows)], device=rows.device))
    lengths: list[int] = counts.tolist()
    padded = rows.new_zeros(max(lengths), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = rows.new_empty(world * len(padded), *rows.shape[1:])
    torch_dist.all_gather_into_tensor(gathered, padded)
    return [part[:length] for part, length in zip(gathered.split(len(padded)), lengths, strict=True)]


@dataclass(frozen=True)
class Report:
    """What a rank says of its own mistakes."""

    rank: int
    host: str
    reader: str
    """who reads what it prints; see `own_reader`"""
    mistake: str | None


#: as many different readers hear of a mistake that isn't theirs
MOST_READERS = 8


def own_reader(env: Mapping[str, str]) -> str:
    """Who reads what this process prints: two ranks with equal readers need not say the same.

    srun and mpirun give each rank a pipe, and one person reads them all.
    """
    for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if name in env:
            return name
    try:
        stream = os.fstat(2)
    except OSError:
        return "nobody"
    return f"{socket.gethostname()} {stream.st_dev} {stream.st_ino}"


def shared_mistake(reports: Sequence[Report], rank: int) -> SharedError | None:
    """What a rank makes of the mistakes that the ranks have told: the first one's, which ends all; None without one.

    Rank 0 tells the user, and of each other reader the first rank. Where rank 0 has a mistake, the others most
    likely have the same.

    Args:
        reports: of the ranks that are known, in any order.
        rank: one of them.
    """
    ordered = sorted(reports, key=lambda report: report.rank)
    first = next((report for report in ordered if report.mistake), None)
    if first is None:
        return None
    own = next(report for report in ordered if report.rank == rank)
    shown = own if own.mistake else first
    readers = list(dict.fromkeys(r.reader for r in ordered if r.rank == 0 or first.rank != 0 or not r.mistake))
    speaker = next(report.rank for report in ordered if report.reader == own.reader)
    speaks = speaker == rank and own.reader in readers[:MOST_READERS]
    where = "" if shown.rank == 0 and rank == 0 else f"rank {shown.rank} on {shown.host}: "
    return SharedError(where + str(shown.mistake), speaks=speaks)


def agreed(work: Callable[[], T]) -> T:
    """Do `work` on every rank; a user's mistake that any of them meets is raised on all; collective.

    Work that may fail on one rank alone must hold no collective.
    """
    result: T | None = None
    message: str | None = None
    try:
        result = work()
    except SharedError:  # of work within, and so on every rank
        raise
    except UserError as error:
        if not _active():
            raise
        message = str(error)
    reports = gather_objects(Report(place()[0], socket.gethostname(), own_reader(os.environ), message))
    mistake = shared_mistake(reports, place()[0])
    if mistake is not None:
        raise mistake
    return result  # type: ignore[return-value]


def exchange(outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Send the flat tensor `outgoing[r]` to each rank r; what they sent to this one; collective.

    Args:
        outgoing: one a rank, of one type, on the device that the ranks' back end works on; may be empty.
        sizes: how many elements each rank sends to this one.
    """
    if not _active():
        return list(outgoing)
    received = outgoing[0].new_empty(sum(sizes))
    torch_dist.all_to_all_single(received, torch.cat(list(outgoing)), list(sizes), [part.numel() for part in outgoing])
    return list(received.split(list(sizes)))


def barrier() -> None:
    """Wait for all ranks; collective."""
    if _active():
        torch_dist.barrier()


def seed_everything(seed: int, rank: int, step: int = 0) -> None:
    """Seed Python, NumPy and torch on every device, differently on every rank and step (dropout must differ)."""
    mixed = int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def rng_state() -> dict[str, object]:
    """The state of every random generator of this process, for a checkpoint."""
    state: dict[str, object] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # not on a GPU machine whose run is on CPUs: asking would create a context
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, object]) -> None:
    """Put back what `rng_state` returned."""
    random.setstate(state["python"])  # type: ignore[arg-type]
    np.random.set_state(state["numpy"])  # type: ignore[arg-type]
    torch.set_rng_state(state["torch"])  # type: ignore[arg-type]
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])  # type: ignore[arg-type]


def local_size(env: Mapping[str, str]) -> int:
    """Ranks on this machine, as torchrun and srun, deepspeed, or mpirun announce them."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
    return next((int(env[name]) for name in names if env.get(name, "").isdigit()), 1)


def set_threads(local_size: int, threads: int | None) -> int:
    """Give this rank its share of the cores: more threads than cores slow every rank down many times.

    A launcher's OMP_NUM_THREADS wins unless `threads` is given.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    given = os.environ.get("OMP_NUM_THREADS", "")
    count = threads or (int(given) if given.isdigit() else max(1, cores // local_size))
    torch.set_num_threads(count)
    return count
