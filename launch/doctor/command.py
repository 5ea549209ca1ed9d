"""`zerobert doctor`: what this machine has, what is missing, and the remedy.

Nothing is changed, installed or deleted. The exit code is 1 if there is a problem.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from engine.errors import UserError
from launch.cli import CommandParser
from launch.doctor import accelerators, cluster, kernels, leftovers, machine, network, nodes, packages
from launch.doctor.finding import Check, Finding, run_check
from launch.doctor.nodes import Remote

DESCRIPTION = """Check this machine and, if they are named, the nodes of a run: versions, accelerators, kernels,
launchers, disk, memory, limits, network, clocks. Changes nothing. In a SLURM allocation its nodes are asked through
srun.

  zerobert doctor
  zerobert doctor --output /scratch/runs --nodes node1,node2
  zerobert doctor --hostfile hosts --json
"""
MARKS = {"ok": "ok", "note": "note", "problem": "PROBLEM"}
COLOURS = {"ok": "32", "note": "33", "problem": "1;31"}


def checks(output: Path, several_nodes: bool) -> dict[str, Check]:
    """The checks of this machine in the order of the report."""
    return {
        "packages": packages.check_packages,
        "torch": accelerators.check_torch,
        "back ends": accelerators.check_backends,
        "CPU kernels": kernels.check_cpu_kernels,
        "CUDA kernels": kernels.check_cuda_kernels,
        "DeepSpeed's tools": kernels.check_operator_tools,
        "build locks": leftovers.check_locks,
        "leaked buffers": leftovers.check_buffers,
        "disk": lambda: machine.check_disk(output),
        "shared memory": machine.check_shared_memory,
        "limits": machine.check_limits,
        "threads": machine.check_threads,
        "MPI": cluster.check_mpi,
        "SLURM": cluster.check_slurm,
        "remote shells": cluster.check_shells,
        "host name": lambda: network.check_hostname(several_nodes),
        "gloo": network.check_gloo,
    }


def named_nodes(hostfile: str | None, names: str | None, port: int, env: Mapping[str, str]) -> tuple[list[str], Remote]:
    """The nodes to ask and how: those that the user names by ssh, else those of the SLURM allocation by srun.

    Raises:
        UserError: both a file and a list, or one that is wrong.
    """
    if not 0 < port < 65536:
        raise UserError(f"ssh_port: {port} is not allowed; give 1 to 65535")
    if hostfile is not None and names is not None:
        raise UserError("nodes: give either --nodes or --hostfile, not both")
    if hostfile is not None:
        return nodes.read_hostfile(Path(hostfile)), Remote("ssh", port)
    if names is not None:
        return nodes.parse_nodes(names), Remote("ssh", port)
    return nodes.expand(env.get("SLURM_JOB_NODELIST", "")) if "SLURM_JOB_ID" in env else [], Remote("srun")


def examine(output: Path, hosts: Sequence[str], remote: Remote) -> Iterator[Finding]:
    """Every finding, as soon as it is there."""
    for name, check in checks(output, len(hosts) > 1).items():
        yield from run_check(name, check)
    if hosts:
        yield from run_check("nodes", lambda: nodes.check_nodes(hosts, remote))


def lines(finding: Finding, paint: Callable[[str, str], str]) -> Iterator[str]:
    """A finding for people: mark, name and what was found, and the remedy of what isn't ok under it."""
    yield f"{paint(f'{MARKS[finding.status]:<8}', finding.status)}{finding.name:<18} {finding.found}"
    if finding.remedy and finding.status != "ok":
        yield f"{'':8}{'':18} -> {finding.remedy}"


def painter(stream: TextIO, env: Mapping[str, str]) -> Callable[[str, str], str]:
    """What gives a text its status' colour (ECMA-48): on a terminal, unless NO_COLOR is set; elsewhere nothing does."""
    if stream.isatty() and not env.get("NO_COLOR"):
        return lambda text, status: f"\033[{COLOURS[status]}m{text}\033[0m"
    return lambda text, _: text


def count(findings: Sequence[Finding]) -> str:
    """The last line."""
    numbers = Counter(finding.status for finding in findings)
    return f"{numbers['problem']} problem(s), {numbers['note']} note(s), {numbers['ok']} ok"


def build_parser() -> CommandParser:
    """The parser of the command."""
    parser = CommandParser(prog="zerobert doctor", description=DESCRIPTION)
    parser.add_argument("--output", type=str, default="runs", help="folder that runs will write to")
    parser.add_argument(
        "--hostfile", type=str, default=None, help="DeepSpeed hostfile whose nodes are checked over ssh"
    )
    parser.add_argument("--nodes", type=str, default=None, help="nodes to check over ssh, such as node1,node2")
    parser.add_argument("--ssh_port", type=int, default=22, help="port of sshd on the nodes")
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")
    return parser


def main(arguments: list[str]) -> int:
    """Print what was found; 1 if there is a problem."""
    values = build_parser().parse_args(arguments)
    hosts, remote = named_nodes(values.hostfile, values.nodes, values.ssh_port, os.environ)
    paint = painter(sys.stdout, os.environ)
    findings = []
    for finding in examine(Path(values.output), hosts, remote):
        findings.append(finding)
        if not values.json:
            print(*lines(finding, paint), sep="\n", flush=True)
    if values.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        print(count(findings))
    return int(any(finding.status == "problem" for finding in findings))
