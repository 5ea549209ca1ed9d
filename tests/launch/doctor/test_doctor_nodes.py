"""What the doctor says of MPI, of a SLURM job, and of the other nodes of a run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.errors import UserError
from launch.doctor import cluster, nodes
from launch.doctor.command import named_nodes
from launch.doctor.nodes import Remote
from tests.conftest import ROOT
from tests.launch.fakes import fake, listening_port, only, program


@pytest.fixture
def listening() -> Iterator[int]:
    with listening_port() as port:
        yield port


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_mpi_must_be_one() -> None:
    ours, theirs = "mpirun (Open MPI) 5.0.11", "HYDRA build details: Version 4.1"
    assert cluster.judge_mpi(ours, "Open MPI v5.0.11, package: x", "").status == "ok"
    assert cluster.judge_mpi(ours, "Open MPI v4.1.6, package: x", "").status == "problem"
    assert cluster.judge_mpi(ours, "MPICH Version: 4.2", "").status == "problem"
    assert cluster.judge_mpi(theirs, "MPICH Version: 4.2", "").status == "ok"
    assert "libmpi.so" in cluster.judge_mpi(ours, "", "libmpi.so: cannot open").found
    assert cluster.judge_mpi("", "", "").status == "note"


ALLOCATION = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "gpu[01-02]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_CPUS_PER_TASK": "8",
}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({}, None),
        ({"SLURM_JOB_NUM_NODES": "3"}, "SLURM_JOB_NODELIST names 2"),
        ({"SLURM_NTASKS": "5"}, "SLURM_NTASKS=5"),
        ({"OMP_NUM_THREADS": "16"}, "OMP_NUM_THREADS=16"),
        ({"SLURM_PROCID": "4", "SLURM_STEP_NUM_TASKS": "4"}, "SLURM_PROCID=4"),
        ({"RANK": "0", "WORLD_SIZE": "some"}, "WORLD_SIZE"),
    ],
)
def test_an_allocations_variables_agree(changed: dict[str, str], named: str | None) -> None:
    finding = only(cluster.judge_allocation(ALLOCATION | changed))
    assert finding.status == ("ok" if named is None else "problem")
    assert named is None or named in finding.found


def test_node_lists_are_expanded() -> None:
    assert nodes.expand("gpu[03-05,9],login1") == ["gpu03", "gpu04", "gpu05", "gpu9", "login1"]
    assert nodes.expand("r[1-2]n[1,3]-ib") == ["r1n1-ib", "r1n3-ib", "r2n1-ib", "r2n3-ib"]
    assert nodes.expand("") == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("node1 slots=8\nnode2\n", "line 2"),
        ("node1 slots=0\n", "line 1"),
        ("node1 slots=8 node2 slots=8", "line 1"),
        ("-oProxyCommand=x slots=8", "line 1"),
        ("node1 slots=8\n\nnode1 slots=4", "twice"),
        ("# nothing\n", "names no node"),
        ("\xff\x00", "line 1"),
    ],
)
def test_a_bad_hostfile_is_one_line(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "hostfile").write_text(text)
    with pytest.raises(UserError, match=named):
        named_nodes(str(tmp_path / "hostfile"), None, 22, {})


def test_a_bad_hostfile_ends_the_command_with_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch", "doctor", f"--hostfile={tmp_path}/none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: hostfile: {tmp_path}/none can't be read (No such file or directory)\n"


@pytest.mark.parametrize("names", ["", "a b", "a,-oProxyCommand=touch", "a;b", "a,$(b)"])
def test_a_bad_list_of_nodes_is_one_line(names: str) -> None:
    with pytest.raises(UserError, match="nodes: "):
        named_nodes(None, names, 22, {})


def test_the_nodes_are_named_once_and_the_port_is_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not both"):
        named_nodes("hostfile", "a", 22, {})
    with pytest.raises(UserError, match="ssh_port: 0 "):
        named_nodes(None, "a", 0, {})
    (tmp_path / "hostfile").write_text("b slots=2 # best\na slots=1\n")
    assert named_nodes(str(tmp_path / "hostfile"), None, 2222, {}) == (["b", "a"], Remote("ssh", 2222))
    assert named_nodes(None, None, 22, ALLOCATION) == (["gpu01", "gpu02"], Remote("srun"))
    assert named_nodes(None, None, 22, {}) == ([], Remote("srun"))


def path_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_an_equal_node_is_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listening: int) -> None:
    fake(tmp_path / "bin", "ssh")
    path_with(tmp_path / "bin", monkeypatch)
    clock, software = nodes.check_nodes(["localhost"], Remote("ssh", listening))
    assert (clock.status, software.status) == ("ok", "ok"), (clock, software)
    assert "torch" in software.found


def test_a_node_that_refuses_keys_or_has_no_python_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listening: int
) -> None:
    path_with(tmp_path / "bin", monkeypatch)
    program(tmp_path / "bin", "ssh", "#!/bin/sh\necho Permission denied >&2; exit 255\n")
    finding = only(nodes.check_nodes(["localhost"], Remote("ssh", listening)))
    assert "Permission denied" in finding.found
    program(
        tmp_path / "bin",
        "ssh",
        '#!/bin/sh\ncase "$*" in *date*) date +%s.%N;; *) echo not found >&2; exit 127;; esac\n',
    )
    _, software = nodes.check_nodes(["localhost"], Remote("ssh", listening))
    assert (software.status, "not found" in software.found) == ("problem", True)
    program(tmp_path / "bin", "ssh", "#!/bin/sh\necho Welcome\n")
    assert only(nodes.check_nodes(["localhost"], Remote("ssh", listening))).status == "problem"


def test_a_node_without_sshd_is_a_problem(closed_port: int) -> None:
    finding = only(nodes.check_node("localhost", Remote("ssh", closed_port), {}))
    assert (finding.status, f"port {closed_port}" in finding.found) == ("problem", True)


def test_in_an_allocation_srun_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path / "bin", "srun", ahead=-5)
    path_with(tmp_path / "bin", monkeypatch)
    clock, software = nodes.check_nodes(["localhost"], Remote("srun"))
    assert (clock.status, "behind" in clock.found, software.status) == ("problem", True, "ok")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no srun on PATH" in only(nodes.check_nodes(["localhost"], Remote("srun"))).found


def test_half_of_the_round_trip_is_taken_off_and_the_quickest_try_is_believed() -> None:
    now, delays = [100.0], iter([4.0, 0.2, 2.0])

    def ask() -> str:
        delay = next(delays)
        answer = now[0] + delay / 2 + 7.0
        now[0] += delay
        return f"motd\n{answer}"

    ahead, uncertainty = nodes.clock_difference(ask, lambda: now[0])
    assert ahead == pytest.approx(7.0)
    assert uncertainty == pytest.approx(0.1)


def test_a_slow_connection_is_not_taken_for_a_wrong_clock() -> None:
    assert nodes.judge_clock("a", 2.0, 1.5).status == "ok"
    assert nodes.judge_clock("a", -2.0, 0.5).status == "problem"
