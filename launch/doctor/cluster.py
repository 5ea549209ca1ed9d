"""MPI, SLURM and the remote shells, as far as this machine has them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping

from engine.errors import RunError, UserError
from launch.doctor.finding import Finding, find_tool, first_line
from launch.launcher import detect_launcher

#: in a process of its own: a broken MPI ends the process that imports it
MPI4PY = (
    "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; "
    "print(MPI.Get_library_version().splitlines()[0])"
)


def check_mpi() -> Iterator[Finding]:
    """mpirun, mpi4py, and whether they are of one MPI."""
    tool = find_tool("mpirun", beside_python=True)
    try:
        library, fault = first_line([sys.executable, "-c", MPI4PY]), ""
    except RuntimeError as error:
        library, fault = "", str(error)
    yield judge_mpi("" if tool is None else first_line([tool, "--version"]), library, fault)


def judge_mpi(mpirun: str, library: str, fault: str) -> Finding:
    """Whether ranks that mpirun starts can find one another.

    Args:
        mpirun: first line of its --version; empty if there is none.
        library: what mpi4py says of its MPI; empty if it can't be imported, for the reason `fault`.
    """
    if not mpirun:
        return Finding("MPI", "note", "no mpirun", "for runs by mpirun: pip install 'zerobert[mpi]', or load a module")
    if not library:
        remedy = "pip install --force-reinstall mpi4py, in the environment that has this mpirun"
        return Finding("MPI", "problem", f"{mpirun}, but mpi4py can't use an MPI: {fault}", remedy)
    if vendor(mpirun) != vendor(library):
        remedy = "let both be of one MPI: every process would be rank 0 of 1; pip install --no-binary mpi4py mpi4py"
        return Finding("MPI", "problem", f"mpirun is {mpirun}, mpi4py uses {library}", remedy)
    return Finding("MPI", "ok", f"{mpirun}; mpi4py uses {library.split(',')[0]}")


def vendor(version: str) -> tuple[str, str]:
    """Which MPI a version line is of, and its major version (Open MPI's alone, whose releases don't mix)."""
    if re.search(r"open ?mpi|open-?rte", version, re.IGNORECASE):
        number = re.search(r"(\d+)\.\d+", version)
        return "Open MPI", number[1] if number else ""
    for name in ("Intel", "HYDRA", "MPICH", "MVAPICH"):
        if name.lower() in version.lower():
            return "MPICH", ""
    return version, ""


def check_slurm() -> Iterator[Finding]:
    """SLURM's commands, and the variables of an allocation if this process is in one."""
    tools = {name: find_tool(name) for name in ("sinfo", "srun")}
    missing = [name for name, path in tools.items() if path is None]
    inside = "SLURM_JOB_ID" in os.environ
    if inside:
        yield from judge_allocation(os.environ)
    if len(missing) == len(tools):
        if inside:
            yield Finding("SLURM", "problem", "in an allocation, but no srun on PATH", "add SLURM's programs to PATH")
        else:
            yield Finding("SLURM", "ok", "not on this machine")
    elif missing:
        yield Finding("SLURM", "problem", f"no {missing[0]} on PATH", "add SLURM's programs to PATH")
    else:
        yield answer_of_sinfo(str(tools["sinfo"]))


def answer_of_sinfo(tool: str) -> Finding:
    """Whether SLURM's controller answers."""
    try:
        return Finding("SLURM", "ok", f"sinfo and srun are there; {first_line([tool, '--version'])}; " + states(tool))
    except RuntimeError as error:
        remedy = "run on a node of the cluster; ask its administrators if this is one"
        return Finding("SLURM", "note", f"its programs are there, but its controller doesn't answer: {error}", remedy)


def states(tool: str) -> str:
    """The number of nodes by state, as sinfo counts them."""
    return "nodes allocated/idle/other/total " + first_line([tool, "--noheader", "-o", "%F"])


def judge_allocation(env: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the variables of an allocation agree with one another and with the launcher's."""
    contradictions = [*contradictory(env)]
    try:
        detect_launcher(env, 0)
    except (UserError, RunError) as error:
        contradictions.append(str(error))
    job = env["SLURM_JOB_ID"]
    if contradictions:
        remedy = "unset what was set by hand or by an outer job, or start a new allocation"
        yield Finding("SLURM job", "problem", f"job {job}: {'; '.join(contradictions)}", remedy)
    else:
        tasks = env.get("SLURM_NTASKS", "unset")
        nodes = env.get("SLURM_JOB_NODELIST", "unknown nodes")
        yield Finding("SLURM job", "ok", f"job {job} on {nodes}, {tasks} task(s)")


def contradictory(env: Mapping[str, str]) -> Iterator[str]:
    """What SLURM's variables say against each other."""
    from launch.doctor.nodes import expand

    count = {name: int(value) for name, value in env.items() if name.startswith("SLURM_") and value.isdigit()}
    nodes, tasks = count.get("SLURM_JOB_NUM_NODES"), count.get("SLURM_NTASKS")
    names = expand(env.get("SLURM_JOB_NODELIST", ""))
    if nodes is not None and names and len(names) != nodes:
        yield f"SLURM_JOB_NODELIST names {len(names)} nodes, SLURM_JOB_NUM_NODES says {nodes}"
    a_node = count.get("SLURM_NTASKS_PER_NODE")
    if None not in (nodes, tasks, a_node) and int(tasks or 0) > int(nodes or 0) * int(a_node or 0):
        yield f"SLURM_NTASKS={tasks} is more than {nodes} nodes of SLURM_NTASKS_PER_NODE={a_node}"
    rank = count.get("SLURM_PROCID")
    step = count.get("SLURM_STEP_NUM_TASKS")
    if rank is not None and step is not None and rank >= step:
        yield f"SLURM_PROCID={rank} is beyond the step's {step} tasks"
    cores, threads = count.get("SLURM_CPUS_PER_TASK"), env.get("OMP_NUM_THREADS", "")
    if cores is not None and threads.isdigit() and int(threads) > cores:
        yield f"OMP_NUM_THREADS={threads} is more than SLURM_CPUS_PER_TASK={cores}"


def check_shells() -> Iterator[Finding]:
    """ssh and pdsh, which DeepSpeed's launcher uses over nodes."""
    paths = {name: find_tool(name) for name in ("ssh", "pdsh")}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        remedy = f"only for `deepspeed --hostfile`: apt install {' '.join(missing).replace('ssh', 'openssh-client', 1)}"
        if missing == ["pdsh"]:
            remedy = "only for `deepspeed --hostfile`: apt install pdsh, or give it --launcher openmpi or slurm"
        yield Finding("remote shells", "note", f"no {' and no '.join(missing)}", remedy)
    else:
        yield Finding("remote shells", "ok", "ssh and pdsh are there")
