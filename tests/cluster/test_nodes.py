"""Training over two nodes that know each other by SSH only: the same losses, and an end of both whatever happens."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.errors import HANG_EXIT_CODE
from engine.train.watch.preempt import MARKER
from tests.cluster.namespaces import INTERFACE, Network, Node, missing
from tests.cluster.slurm_cluster import wait_for
from tests.conftest import ROOT
from tests.train.checkpoint.accidents import WORKER, accident, heartbeat, tracebacks
from tests.train.runs import BIN, SCRIPT, SMALL, environment, losses, run

STEPS = 12
CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
#: a command line of every rank and of none of its launchers
RANK = "--local_rank="
#: keeps runs slow enough to be interrupted in a given step
SLOW = accident(0, None, "sleep", 0.2)
#: notices a node that is no longer there; ssh would wait for a quarter of an hour
KEEP_ALIVE = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=2 -o ServerAliveCountMax=3"}
DETECT = """
import json, os, sys
from engine.dist import local_size
from launch.launcher import detect_launcher
found = detect_launcher(os.environ, 4321)
sys.stdout.write(json.dumps([found.name, found.world_size, local_size(os.environ), os.environ["RANK"],
    os.environ["LOCAL_RANK"], os.uname().nodename, found.notice]) + chr(10))
"""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Two nodes on a network, or a visible skip."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    started = Network()
    try:
        started.start()
        yield started
    finally:
        started.stop()


@pytest.fixture
def nodes(network: Network) -> Iterator[list[Node]]:
    """The two nodes, with nothing of an earlier test on them."""
    yield network.nodes
    for node in network.nodes:
        node.clear()


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an undisturbed run of two ranks on one machine."""
    output = tmp_path_factory.mktemp("alone") / "run"
    run(output, *options(store), launcher="deepspeed", ranks=2)
    return output


def options(store: Path) -> list[str]:
    return [f"--data.path={store}", f"--train.steps={STEPS}", "--train.zero_stage=2", "--train.micro_batch=4"]


def prepare(folder: Path, slots: int = 1, accidents: Sequence[dict[str, Any]] = ()) -> list[str]:
    """Write the files of a launch; the arguments of `deepspeed` that all launches share."""
    (folder / "hostfile").write_text(f"node1 slots={slots}\nnode2 slots={slots}\n")
    variables = dict(CPU)
    if accidents:  # DeepSpeed puts the value between double quotes
        variables["ACCIDENTS"] = json.dumps(accidents).replace('"', '\\"')
    (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    return [sys.executable, str(BIN / "deepspeed"), "--hostfile=hostfile", "--master_addr=node1"]


def over_pdsh(
    nodes: list[Node], folder: Path, *arguments: str, slots: int = 1, accidents: Sequence[dict[str, Any]] = ()
) -> subprocess.Popen[str]:
    """`deepspeed --hostfile` on the first node; accidents need the worker that knows them."""
    command = prepare(folder, slots, accidents)
    script = WORKER if accidents else SCRIPT
    env = environment() | KEEP_ALIVE | {"PYTHONPATH": str(ROOT)}
    return nodes[0].start_command(folder, *command, script, f"--output={folder / 'run'}", *SMALL, *arguments, env=env)


def on_each(
    nodes: list[Node], folder: Path, *arguments: str, accidents: Sequence[dict[str, Any]]
) -> list[subprocess.Popen[str]]:
    """`deepspeed --no_ssh` on every node, whose exit code can be seen."""
    command = prepare(folder)
    env = environment() | {"PYTHONPATH": str(ROOT), "ACCIDENTS": json.dumps(accidents)}
    training = [WORKER, f"--output={folder / 'run'}", *SMALL, *arguments]
    return [
        node.start_command(folder, *command, "--no_ssh", f"--node_rank={number}", *training, env=env)
        for number, node in enumerate(nodes)
    ]


def torchrun(nodes: list[Node], folder: Path, *arguments: str, slots: int = 1) -> list[subprocess.Popen[str]]:
    """torchrun on every node, which meet at the first one."""
    rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=node1:29400", "--rdzv-id=run"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={slots}", *rendezvous]
    env = environment() | {"PYTHONPATH": str(ROOT)}
    return [node.start_command(folder, *command, *arguments, env=env) for node in nodes]


def end(process: subprocess.Popen[str], code: int | None = 0, seconds: float = 150) -> str:
    """Wait for the end with an exit code, None for any but 0; what was printed."""
    printed, _ = process.communicate(timeout=seconds)
    assert process.returncode == code if code is not None else process.returncode > 0, printed
    return printed


def wait_gone(nodes: list[Node], seconds: float) -> None:
    wait_for(lambda: not any(node.processes("train") for node in nodes), seconds, "the end of all ranks")


def errors(printed: str) -> list[str]:
    return [line.removeprefix("node1: ").removeprefix("node2: ") for line in printed.splitlines() if "error: " in line]


def test_two_nodes_train_as_one_over_pdsh(nodes: list[Node], store: Path, alone: Path, tmp_path: Path) -> None:
    printed = end(over_pdsh(nodes, tmp_path, *options(store)))
    assert "node1: deepspeed: 2 rank(s) on cpu, ZeRO-2" in printed
    assert losses(tmp_path / "run") == losses(alone)
    assert len(losses(alone)) == STEPS
    assert not any(node.processes() for node in nodes)


@pytest.mark.slow
def test_two_ranks_on_each_of_two_nodes(nodes: list[Node], store: Path, tmp_path: Path) -> None:
    run(tmp_path / "alone", *options(store), launcher="deepspeed", ranks=4)
    printed = end(over_pdsh(nodes, tmp_path, *options(store), slots=2))
    assert "node1: deepspeed: 4 rank(s) on cpu, ZeRO-2" in printed
    assert losses(tmp_path / "run") == losses(tmp_path / "alone")


@pytest.mark.slow
def test_torchruns_meet_on_the_first_node(nodes: list[Node], store: Path, alone: Path, tmp_path: Path) -> None:
    started = torchrun(nodes, tmp_path, SCRIPT, f"--output={tmp_path / 'run'}", *SMALL, *options(store))
    first, _ = [end(process) for process in started]
    assert "torchrun: 2 rank(s) on cpu, ZeRO-2" in first
    assert losses(tmp_path / "run") == losses(alone)


@pytest.mark.slow
def test_ranks_know_their_launcher_and_place(nodes: list[Node], tmp_path: Path) -> None:
    script = tmp_path / "detect.py"
    script.write_text(DETECT)
    places = [("0", "0", "node1"), ("1", "1", "node1"), ("2", "0", "node2"), ("3", "1", "node2")]
    expected = [[4, 2, *place] for place in places]
    env = environment() | {"PYTHONPATH": str(ROOT)}
    over = nodes[0].start_command(tmp_path, *prepare(tmp_path, 2), "--quiet", str(script), env=env)
    told = {"deepspeed": end(over), "torchrun": "".join(map(end, torchrun(nodes, tmp_path, str(script), slots=2)))}
    for launcher, printed in told.items():
        found = [json.loads(line[line.index("[") :]) for line in printed.splitlines() if f'["{launcher}"' in line]
        assert sorted((rest for _, *rest, _ in found), key=lambda rest: str(rest[2])) == expected, printed
        assert {notice for *_, notice in found} == {None}


@pytest.mark.slow
def test_a_signal_to_one_node_saves_on_all(nodes: list[Node], store: Path, alone: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    one = [accident(1, 4, "kill", int(signal.SIGUSR1))]
    printed = end(over_pdsh(nodes, tmp_path, *options(store), accidents=one))
    assert f"node1: stopped by SIGUSR1 at step 4; checkpoint {output / 'checkpoints' / 'step-000004'}" in printed
    assert (output / MARKER).read_text() == "4\n"
    assert heartbeat(output)["state"] == "preempted"
    assert not any(node.processes() for node in nodes)
    end(over_pdsh(nodes, tmp_path, *options(store), "--resume=auto"))
    assert losses(output) == losses(alone)


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
def test_when_the_ranks_of_a_node_are_killed_the_other_node_ends_too(
    nodes: list[Node], store: Path, tmp_path: Path, dead: int
) -> None:
    process = over_pdsh(nodes, tmp_path, *options(store), slots=2, accidents=[SLOW])
    wait_for(lambda: heartbeat_step(tmp_path / "run") >= 2, 120, "2 steps")
    start = time.monotonic()
    nodes[dead].signal(RANK, signal.SIGKILL)
    printed = end(process, code=None, seconds=60)
    seconds = time.monotonic() - start
    print(f"both nodes ended {seconds:.1f} s after the ranks of one were killed")
    assert seconds < 45
    assert not any(node.processes() for node in nodes)
    assert len(errors(printed)) == 1, printed
    words = f"error: (a rank on node{dead + 1}|another rank) has gone, so rank {2 * (1 - dead)} can't go on in "
    assert re.match(words, errors(printed)[0])
    assert not [line for line in tracebacks(printed) if "engine/" in line], printed


def heartbeat_step(output: Path) -> int:
    return int(heartbeat(output)["step"]) if (output / "heartbeat.json").exists() else 0


def interrupted(output: Path) -> list[str]:
    return ["--train.save_interval=2", "--fault.hang_timeout=8", f"--output={output}"]


@pytest.mark.slow
def test_a_cut_network_ends_both_nodes_and_the_run_goes_on_later(
    nodes: list[Node], store: Path, alone: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    started = on_each(nodes, tmp_path, *options(store), *interrupted(output), accidents=[SLOW])
    wait_for(lambda: (output / "checkpoints" / "step-000002").exists(), 120, "a checkpoint")
    start = time.monotonic()
    nodes[1].cut()
    printed = "".join(end(process, code=HANG_EXIT_CODE, seconds=90) for process in started)
    seconds = time.monotonic() - start
    print(f"both nodes ended {seconds:.1f} s after the cut")
    assert seconds < 60
    (error,) = errors(printed)
    assert re.search(
        r"no progress for \d+ s in step \d+: all ranks are equally far; node2 doesn't answer node1 \(", error
    )
    assert "node1 doesn't answer node2 (Network is unreachable)" in (output / "hang" / "rank-1.txt").read_text()
    assert heartbeat(output)["state"] == "failed"
    nodes[1].connect()
    for process in on_each(nodes, tmp_path, *options(store), "--resume=auto", accidents=[]):
        end(process)
    assert losses(output) == losses(alone)


@pytest.mark.slow
def test_a_cut_network_ends_the_command_too(nodes: list[Node], store: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = over_pdsh(nodes, tmp_path, *options(store), *interrupted(output), accidents=[SLOW])
    wait_for(lambda: (output / "checkpoints" / "step-000002").exists(), 120, "a checkpoint")
    start = time.monotonic()
    nodes[1].cut()
    printed = end(process, code=None, seconds=90)
    print(f"the command ended {time.monotonic() - start:.1f} s after the cut")
    assert "node2: ssh exited with exit code 255" in printed
    wait_gone(nodes, 30)
    assert (output / "hang" / "rank-1.txt").exists()


@pytest.mark.slow
def test_a_signal_to_the_command_saves_but_ends_other_runs_of_deepspeed_too(
    nodes: list[Node], store: Path, tmp_path: Path
) -> None:
    """DeepSpeed runs `pkill -f` on every node; these have processes of their own, so it ends none of the machine's."""
    output = tmp_path / "run"
    sleep = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--world_info=eyJhIjpbMF19", "--no_python"]
    other = nodes[1].start_command(tmp_path, *sleep, "--no_local_rank", "sleep", "300", env=environment())
    process = over_pdsh(nodes, tmp_path, *options(store), accidents=[SLOW])
    wait_for(lambda: heartbeat_step(output) >= 2, 120, "2 steps")
    nodes[0].signal("bin/deepspeed --hostfile", signal.SIGTERM)
    end(process, code=1, seconds=90)
    wait_gone(nodes, 60)
    assert heartbeat(output)["state"] == "preempted"
    assert int((output / MARKER).read_text()) >= 2
    end(other, code=1, seconds=10)


@pytest.mark.slow
def test_when_pdsh_dies_the_ranks_save(nodes: list[Node], store: Path, tmp_path: Path) -> None:
    process = over_pdsh(nodes, tmp_path, *options(store), accidents=[SLOW])
    wait_for(lambda: heartbeat_step(tmp_path / "run") >= 2, 120, "2 steps")
    nodes[0].signal("pdsh -S", signal.SIGKILL)
    wait_gone(nodes, 60)
    process.communicate(timeout=10)
    found = heartbeat(tmp_path / "run")
    assert found["state"] == "preempted"
    assert (tmp_path / "run" / MARKER).read_text() == f"{found['step']}\n"


@pytest.mark.slow
def test_a_host_name_that_is_loopback_is_refused_without_an_interface(
    nodes: list[Node], store: Path, tmp_path: Path
) -> None:
    """As Debian writes /etc/hosts; gloo would announce that address, and the others would wait for half an hour."""
    for node in nodes:
        others = "".join(f"{other.address} {other.name}\n" for other in nodes if other is not node)
        hosts = tmp_path / f"hosts.{node.name}"
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {node.name}\n{others}")
        node.run("mount", "--bind", str(hosts), "/etc/hosts")
    try:
        command = [*prepare(tmp_path)[:-1], f"--master_addr={nodes[0].address}"]
        training = [SCRIPT, f"--output={tmp_path / 'run'}", *SMALL, *options(store)]
        printed = end(nodes[0].start_command(tmp_path, *command, *training, env=environment()), code=2)
        first = nodes[0].name
        assert f"{first}: error: GLOO_SOCKET_IFNAME: not set, and {first} is 127.0.1.1 on that host" in printed
        assert len(errors(printed)) == 1
        assert not (tmp_path / "run").exists()
        with (tmp_path / ".deepspeed_env").open("a") as file:
            file.write(f"GLOO_SOCKET_IFNAME={INTERFACE}\n")
        end(nodes[0].start_command(tmp_path, *command, *training, env=environment()))
        assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, STEPS + 1))
    finally:
        for node in nodes:
            node.run("umount", "/etc/hosts")


@pytest.mark.slow
def test_the_doctor_knows_the_nodes_and_misses_one_that_was_cut(nodes: list[Node], tmp_path: Path) -> None:
    prepare(tmp_path)
    command = [sys.executable, "-m", "launch", "doctor", "--hostfile=hostfile", "--json", "--output=run"]

    def findings() -> dict[str, list[tuple[str, str]]]:
        process = nodes[0].start_command(tmp_path, *command, env=environment() | {"PYTHONPATH": str(ROOT)})
        printed, _ = process.communicate(timeout=200)
        told: dict[str, list[tuple[str, str]]] = {}
        for finding in json.loads(printed):
            told.setdefault(finding["name"], []).append((finding["status"], finding["found"]))
        return told

    told = findings()
    assert [status for name in ("node1", "node2") for status, _ in told[name]] == ["ok"] * 4
    assert told["host name"] == [("ok", "node1 is 10.77.0.1")]
    nodes[1].cut()
    ((status, found),) = findings()["node2"]
    assert status == "problem"
    assert found.startswith("10.77.0.2 doesn't answer at port 22: ")
