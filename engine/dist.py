"""Ranks, devices, seeds, and the only calls of collectives.

Every function works in one process with no process group, where it is the identity.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor

from engine.errors import UserError

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


def agreed(work: Callable[[], T]) -> T:
    """Do `work` on every rank; a user's mistake that any of them meets is raised on all; collective.

    Work that may fail on one rank alone must hold no collective.
    """
    result: T | None = None
    message: str | None = None
    try:
        result = work()
    except UserError as error:
        message = str(error)
    messages = [m for m in gather_objects(message) if m]
    if messages:
        raise UserError(messages[0])
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
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, object]) -> None:
    """Put back what `rng_state` returned."""
    random.setstate(state["python"])  # type: ignore[arg-type]
    np.random.set_state(state["numpy"])  # type: ignore[arg-type]
    torch.set_rng_state(state["torch"])  # type: ignore[arg-type]
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])  # type: ignore[arg-type]


def set_threads(local_size: int, threads: int | None) -> int:
    """Give this rank its share of the cores: more threads than cores slow every rank down many times.

    A launcher's OMP_NUM_THREADS wins unless `threads` is given.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    given = os.environ.get("OMP_NUM_THREADS", "")
    count = threads or (int(given) if given.isdigit() else max(1, cores // local_size))
    torch.set_num_threads(count)
    return count
