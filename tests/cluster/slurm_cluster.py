"""A real SLURM cluster on this machine, for tests: munged, slurmctld and two slurmd with host names of their own.

It needs root (a node is a UTS and a mount namespace) and Debian's slurm-wlm and munge. Everything that it writes lies
under one temporary folder, and it ends only the daemons that its own pid files name.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NODES = ("node1", "node2")
DAEMONS = ("munged", "slurmctld", "slurmd", "slurmstepd")
#: seconds that a requeued job waits are this + 1
CREDENTIAL_SECONDS = 5
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge/socket,cred_expire={credential}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
TmpFS={root}/tmp.%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
ReturnToService=2
KillWait=2
EnforcePartLimits=ALL
MinJobAge=600
InactiveLimit=0
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
NodeName=node[1-2] NodeHostname=node[1-2] NodeAddr=127.0.0.1 Port=[{node_port}-{last_port}] CPUs=8 RealMemory=4096
PartitionName=low Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=node[1-2] MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can be started here; None where one can."""
    if os.geteuid() != 0:
        return "a SLURM cluster for tests needs root"
    absent = [tool for tool in ("munged", "slurmctld", "slurmd", "sbatch", "unshare") if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not installed: make test-cluster"
    allowed = subprocess.run(["unshare", "-m", "-u", "true"], capture_output=True, check=False).returncode == 0
    return None if allowed else "this machine allows no namespaces, which the nodes of a SLURM cluster for tests are"


def free_ports(count: int) -> int:
    """The first of `count` consecutive TCP ports that nothing listens on."""
    for first in range(26800 + secrets.randbelow(4000), 32000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, listener in enumerate(sockets):
                listener.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
        finally:
            for listener in sockets:
                listener.close()
    raise RuntimeError("no free ports for a SLURM cluster")


def wait_for(done: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll until `done`; an AssertionError names what never came."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Cluster:
    """A running cluster; `environment` lets SLURM's commands find it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {"SLURM_CONF": str(root / "slurm.conf")}
        self._pid_files: list[Path] = []

    def start(self) -> None:
        """Start every daemon and wait until the nodes are idle."""
        for name in (
            "munge",
            "run",
            "log",
            "state",
            *(f"{kind}.{node}" for kind in ("spool", "tmp") for node in NODES),
        ):
            (self.root / name).mkdir(parents=True)
        ports = free_ports(1 + len(NODES))
        self._configure(ports)
        self._start_munge()
        self._daemon("slurmctld", ["slurmctld"])
        for node in NODES:
            self._daemon(
                f"slurmd.{node}", ["unshare", "-m", "-u", "--propagation", "private", "sh", "-c", self._node(node)]
            )
        wait_for(self._ready, 30, f"the nodes (logs in {self.root / 'log'})")

    def stop(self) -> None:
        """End the cluster's jobs, then its daemons, and remove its folder."""
        try:
            if "slurmctld" in [path.stem for path in self._pid_files]:
                self._end_jobs()
        finally:
            for path in reversed(self._pid_files):
                self._end(path)
            shutil.rmtree(self.root)

    def _end_jobs(self) -> None:
        jobs = self.run("squeue", "--noheader", "--format=%A", check=False).split()
        if jobs:
            self.run("scancel", "--full", "--signal=KILL", *jobs, check=False)
            self.run("scancel", *jobs, check=False)
            wait_for(lambda: not self.run("squeue", "--noheader", check=False), 20, "the jobs' end")

    def run(self, *command: str, check: bool = True) -> str:
        """What a SLURM command prints on this cluster."""
        done = subprocess.run(
            command, env=os.environ | self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`; empty where SLURM has forgotten the job."""
        for line in self.run("scontrol", "show", "job", job, check=False).splitlines():
            for word in line.split():
                if word.startswith(f"{name}="):
                    return word.partition("=")[2]
        return ""

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def wait_state(self, job: str, *states: str, seconds: float = 60) -> None:
        """Wait until a job is in one of the states."""
        wait_for(lambda: self.state(job) in states, seconds, f"job {job} to be {' or '.join(states)}")

    def _configure(self, ports: int) -> None:
        text = CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            root=self.root,
            credential=CREDENTIAL_SECONDS,
            controller_port=ports,
            node_port=ports + 1,
            last_port=ports + len(NODES),
        )
        (self.root / "slurm.conf").write_text(text)
        names = "".join(f"127.0.0.1 {node}\n" for node in NODES)
        (self.root / "hosts").write_text(Path("/etc/hosts").read_text() + names)

    def _start_munge(self) -> None:
        folder = self.root / "munge"
        key = folder / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        options = [f"--key-file={key}", f"--socket={folder / 'socket'}", f"--seed-file={folder / 'seed'}"]
        options += [f"--pid-file={self.root / 'run' / 'munged.pid'}", f"--log-file={self.root / 'log' / 'munged.log'}"]
        self._daemon("munged", ["munged", "--force", *options])

    def _node(self, node: str) -> str:
        """The shell line of a node: its own host name and name lookup, then its daemon."""
        return f"hostname {node} && mount --bind {self.root}/hosts /etc/hosts && exec slurmd -N {node}"

    def _daemon(self, name: str, command: list[str]) -> None:
        path = self.root / "run" / f"{name}.pid"
        self._pid_files.append(path)
        environment = os.environ | self.environment
        with (self.root / "log" / f"{name}.start").open("w") as log:
            done = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=30, check=False)
        assert done.returncode == 0, f"{name} did not start: {Path(log.name).read_text()}"
        wait_for(lambda: path.is_file() and bool(path.read_text().strip()), 10, f"{name}'s pid")

    def _ready(self) -> bool:
        idle = self.run("sinfo", "--noheader", "--Node", "--partition=low", "--states=idle", "--format=%N", check=False)
        return len(idle.split()) == len(NODES)

    def _end(self, path: Path) -> None:
        """End the daemon that a pid file names, if it is one of SLURM's."""
        if not path.is_file():
            return
        pid = int(path.read_text())
        if not alive(pid) or Path(f"/proc/{pid}/comm").read_text().strip() not in DAEMONS:
            return
        os.kill(pid, signal.SIGTERM)
        try:
            wait_for(lambda: not alive(pid), 10, path.stem)
        except AssertionError:
            os.kill(pid, signal.SIGKILL)
