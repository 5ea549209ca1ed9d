"""The process group of a run: all ranks join it at the start and leave it together at the end."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch

from engine import dist
from engine.config import FaultConfig
from engine.errors import UserError, first_line
from engine.train.ranks.device import settle
from engine.train.ranks.gpus import check_gpu, check_hidden
from engine.train.ranks.interface import address_of, check_interface
from engine.train.ranks.meeting import Meeting, place_of
from engine.zero.quiet import import_deepspeed


def collective_timeout(hang_timeout: float | None) -> timedelta:
    """Longest time of a collective: beyond the watchdog's, since NCCL ends a process without a word of who is missing.

    Args:
        hang_timeout: fault.hang_timeout; for None, never, it is a week, as torch needs a number.
    """
    return timedelta(weeks=1) if hang_timeout is None else timedelta(seconds=hang_timeout, minutes=5)


def start_ranks(
    threads: int | None = None, timeout: timedelta | None = None, meeting: Meeting | None = None
) -> dist.World:
    """Join the process group that the launcher announced and return this process's place in it; collective.

    DeepSpeed's shared-memory all-reduce for CPUs is turned off: it compiles C++ at the first start, needs ninja,
    and leaves a 69 MB file in /dev/shm per rank and run. gloo is used instead.

    Args:
        threads: CPU threads of this rank; None divides the cores among the machine's ranks.
        timeout: longest time of a collective, after which a rank gives up on the others; None: that of the default
            fault.hang_timeout.
        meeting: where the ranks report their mistakes before they join.

    Raises:
        UserError: this rank has no GPU that it can use, or ranks of other hosts can't reach it; with a meeting any
            rank's mistake, on all ranks.
        Stopped: in the meeting, if a rank was asked to stop.
    """
    chosen = bool(os.environ.get("DS_ACCELERATOR"))
    if not chosen and not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import_deepspeed()
    except ValueError as error:  # of the accelerator, which it looks for while it is imported
        raise UserError(f"DS_ACCELERATOR: {os.environ.get('DS_ACCELERATOR')!r}: {first_line(error)}") from error
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":  # the table is made at its first use, with lines of each operator
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    if meeting is not None and place_of(os.environ) is None:  # under mpirun, which sets no such variables
        deepspeed.comm.comm.mpi_discovery(verbose=False)
    place = place_of(os.environ)
    if meeting is not None and place is not None:
        meeting.hold(place, lambda: check_node(chosen))
    else:
        check_node(chosen)
    timeout = timeout or collective_timeout(FaultConfig().hang_timeout)
    deepspeed.init_distributed(verbose=False, timeout=timeout)
    # DeepSpeed makes groups of its own, without a time-out: they would take the back end's, of NCCL 10 minutes
    deepspeed.comm.comm.cdb.new_group = partial(torch.distributed.new_group, timeout=timeout)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    accelerator = get_accelerator()
    device = torch.device("cpu")
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    world = dist.World(
        rank=torch.distributed.get_rank(),
        size=torch.distributed.get_world_size(),
        local_rank=local_rank,
        local_size=dist.local_size(os.environ),
        device=device,
    )
    settle(device)
    dist.set_threads(world.local_size, threads)
    return world


def check_node(chosen: bool) -> None:
    """Check what this rank needs of its host: a GPU of its own, or to be reached by the ranks of other hosts.

    Args:
        chosen: whether the user set DS_ACCELERATOR, and so may want CPUs where there are GPUs.

    Raises:
        UserError: it hasn't got it.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator, local_size = get_accelerator().device_name(), dist.local_size(os.environ)
    if accelerator == "cuda":
        check_gpu(int(os.environ.get("LOCAL_RANK", "0")), local_size)
    if accelerator == "cpu" and not chosen:
        check_hidden(os.environ)
    if accelerator == "cpu":
        check_interface(os.environ, local_size, socket.gethostname(), address_of)


def end_ranks(world: dist.World, *, together: bool = True, met: Callable[[], None] = lambda: None) -> None:
    """Leave the process group, once every rank is done unless `together` is false (a rank may have failed alone).

    `met` is called once all ranks have come here, and none needs another any more.

    gloo aborts the interpreter's exit when its last asynchronous work is dropped too early (measured: 7 exits
    of 25 at once, none of 25 after 0.3 s).
    """
    if world.size > 1:
        if together:
            dist.barrier()
            met()
        time.sleep(0.3)
    if together:
        torch.distributed.destroy_process_group()
