"""Two nodes on this machine that reach each other by SSH only, for tests of runs over nodes without a scheduler.

A node is a set of namespaces with an sshd: its own network, host name, process numbers, /etc/hosts, /run and /dev/shm;
file systems are shared, as on a cluster. What runs on a node sees and signals the processes of that node alone, also
`pkill`. Both hang on a bridge that is in a namespace of its own too, so nothing shows in the machine's network. The
kernel ends everything on a node when its first process goes, and that goes with the tests, however they end.

It needs root and Debian's pdsh, openssh-server and iproute2.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import psutil

from tests.cluster.slurm_cluster import wait_for

NAMES = ("node1", "node2")
TOOLS = ("pdsh", "ssh", "ssh-keygen", "sshd", "ip", "unshare", "nsenter", "setpriv", "pkill")
UNSHARE = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
INTERFACE = "eth0"
SSH = """
Host *
  User root
  IdentityFile {root}/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
SSHD = """
HostKey {root}/host_key
AuthorizedKeysFile {root}/key.pub
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
PidFile none
"""
#: a node's own files, over those of the machine: $1 is the folder of the network, $2 the node's name
SET_UP = """
set -e
hostname "$2"
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/ssh" /etc/ssh
mount -t tmpfs none /run
mount -t tmpfs none /dev/shm
[ ! -d ~/.ssh ] || mount -t tmpfs none ~/.ssh
mkdir /run/sshd
ip link set lo up
exec "$(command -v sshd)" -D -e -f /etc/ssh/sshd_config
"""


def missing() -> str | None:
    """Why no nodes can be made here; None where they can."""
    if os.geteuid() != 0:
        return "nodes for tests need root"
    absent = [tool for tool in TOOLS if shutil.which(tool, path=search_path()) is None]
    if absent:
        return f"{', '.join(absent)} not installed: make test-cluster"
    trial = [*UNSHARE, "ip", "link", "add", "veth1", "type", "veth", "peer", "name", "veth2"]
    allowed = subprocess.run(trial, capture_output=True, check=False, env=environment()).returncode == 0
    return None if allowed else "this machine allows no namespaces with networks, which nodes for tests are"


def search_path() -> str:
    """PATH with the folders of system tools."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def environment() -> dict[str, str]:
    return os.environ | {"PATH": search_path()}


def namespace(pid: int | str) -> str:
    """The process namespace that a process is in; empty if it has gone."""
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""


class Node:
    """One node: starts commands on it, knows its processes, takes it off the network."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self._holder: subprocess.Popen[bytes] | None = None
        self.first = 0
        """number of its first process, on this machine"""

    def start(self, root: Path) -> None:
        """Make the namespaces and start sshd in them; they end with this process."""
        with (root / f"{self.name}.log").open("w") as log:
            self._holder = hold([*UNSHARE, "sh", "-c", SET_UP, "sh", str(root), self.name], log.fileno())
        holder = psutil.Process(self._holder.pid)
        wait_for(lambda: bool(holder.children()), 10, f"the first process of {self.name}")
        self.first = holder.children()[0].pid
        assert namespace(self.first) != namespace("self"), "a node must have processes of its own"
        wait_for(lambda: "listening" in Path(log.name).read_text(), 10, f"sshd of {self.name} (log: {log.name})")

    def stop(self) -> None:
        """End whatever runs on this node."""
        if self._holder is not None:
            self._holder.kill()
            self._holder.wait()
            wait_for(lambda: not namespace(self.first), 10, f"the end of {self.name}")

    def command(self, folder: Path, *words: str) -> list[str]:
        """The command line that runs words in a folder on this node; its exit code is theirs."""
        enter = ["nsenter", f"--target={self.first}", "--mount", "--uts", "--net", "--pid"]
        return [*enter, "sh", "-c", 'cd "$0" && exec "$@"', str(folder), *words]

    def start_command(self, folder: Path, *words: str, env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
        """Start words on this node; what they print is one text."""
        return subprocess.Popen(
            self.command(folder, *words),
            env=env or environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

    def run(self, *words: str) -> str:
        """What a quick command prints on this node."""
        process = self.start_command(Path("/"), *words)
        printed, _ = process.communicate(timeout=30)
        assert process.returncode == 0, printed
        return printed

    def processes(self, containing: str = "") -> list[psutil.Process]:
        """The processes of this node except its first, by a part of their command line."""
        mine, found = namespace(self.first), []
        for process in psutil.process_iter():
            try:
                command = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if process.pid != self.first and containing in command and namespace(process.pid) == mine:
                found.append(process)
        return found

    def signal(self, containing: str, number: int) -> None:
        """Send a signal to the processes of this node whose command lines hold a text; there must be some."""
        found = self.processes(containing)
        assert found, f"no {containing} on {self.name}"
        for process in found:
            process.send_signal(number)

    def clear(self) -> None:
        """End what was started on this node, and put it back on the network."""
        self.connect()
        for process in self.processes():
            process.send_signal(signal.SIGKILL)
        wait_for(lambda: not self.processes(), 10, f"{self.name} to be clear")

    def cut(self) -> None:
        """Take this node off the network."""
        self.run("ip", "link", "set", INTERFACE, "down")

    def connect(self) -> None:
        """Put it back."""
        self.run("ip", "link", "set", INTERFACE, "up")


class Network:
    """Two nodes on a bridge."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="nodes-", dir="/tmp"))
        self.nodes = [Node(name, f"10.77.0.{number}") for number, name in enumerate(NAMES, 1)]
        self._switch: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Write keys and configurations, then start the nodes and join them."""
        self.root.chmod(0o755)
        (self.root / "ssh").mkdir()
        (self.root / "ssh" / "ssh_config").write_text(SSH.format(root=self.root))
        (self.root / "ssh" / "sshd_config").write_text(SSHD.format(root=self.root))
        names = "".join(f"{node.address} {node.name}\n" for node in self.nodes)
        (self.root / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        for key in ("key", "host_key"):
            call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.root / key))
        for node in self.nodes:
            node.start(self.root)
        self._join()

    def stop(self) -> None:
        """End the nodes and all that runs on them, and remove the folder; networks go with their last process."""
        for node in self.nodes:
            node.stop()
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()
        shutil.rmtree(self.root)

    def _join(self) -> None:
        self._switch = hold(["unshare", "--net", "sleep", "infinity"])
        mine, path = Path("/proc/self/ns/net").readlink(), Path(f"/proc/{self._switch.pid}/ns/net")
        wait_for(lambda: path.readlink() != mine, 10, "the bridge's namespace")
        inside = ["nsenter", f"--target={self._switch.pid}", "--net", "ip", "link"]
        call(*inside, "add", "bridge0", "type", "bridge")
        call(*inside, "set", "bridge0", "up")
        for number, node in enumerate(self.nodes, 1):
            port = f"port{number}"
            peer = ["peer", "name", INTERFACE, "netns", str(node.first)]
            call(*inside, "add", port, "type", "veth", *peer)
            call(*inside, "set", port, "master", "bridge0", "up")
            node.run("ip", "address", "add", f"{node.address}/24", "dev", INTERFACE)
            node.connect()


def hold(command: list[str], log: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    """Start a command that the kernel kills when this process ends."""
    options = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
    return subprocess.Popen(["setpriv", "--pdeathsig=KILL", *command], env=environment(), **options)


def call(*command: str) -> None:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
