"""Which world a process finds itself in, under launchers that a real SLURM cluster starts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.curves import read_curves
from tests.cluster.bench import slurm_environment
from tests.cluster.slurm_cluster import Cluster
from tests.conftest import ROOT
from tests.train.runs import BIN, SCRIPT, SMALL

DETECT = (
    "import json, os, sys; from launch.launcher import detect_launcher; found = detect_launcher(os.environ, 4321); "
    "sys.stdout.write(json.dumps([found.name, found.world_size, found.variables, found.notice]) + chr(10))"
)


def call(cluster: Cluster, *command: str, code: int | None = 0, **variables: str) -> str:
    """What a command prints, run from the checkout with the cluster's environment."""
    environment = slurm_environment(cluster) | variables
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert code is None or done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_srun_tasks_on_two_nodes_are_one_world(cluster: Cluster) -> None:
    printed = call(cluster, "srun", "--nodes=2", "--ntasks=3", sys.executable, "-c", DETECT)
    found = sorted((json.loads(line) for line in printed.splitlines()), key=lambda told: int(told[2]["RANK"]))
    assert [(name, size) for name, size, _, _ in found] == [("srun", 3)] * 3
    assert [told[2]["RANK"] for told in found] == ["0", "1", "2"]
    assert [told[2]["LOCAL_RANK"] for told in found] == ["0", "1", "0"]
    assert [told[2]["LOCAL_WORLD_SIZE"] for told in found] == ["2", "2", "1"]
    assert {told[2]["MASTER_ADDR"] for told in found} == {"node1"}
    assert len({told[2]["MASTER_PORT"] for told in found}) == 1


def test_a_shell_in_an_allocation_is_alone_and_says_so(cluster: Cluster) -> None:
    printed = call(cluster, "salloc", "--quiet", "--nodes=2", "--ntasks=4", sys.executable, "-c", DETECT)
    name, size, _, notice = json.loads(printed)
    assert (name, size) == ("none", 1)
    assert re.search(r"SLURM job \d+ has 4 task\(s\) on 2 node\(s\) and this run doesn't use them all", notice)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, "error: WORLD_SIZE: 1 is set but srun started 2 tasks"),
        pytest.param(
            {"RANK": "0", "WORLD_SIZE": "2"},
            "error: RANK: rank 0 of 2 is set but srun started this process as task 1",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_tasks_that_would_train_apart_are_refused(cluster: Cluster, variables: dict[str, str], message: str) -> None:
    """Variables that a batch script exports once, for all tasks."""
    rest = {"LOCAL_RANK": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    command = ["srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1", sys.executable, SCRIPT, "--debug"]
    printed = call(cluster, *command, "--output=/dev/null/no", code=None, **variables, **rest)
    assert message in printed
    assert "1 rank(s) on cpu" not in printed


@pytest.mark.slow
def test_a_launcher_on_each_node_that_does_not_know_the_other_is_refused(cluster: Cluster) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SCRIPT, "--debug"]
    printed = call(cluster, "srun", "--nodes=2", "--ntasks=2", *torchrun, "--output=/dev/null/no", code=None)
    assert "GROUP_WORLD_SIZE: torchrun joins 1 launcher(s) but srun started 2" in printed


@pytest.mark.slow
def test_deepspeeds_slurm_launcher_trains_as_one_world(cluster: Cluster, store: Path, tmp_path: Path) -> None:
    """It exports neither RANK nor a rendezvous; without a look at SLURM's variables each task would train alone."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    deepspeed = [
        str(BIN / "deepspeed"),
        "--launcher=slurm",
        "--no_ssh_check",
        "--master_addr=node1",
        f"--hostfile={hostfile}",
    ]
    options = [f"--output={tmp_path / 'run'}", f"--data.path={store}", *SMALL, "--train.steps=2"]
    salloc = ["salloc", "--quiet", "--nodes=2", "--ntasks=2"]
    printed = call(cluster, *salloc, sys.executable, *deepspeed, SCRIPT, *options)
    assert "srun: 2 rank(s) on cpu" in printed
    assert [step for step, _ in read_curves(tmp_path / "run", ["train/loss"])["train/loss"]] == [1, 2]
