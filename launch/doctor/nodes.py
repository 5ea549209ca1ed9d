"""The nodes of a run: whether each is found and answers, has the same time, and the same software."""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from engine.errors import UserError
from launch.doctor.finding import Finding, find_tool, output_of
from launch.doctor.network import addresses_of
from launch.doctor.packages import installed

#: seconds by which clocks may differ: curves, logs and the age of files are compared over nodes
TOLERANCE = 1.0
TRIES = 3
PACKAGES = ("torch", "deepspeed", "transformers", "zerobert")
#: prints the versions as JSON; it goes through standard input, past every shell
SOFTWARE = f"""
import importlib.metadata as metadata, json, platform
found = {{"python": platform.python_version()}}
for name in {PACKAGES!r}:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""


def read_hostfile(path: Path) -> list[str]:
    """The nodes of a DeepSpeed hostfile: lines such as `node1 slots=8`, comments after #.

    Raises:
        UserError: no such file, a line of another form, a node twice, or none.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"hostfile: {path} can't be read ({getattr(error, 'strerror', None) or error})") from error
    nodes: list[str] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([A-Za-z0-9][\w.:-]*)\s+slots=([1-9]\d*)", text)
        if match is None:
            raise UserError(
                f"hostfile: line {number} of {path}, {text!r}, is not of the form `node1 slots=8`; correct it"
            )
        if match[1] in nodes:
            raise UserError(f"hostfile: {path} names {match[1]} twice; give each node one line with all its slots")
        nodes.append(match[1])
    if not nodes:
        raise UserError(f"hostfile: {path} names no node; give lines such as `node1 slots=8`")
    return nodes


def parse_nodes(text: str) -> list[str]:
    """The nodes of a list such as a,b or gpu[01-04].

    Raises:
        UserError: something in it is no host's name, or it is empty.
    """
    nodes = expand(text)
    wrong = [node for node in nodes if not re.fullmatch(r"[A-Za-z0-9]([\w.:-]*\w)?", node)]
    if wrong or not nodes:
        raise UserError(f"nodes: {text!r} is no list of host names; give such as node1,node2")
    return list(dict.fromkeys(nodes))


def expand(nodelist: str) -> list[str]:
    """The hosts of a SLURM node list: "gpu[03-05,9],login1" -> gpu03, gpu04, gpu05, gpu9, login1."""
    hosts: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodelist):
        names = [""]
        for text, ranges in re.findall(r"([^\[]*)(?:\[([^\]]*)\])?", part):
            ends = list(chain.from_iterable(map(numbers, ranges.split(",")))) if ranges else [""]
            names = [name + text + end for name in names for end in ends]
        hosts += names
    return hosts


def numbers(span: str) -> list[str]:
    """The numbers of "03-05" or "9", with their zeros."""
    first, _, last = span.partition("-")
    if not (last and first.isdigit() and last.isdigit()):
        return [span]
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


@dataclass(frozen=True)
class Remote:
    """How a command reaches a node."""

    name: str
    """ssh or srun"""
    port: int = 22

    def command(self, node: str, *words: str) -> list[str]:
        """The whole command; `words` must hold nothing that a shell would change."""
        if self.name == "srun":
            return ["srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={node}", *words]
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=5"]
        return ["ssh", *options, *(["-p", str(self.port)] if self.port != 22 else []), node, *words]

    def output(self, node: str, *words: str, given: str = "") -> str:
        """What a command prints on a node; see `output_of`."""
        return output_of(self.command(node, *words), given, timeout=30.0)


def check_nodes(nodes: Sequence[str], remote: Remote) -> Iterator[Finding]:
    """Every node, at most 16 at a time."""
    if find_tool(remote.name) is None:
        remedy = "apt install openssh-client" if remote.name == "ssh" else "add SLURM's programs to PATH"
        yield Finding("nodes", "problem", f"no {remote.name} on PATH, so no node can be asked", remedy)
        return
    mine = {"python": sys.version.split()[0], **{name: installed(name) for name in PACKAGES}}
    with ThreadPoolExecutor(16) as pool:
        yield from chain.from_iterable(pool.map(lambda node: list(check_node(node, remote, mine)), nodes))


def check_node(node: str, remote: Remote, mine: Mapping[str, str | None]) -> Iterator[Finding]:
    """One node: name, port, clock, software; what can't be known after a problem is left out.

    Args:
        mine: versions of Python and packages here.
    """
    addresses = addresses_of(node)
    if not addresses:
        remedy = "correct its name, or add it to /etc/hosts or the DNS of every node"
        yield Finding(node, "problem", "its name doesn't resolve", remedy)
        if remote.name == "ssh":
            return
    if remote.name == "ssh":
        fault = unreachable(addresses[0], remote.port)
        if fault:
            remedy = f"start sshd there, or open the firewall for port {remote.port}; --ssh_port names another"
            yield Finding(node, "problem", f"{addresses[0]} doesn't answer at port {remote.port}: {fault}", remedy)
            return
    try:
        yield judge_clock(node, *clock_difference(lambda: remote.output(node, "date", "+%s.%N"), time.time))
    except (RuntimeError, ValueError) as error:
        remedy = f"let `{' '.join(remote.command(node, 'date', '+%s.%N'))}` print the time without a password"
        yield Finding(node, "problem", f"{remote.name} failed: {error}", remedy)
        return
    yield check_software(node, remote, mine)


def unreachable(address: str, port: int, timeout: float = 5.0) -> str | None:
    """Why no connection to a port can be made; None if one can."""
    try:
        socket.create_connection((address, port), timeout=timeout).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def clock_difference(ask: Callable[[], str], clock: Callable[[], float]) -> tuple[float, float]:
    """How far another clock is ahead, and by how much that may be wrong, in seconds.

    The answer is taken to be as old as half of the round trip; the quickest of several tries is believed.

    Args:
        ask: returns the other clock's seconds.
        clock: this clock.
    """
    best = (0.0, float("inf"))
    for _ in range(TRIES):
        start = clock()
        there = float(ask().splitlines()[-1])
        half = (clock() - start) / 2
        if half < best[1]:
            best = (there - (start + half), half)
    return best


def judge_clock(node: str, ahead: float, uncertainty: float) -> Finding:
    """Whether a node's clock is near enough."""
    found = f"its clock is {abs(ahead):.2f} s {'ahead' if ahead > 0 else 'behind'} (give or take {uncertainty:.2f} s)"
    if abs(ahead) - uncertainty > TOLERANCE:
        remedy = "start a time service on every node (chronyd, ntpd or systemd-timesyncd)"
        return Finding(node, "problem", found, remedy)
    return Finding(node, "ok", found)


def check_software(node: str, remote: Remote, mine: Mapping[str, str | None]) -> Finding:
    """The versions on a node, under the path of this Python, by which DeepSpeed starts the ranks."""
    try:
        theirs = json.loads(remote.output(node, sys.executable, "-", given=SOFTWARE).splitlines()[-1])
    except (RuntimeError, ValueError, IndexError) as error:
        remedy = f"install the same environment there, at {sys.prefix}, or share it"
        return Finding(node, "problem", f"{sys.executable} doesn't run there: {error}", remedy)
    return judge_software(node, mine, theirs)


def judge_software(node: str, mine: Mapping[str, str | None], theirs: Mapping[str, str | None]) -> Finding:
    """Whether two nodes have equal versions."""
    apart = [
        f"{name} {theirs.get(name)} instead of {version}"
        for name, version in mine.items()
        if theirs.get(name) != version
    ]
    if apart:
        return Finding(node, "problem", ", ".join(apart), "install the same versions on every node")
    return Finding(node, "ok", ", ".join(f"{name} {version}" for name, version in theirs.items() if version))
