"""Which launcher started this process, what DeepSpeed needs from it, and whether it started the world that was meant.

Pure functions of the environment. A launcher that starts processes which don't know of one another makes each of them
train alone, silently and over one another's files; what shows of that in the environment is refused here.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.errors import RunError, UserError

#: what torch's rendezvous needs; DeepSpeed looks for MPI where one of them is missing, and trains alone without it
RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
#: rank and size of a process, by whoever sets them: torch's launchers, Open MPI, MPICH, SLURM
WORLDS = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


@dataclass(frozen=True)
class Launcher:
    """A recognised launcher and the variables to add to the environment before DeepSpeed starts."""

    name: str
    """deepspeed, torchrun, mpirun, srun, none, or environment: variables that somebody else set"""
    world_size: int
    """ranks that it started"""
    variables: dict[str, str] = field(default_factory=dict)
    notice: str | None = None
    """what the user should know and may not have meant"""


def detect_launcher(env: Mapping[str, str], free_port: int) -> Launcher:
    """Recognise the launcher of this process from its environment.

    srun tasks get RANK, LOCAL_RANK and WORLD_SIZE from SLURM's variables; the rendezvous is the job's first
    node, at a port derived from the job and its step so that jobs on one node don't meet. A shell inside an
    allocation is no srun task (it has no step) and trains in one process.

    Args:
        env: the process environment; an empty variable is as none.
        free_port: rendezvous port of a plain process; 0: whichever is free when it is opened.

    Raises:
        UserError: variables that contradict one another, or a world smaller than the one that SLURM started.
    """
    env = {name: value for name, value in env.items() if value}
    if "RANK" in env or "WORLD_SIZE" in env:
        return announced(env)
    tasks = slurm_tasks(env)
    mpi = next((names for names in WORLDS[1:3] if any(name in env for name in names)), None)
    if mpi is not None:
        rank, size = place(env, *mpi)
        refuse_part(mpi[1], size, tasks)
        if size > 1 and size != tasks:  # mpirun's daemons are the srun tasks then, if there are any, not its ranks
            return Launcher("mpirun", size)
        if size > 1:
            refuse_other(mpi[0], rank, size, env)
    if tasks:
        place(env, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
        variables = slurm_variables(env, tasks)
        return Launcher("srun", tasks, variables, unused_allocation(env) if tasks == 1 else None)
    return Launcher("none", 1, single_process_variables(free_port), unused_allocation(env))


def announced(env: Mapping[str, str]) -> Launcher:
    """The launcher that set torch's variables: torchrun, deepspeed, or somebody else."""
    missing = [name for name in RENDEZVOUS if not env.get(name)]
    if missing:
        present = " and ".join(name for name in RENDEZVOUS if name not in missing)
        raise UserError(
            f"{', '.join(missing)}: not set though {present} is; set all of {', '.join(RENDEZVOUS)}, or unset them"
        )
    rank, size = place(env, "RANK", "WORLD_SIZE")
    for name in ("LOCAL_RANK", "MASTER_PORT"):
        number(env, name)
    refuse_disagreement(env, rank, size)
    tasks = slurm_tasks(env)
    refuse_part("WORLD_SIZE", size, tasks)
    for name, groups in (("torchrun", "GROUP_WORLD_SIZE"), ("deepspeed", "CROSS_SIZE")):
        if groups in env:
            launchers = number(env, groups)
            if tasks > 1 and launchers != tasks:
                raise UserError(
                    f"{groups}: {name} joins {launchers} launcher(s) but srun started {tasks}, which would train "
                    f"apart; give {name} the number of nodes and one rendezvous, or start the ranks by srun itself"
                )
            return Launcher(name, size, notice=unused_allocation(env) if launchers == 1 and tasks <= 1 else None)
    if tasks > 1:
        refuse_other("RANK", rank, size, env)
    return Launcher("environment", size)


def slurm_tasks(env: Mapping[str, str]) -> int:
    """Tasks of the srun step that this process belongs to; 0 outside of one, as in a batch script's shell."""
    return number(env, "SLURM_STEP_NUM_TASKS", 0) if "SLURM_PROCID" in env else 0


def refuse_part(name: str, size: int, tasks: int) -> None:
    """Refuse a world that is smaller than the srun step that it runs in."""
    if size < tasks:
        raise UserError(
            f"{name}: {size} is set but srun started {tasks} tasks, which would train apart; "
            "unset RANK and WORLD_SIZE, or start one launcher a node"
        )


def refuse_other(name: str, rank: int, size: int, env: Mapping[str, str]) -> None:
    """Refuse a rank that isn't the srun task that it runs in, where both count the same processes."""
    task, tasks = place(env, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    if (rank, size) != (task, tasks):
        raise UserError(
            f"{name}: rank {rank} of {size} is set but srun started this process as task {task} of {tasks}; "
            "start the ranks by one launcher, not by both"
        )


def refuse_disagreement(env: Mapping[str, str], rank: int, size: int) -> None:
    """Refuse torch's variables that contradict Open MPI's: one of the two is left over from another launcher."""
    if "OMPI_COMM_WORLD_SIZE" in env:
        other = place(env, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")
        if other[1] > 1 and other != (rank, size):
            raise UserError(
                f"RANK: rank {rank} of {size} is set but mpirun started rank {other[0]} of {other[1]}; "
                f"unset {', '.join(RENDEZVOUS)}"
            )


def unused_allocation(env: Mapping[str, str]) -> str | None:
    """What to say where SLURM allocated more than the one task or node that this run takes; None elsewhere."""
    sizes = [env.get(name, "") for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES")]
    if "SLURM_JOB_ID" not in env or not any(size.isdigit() and int(size) > 1 for size in sizes):
        return None
    tasks, nodes = (size or "1" for size in sizes)
    return (
        f"SLURM job {env['SLURM_JOB_ID']} has {tasks} task(s) on {nodes} node(s) and this run doesn't use them all; "
        "srun python launch/train.py ... starts a rank a task"
    )


def number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A launcher's variable as a number of 0 or more.

    Raises:
        UserError: it isn't one, or isn't there and has no default.
    """
    text = env.get(name, "")
    if not text and default is not None:
        return default
    if not re.fullmatch("[0-9]+", text):
        raise UserError(f"{name}: {text!r} is not a whole number of 0 or more; unset it, or start by one launcher")
    return int(text)


def place(env: Mapping[str, str], rank_name: str, size_name: str) -> tuple[int, int]:
    """The rank and the size that a launcher announces.

    Raises:
        UserError: no numbers, or a rank outside of its world.
    """
    rank, size = number(env, rank_name), number(env, size_name)
    if rank >= size:
        raise UserError(f"{rank_name}: {rank} is not below {size_name}, which is {size}; ranks count from 0")
    return rank, size


def check_world(launcher: Launcher, size: int) -> None:
    """Compare the world that was joined with the one that the launcher started.

    Raises:
        RunError: ranks are missing, or there are too many.
    """
    if size != launcher.world_size:
        raise RunError(
            f"{launcher.name} started {launcher.world_size} rank(s) but {size} met; look for errors of the others"
        )


def announced_rank(env: Mapping[str, str]) -> int:
    """The rank that this process's launcher gave it; 0 without one, and where its variables make no sense."""
    for rank_name, size_name in WORLDS:
        rank, size = env.get(rank_name, ""), env.get(size_name, "")
        if rank.isdecimal() and size.isdecimal() and int(rank) < int(size):
            return int(rank)
    return 0


def empty_variables(env: Mapping[str, str]) -> list[str]:
    """The launchers' variables that are set to nothing, which DeepSpeed would take for set."""
    names = {*RENDEZVOUS, *(name for pair in WORLDS for name in pair), "LOCAL_WORLD_SIZE", "LOCAL_SIZE"}
    return sorted(name for name in names if env.get(name) == "")


def is_first_rank(env: Mapping[str, str]) -> bool:
    """Whether this process is rank 0 of its launcher, or has none; also where its variables make no sense."""
    return announced_rank(env) == 0


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: "gpu[03-05,9],login1" -> "gpu03"."""
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return nodelist.split(",")[0]
    numbers, _, tail = rest.partition("]")
    return head + numbers.split(",")[0].split("-")[0] + tail.split(",")[0]


def tasks_on_node(counts: str, node: int) -> int:
    """Tasks of a step on its node-th node: ("2(x3),1", 3) -> 1."""
    expanded: list[int] = []
    for part in counts.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE: {counts!r} is not such as 2(x3),1; unset it")
        expanded += [int(match[1])] * int(match[2] or 1)
    return expanded[min(node, len(expanded) - 1)]


def slurm_variables(env: Mapping[str, str], tasks: int) -> dict[str, str]:
    """torch's rendezvous variables for this task of an srun step of `tasks` tasks."""
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    job, step = number(env, "SLURM_JOB_ID", 0), number(env, "SLURM_STEP_ID", 0)
    counts = env.get("SLURM_STEP_TASKS_PER_NODE", "1")
    return {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": str(number(env, "SLURM_LOCALID", 0)),
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks_on_node(counts, number(env, "SLURM_NODEID", 0))),
        "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(hosts),
        "MASTER_PORT": env.get("MASTER_PORT") or str(20000 + (job + 1009 * step) % 10000),
    }


def single_process_variables(free_port: int) -> dict[str, str]:
    """torch's rendezvous variables for a run of one process."""
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port),
    }


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
