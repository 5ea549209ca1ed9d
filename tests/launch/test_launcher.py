"""Launchers are recognised from the environment alone."""

from __future__ import annotations

import pytest

from engine.errors import UserError
from launch.launcher import detect_launcher, first_host

SRUN = {
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_rank_variables_mean_a_torch_launcher() -> None:
    launcher = detect_launcher({"RANK": "1", "WORLD_SIZE": "2"}, 1)
    assert (launcher.name, launcher.variables) == ("deepspeed or torchrun", {})


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


def test_the_users_own_rendezvous_wins_under_srun() -> None:
    variables = detect_launcher({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5"}, 1).variables
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("10.0.0.1", "5")


def test_a_shell_inside_an_allocation_trains_in_one_process() -> None:
    launcher = detect_launcher({"SLURM_JOB_ID": "9", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 4321)
    assert launcher.name == "none"
    assert (launcher.variables["WORLD_SIZE"], launcher.variables["MASTER_PORT"]) == ("1", "4321")


def test_tasks_that_would_train_apart_are_refused() -> None:
    with pytest.raises(UserError, match="WORLD_SIZE: 1 is set but srun started 4 tasks"):
        detect_launcher({**SRUN, "RANK": "0", "WORLD_SIZE": "1"}, 1)


def test_mpirun_is_left_to_deepspeeds_discovery() -> None:
    launcher = detect_launcher({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, 1)
    assert (launcher.name, launcher.variables) == ("mpirun", {})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("gpu[03-05,9]", "gpu03"), ("n[1,3],m2", "n1"), ("login1,gpu[1-2]", "login1")],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
