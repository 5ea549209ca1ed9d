"""Launchers are recognised from the environment alone, and worlds that nobody meant are refused."""

from __future__ import annotations

import pytest

from engine.errors import RunError, UserError
from launch.launcher import Launcher, check_world, detect_launcher, first_host, is_first_rank, tasks_on_node

SRUN = {
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
TORCH = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = TORCH | {"TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "1"}
DEEPSPEED = TORCH | {"CROSS_RANK": "0", "CROSS_SIZE": "1"}
MPIRUN = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
#: the batch script's shell, or one in an allocation
SHELL = {"SLURM_JOB_ID": "9", "SLURM_NTASKS": "8", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("env", "name", "size"),
    [
        (TORCHRUN, "torchrun", 2),
        (DEEPSPEED, "deepspeed", 2),
        (TORCH, "environment", 2),
        (MPIRUN, "mpirun", 2),
        ({"PMI_SIZE": "3", "PMI_RANK": "2"}, "mpirun", 3),
        (SRUN, "srun", 4),
        ({}, "none", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_launcher_and_its_world_are_recognised(env: dict[str, str], name: str, size: int) -> None:
    launcher = detect_launcher(env, 1)
    assert (launcher.name, launcher.world_size, launcher.notice) == (name, size, None)
    assert bool(launcher.variables) == (name in ("srun", "none"))


def test_an_srun_task_gets_its_rendezvous_from_slurm() -> None:
    launcher = detect_launcher(SRUN, 1)
    assert launcher.name == "srun"
    assert launcher.variables == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "20123",
    }


def test_steps_of_one_job_meet_at_ports_of_their_own() -> None:
    ports = {detect_launcher({**SRUN, "SLURM_STEP_ID": str(step)}, 1).variables["MASTER_PORT"] for step in range(8)}
    assert len(ports) == 8


def test_the_users_own_rendezvous_wins_under_srun() -> None:
    variables = detect_launcher({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"}, 1).variables
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("10.0.0.1", "5")


def test_a_shell_inside_an_allocation_trains_in_one_process_and_says_so() -> None:
    launcher = detect_launcher(SHELL, 4321)
    assert launcher.name == "none"
    assert (launcher.variables["WORLD_SIZE"], launcher.variables["MASTER_PORT"]) == ("1", "4321")
    assert launcher.notice is not None
    assert "SLURM job 9 has 8 task(s) on 2 node(s) and this run doesn't use them all" in launcher.notice


def test_a_launcher_on_the_first_node_alone_is_told() -> None:
    assert "2 node(s)" in str(detect_launcher(SHELL | TORCHRUN, 1).notice)
    assert detect_launcher(SHELL | TORCHRUN | {"GROUP_WORLD_SIZE": "2"}, 1).notice is None


def test_an_interactive_step_of_a_larger_allocation_is_told() -> None:
    step = SHELL | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290"}
    launcher = detect_launcher(step, 1)
    assert (launcher.name, launcher.world_size) == ("srun", 1)
    assert "srun python launch/train.py" in str(launcher.notice)


def test_one_launcher_a_node_may_start_more_ranks_than_srun_tasks() -> None:
    step = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    ranks = {"RANK": "5", "WORLD_SIZE": "8"}
    assert detect_launcher(step | TORCHRUN | ranks | {"GROUP_WORLD_SIZE": "2"}, 1).name == "torchrun"
    assert detect_launcher(step | DEEPSPEED | ranks | {"CROSS_SIZE": "2"}, 1).name == "deepspeed"


def test_mpiruns_daemons_are_srun_tasks_and_not_its_ranks() -> None:
    daemon = SRUN | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
    ranks = {"OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_RANK": "4"}
    assert detect_launcher(daemon | ranks, 1) == Launcher("mpirun", 6)


def test_srun_with_pmi_is_srun() -> None:
    assert detect_launcher(SRUN | {"PMI_SIZE": "4", "PMI_RANK": "3"}, 1).name == "srun"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (SRUN | TORCH | {"RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE: 1 is set but srun started 4 tasks"),
        (SRUN | TORCH | {"RANK": "0", "WORLD_SIZE": "4"}, "RANK: rank 0 of 4 is set but srun started .* task 3 of 4"),
        (SRUN | TORCH | {"WORLD_SIZE": "8"}, "RANK: rank 1 of 8 is set but srun started"),
        (SRUN | TORCHRUN | {"WORLD_SIZE": "4"}, "GROUP_WORLD_SIZE: torchrun joins 1 launcher.* srun started 4"),
        (SRUN | DEEPSPEED | {"WORLD_SIZE": "4"}, "CROSS_SIZE: deepspeed joins 1 launcher.* srun started 4"),
        (SRUN | MPIRUN, "OMPI_COMM_WORLD_SIZE: 2 is set but srun started 4 tasks"),
        (SRUN | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "rank 0 of 4 is set but srun .* 3 of 4"),
        (TORCH | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"}, "RANK: .* mpirun started rank 1 of 4"),
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: not set though RANK is"),
        ({"WORLD_SIZE": "2"}, "RANK, LOCAL_RANK, .* not set though WORLD_SIZE is"),
        (TORCH | {"LOCAL_RANK": ""}, "LOCAL_RANK: not set though RANK and WORLD_SIZE and"),
        (TORCH | {"RANK": "2"}, "RANK: 2 is not below WORLD_SIZE, which is 2"),
        (TORCH | {"RANK": "-1"}, "RANK: '-1' is not a whole number"),
        (TORCH | {"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' is not a whole number"),
        (TORCH | {"LOCAL_RANK": "x"}, "LOCAL_RANK: 'x' is not a whole number"),
        (TORCH | {"MASTER_PORT": "http"}, "MASTER_PORT: 'http' is not a whole number"),
        (SRUN | {"SLURM_PROCID": "4"}, "SLURM_PROCID: 4 is not below SLURM_STEP_NUM_TASKS"),
        (SRUN | {"SLURM_PROCID": "²"}, "SLURM_PROCID: '²' is not a whole number"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(y2)"}, "SLURM_STEP_TASKS_PER_NODE: '2\\(y2\\)'"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK: '' is not a whole number"),
        ({"OMPI_COMM_WORLD_SIZE": "x", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE: 'x'"),
    ],
)
def test_worlds_that_nobody_meant_are_refused(env: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        detect_launcher(env, 1)


def test_the_joined_world_must_be_the_started_one() -> None:
    check_world(Launcher("srun", 4), 4)
    with pytest.raises(RunError, match="srun started 4 rank\\(s\\) but 1 met"):
        check_world(Launcher("srun", 4), 1)


@pytest.mark.parametrize(
    ("env", "first"),
    [
        ({}, True),
        (TORCH, False),
        (TORCH | {"RANK": "0"}, True),
        (MPIRUN, False),
        (SRUN, False),
        (SRUN | {"SLURM_PROCID": "0"}, True),
        (SHELL, True),
        ({"RANK": "1"}, True),
        (TORCH | {"RANK": "7"}, True),
        (TORCH | {"RANK": "x"}, True),
    ],
)
def test_one_rank_speaks_and_nonsense_does_not_silence_it(env: dict[str, str], first: bool) -> None:
    assert is_first_rank(env) == first


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("gpu[03-05,9]", "gpu03"), ("n[1,3],m2", "n1"), ("login1,gpu[1-2]", "login1")],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(("counts", "node", "tasks"), [("2(x3),1", 2, 2), ("2(x3),1", 3, 1), ("4", 0, 4), ("4", 5, 4)])
def test_tasks_on_a_node(counts: str, node: int, tasks: int) -> None:
    assert tasks_on_node(counts, node) == tasks
