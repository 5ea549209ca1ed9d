"""SLURM's commands, called without a shell, and the state of a job that they print."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from engine.errors import RunError, UserError

#: part of an error message of SLURM's -> the remedy
REMEDIES = (
    ("invalid partition", "partition: choose one that `sinfo` lists"),
    ("invalid account", "account, partition: `sacctmgr show associations user=$USER` lists yours"),
    ("invalid qos", "qos: `sacctmgr show qos` lists them"),
    ("node configuration is not available", "ask for fewer or other nodes, GPUs, CPUs or memory; see `sinfo -N -l`"),
    ("node count specification invalid", "nodes: ask for fewer; `sinfo` lists them"),
    ("job array", "runs: the cluster takes fewer in an array (`scontrol show config`, MaxArraySize); give --only"),
    ("time limit", "time: it is above the partition's limit, which `sinfo -o '%P %l'` lists"),
    ("feature specification", "constraint: `sinfo -o '%N %f'` lists the features"),
    ("generic resource", "gpus-per-node, gres: `sinfo -o '%N %G'` lists what the nodes have"),
    ("gres", "gpus-per-node, gres: `sinfo -o '%N %G'` lists what the nodes have"),
    ("invalid node name", "exclude: `sinfo -N` lists the nodes"),
    ("dependency", "dependency: give such as afterok:12 with a job that SLURM still knows"),
    ("memory specification", "mem: `sinfo -o '%N %m'` lists what the nodes have, in MB"),
    ("reservation", "reservation: `scontrol show reservations` lists them"),
    ("permission denied", "the job is somebody else's"),
)
UNREACHABLE = ("unable to contact", "connect failure", "connection refused", "could not establish", "authentication")
#: fields of `scontrol show job` that take a whole line, spaces included
WHOLE_LINES = ("Command", "WorkDir", "StdOut", "StdErr", "Comment")
FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY")
JOB_ID = re.compile(r"\d{1,10}(_\d{1,7})?")


@dataclass(frozen=True)
class Job:
    """A job as SLURM describes it."""

    id: str
    """SLURM's job number; each task of an array has one of its own"""
    state: str
    """PENDING, RUNNING, ... in SLURM's words"""
    reason: str = ""
    """why it is pending, in SLURM's words"""
    nodes: str = ""
    elapsed: str = ""
    limit: str = ""
    restarts: int = 0
    script: str = ""
    """path of the batch script"""
    array: str = ""
    """number of the job array that it belongs to, empty without one"""

    @property
    def finished(self) -> bool:
        """Whether the job has ended and won't be requeued."""
        return self.state in FINISHED


def call(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a SLURM command and return what it prints.

    Raises:
        UserError: SLURM isn't on this machine, or refuses.
        RunError: its controller can't be reached.
    """
    if shutil.which(command[0], path=environment.get("PATH") if environment else None) is None:
        raise UserError(f"{command[0]}: SLURM is not on this machine; run this on a node of the cluster")
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        raise refusal(command[0], done.stderr or done.stdout)
    return done.stdout


def refusal(command: str, printed: str) -> UserError | RunError:
    """The error for what a failed SLURM command printed: one line, with a remedy where one is known."""
    lines = [re.sub(rf"^(?:{command}|slurm\w*): (?:(?:error|fatal): )?", "", line) for line in printed.splitlines()]
    message = "; ".join(line.strip().rstrip(".") for line in lines if line.strip()) or "no reason given"
    if any(part in message.lower() for part in UNREACHABLE):
        return RunError(f"{command}: {message}; is SLURM up, and is this one of its machines?")
    remedy = next((remedy for part, remedy in REMEDIES if part in message.lower()), "correct the options")
    return UserError(f"{command} refused: {message}; {remedy}")


def check_job_id(text: str) -> str:
    """Check that a text is a job's number, or an array task's such as 12_3, and return it.

    Raises:
        UserError: it is something else.
    """
    if not JOB_ID.fullmatch(text) or not text.isascii():
        raise UserError(f"job: {text!r} is not a job number; give such as 12, or 12_3 of an array")
    return text


def parse_jobs(printed: str) -> list[Job]:
    """The jobs that `scontrol show job` printed; several for an array."""
    return [job_of(fields_of(record)) for record in printed.split("\n\n") if "JobId=" in record]


def fields_of(record: str) -> dict[str, str]:
    """The fields of one record of `scontrol show`."""
    fields: dict[str, str] = {}
    for line in record.splitlines():
        name, _, value = line.strip().partition("=")
        if name in WHOLE_LINES:
            fields[name] = value
        else:
            parts = (word.partition("=") for word in line.split())
            fields.update({part[0]: part[2] for part in parts if part[1]})
    return fields


def job_of(fields: Mapping[str, str]) -> Job:
    """A job from the fields of its record."""
    told = {name: "" if value in ("(null)", "None", "N/A") else value for name, value in fields.items()}
    return Job(
        id=told["JobId"],
        state=told.get("JobState", "UNKNOWN"),
        reason=told.get("Reason", ""),
        nodes=told.get("NodeList", ""),
        elapsed=told.get("RunTime", ""),
        limit=told.get("TimeLimit", ""),
        restarts=int(told.get("Restarts") or 0),
        script=told.get("Command", ""),
        array=told.get("ArrayJobId", ""),
    )


def find_job(job: str) -> Job:
    """Look a job up: in SLURM's controller, else in its accounting.

    Raises:
        UserError: neither knows the job.
    """
    try:
        jobs = parse_jobs(call("scontrol", "show", "job", job))
    except UserError as error:
        if "SLURM is not on this machine" in str(error):
            raise
        jobs = accounted(job)
    if not jobs:
        raise UserError(f"job: {job} is unknown to SLURM, or too long ago; give the run's output folder instead")
    return min(jobs, key=lambda candidate: (candidate.finished, candidate.state != "RUNNING"))


def accounted(job: str) -> list[Job]:
    """The job in SLURM's accounting; empty if it isn't there, or without accounting (slurmdbd)."""
    columns = "JobIDRaw,State,Elapsed,Timelimit,NodeList,SubmitLine"
    try:
        printed = call("sacct", "-X", "-n", "-P", "-j", job, "-o", columns)
    except (UserError, RunError):
        return []
    rows = [line.split("|", 5) for line in printed.splitlines() if line.count("|") >= 5]
    return [
        Job(
            row[0], row[1].split(" ")[0], elapsed=row[2], limit=row[3], nodes=row[4],
            script=row[5].partition("--parsable ")[2],
        )
        for row in rows
    ]  # fmt: skip
