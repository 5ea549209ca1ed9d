"""Which launcher started this process, and the environment that DeepSpeed needs from it: pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.errors import UserError


@dataclass(frozen=True)
class Launcher:
    """A recognised launcher and the variables to add to the environment before DeepSpeed starts."""

    name: str
    variables: dict[str, str] = field(default_factory=dict)


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: "gpu[03-05,9],login1" -> "gpu03"."""
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return nodelist.split(",")[0]
    numbers, _, tail = rest.partition("]")
    return head + numbers.split(",")[0].split("-")[0] + tail.split(",")[0]


def detect_launcher(env: Mapping[str, str], free_port: int) -> Launcher:
    """Recognise torchrun/deepspeed, srun, mpirun or a plain process from its environment.

    srun tasks get RANK, LOCAL_RANK and WORLD_SIZE from SLURM's variables; the rendezvous is the job's first
    node, at a port derived from the job id so that jobs on one node don't meet. A shell inside an allocation is
    no srun task (it has no step) and trains in one process.

    Args:
        env: the process environment.
        free_port: rendezvous port of a plain process.

    Raises:
        UserError: the world that SLURM started isn't the world that the variables announce.
    """
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", "0") or 0)
    if "RANK" in env and "WORLD_SIZE" in env:
        if tasks > 1 and "SLURM_PROCID" in env and int(env["WORLD_SIZE"]) < tasks:
            raise UserError(
                f"WORLD_SIZE: {env['WORLD_SIZE']} is set but srun started {tasks} tasks, which would train apart; "
                "unset RANK and WORLD_SIZE, or start one launcher a node"
            )
        return Launcher("deepspeed or torchrun")
    if tasks and "SLURM_PROCID" in env:
        return Launcher("srun", slurm_variables(env, tasks))
    if int(env.get("OMPI_COMM_WORLD_SIZE", env.get("PMI_SIZE", "1"))) > 1:
        return Launcher("mpirun")
    return Launcher("none", single_process_variables(free_port))


def is_first_rank(env: Mapping[str, str]) -> bool:
    """Whether this process is rank 0 of its launcher, or has none."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    return next((env[name] for name in names if name in env), "0") == "0"


def slurm_variables(env: Mapping[str, str], tasks: int) -> dict[str, str]:
    """torch's rendezvous variables for this task of an srun step of `tasks` tasks."""
    hosts = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "127.0.0.1"
    job = int(env.get("SLURM_JOB_ID", "0") or 0)
    return {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0],
        "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(hosts),
        "MASTER_PORT": env.get("MASTER_PORT") or str(20000 + job % 20000),
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
