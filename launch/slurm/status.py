"""`zerobert status`: the state of a SLURM job, or of the run in a folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.errors import RunError, UserError
from engine.train.output import newest_step
from launch.cli import CommandParser
from launch.slurm import client as slurm
from launch.slurm.client import Job
from launch.slurm.requeue import Attempt, read_attempt
from launch.slurm.sbatch import log_path
from launch.slurm.submit import RECORD, read_record, submissions

DESCRIPTION = """Where a SLURM job or a run's folder stands: step, loss, tokens/s, time left, newest checkpoint.

  zerobert status 4711
  zerobert status runs/pretrain_base/phase1 --json
"""
HEARTBEAT_FILE = "heartbeat.json"
#: the types of a heartbeat's fields
HEARTBEAT: Mapping[str, tuple[type, ...]] = {
    "time": (int, float),
    "step": (int,),
    "total": (int,),
    "loss": (int, float, type(None)),
    "tokens_per_second": (int, float, type(None)),
    "restarts": (int,),
    "state": (str,),
    "host": (str,),
    "ranks": (int,),
}
#: seconds without a heartbeat after which a run counts as stuck, by its state: heartbeats come every few seconds, but
#: not within a step or a save
STALE_SECONDS = {"training": 60.0, "evaluating": 60.0, "saving": 600.0}
#: a run with long steps counts as stuck only after the time of so many steps
STALE_STEPS = 5


@dataclass(frozen=True)
class Status:
    """What is known of a run; None for what is not known."""

    output: str
    job: str | None
    job_state: str | None
    """in SLURM's words"""
    reason: str | None
    """why the job is pending"""
    nodes: str | None
    elapsed: str | None
    limit: str | None
    state: str | None
    """of the run, from its heartbeat"""
    step: int | None
    total: int | None
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    """until the last step, at the mean speed since this attempt started"""
    restarts: int
    checkpoint: int | None
    """step of the newest checkpoint"""
    heartbeat_age: float | None
    """seconds since the last heartbeat"""
    stale: bool
    log: str | None


def read_heartbeat(output: Path) -> dict[str, Any] | None:
    """The newest heartbeat of a run; None without one.

    Raises:
        UserError: the file is not a valid heartbeat.
    """
    path = output / HEARTBEAT_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"status: {path} can't be read ({error}); remove it") from error
    for name, types in HEARTBEAT.items():
        if not isinstance(values, dict) or type(values.get(name)) not in types:
            raise UserError(f"status: {path} is no heartbeat of a run ({name} is missing or wrong); remove it")
    return dict(values)


def seconds_left(heartbeat: Mapping[str, Any], attempt: Attempt | None) -> float | None:
    """Seconds to the last step at the mean speed since the attempt started; None before its first step."""
    left, pace = heartbeat["total"] - heartbeat["step"], seconds_per_step(heartbeat, attempt)
    return pace * left if pace is not None and left >= 0 and heartbeat["state"] in STALE_SECONDS else None


def seconds_per_step(heartbeat: Mapping[str, Any], attempt: Attempt | None) -> float | None:
    """The mean time of a step since the attempt started, its start included; None before its first step."""
    if attempt is None:
        return None
    done, passed = heartbeat["step"] - (attempt.step or 0), heartbeat["time"] - attempt.time
    return passed / done if done > 0 and passed > 0 else None


def is_stale(heartbeat: Mapping[str, Any], attempt: Attempt | None, age: float) -> bool:
    """Whether the heartbeat of a run that should make progress is too old; `age` in seconds."""
    limit = STALE_SECONDS.get(heartbeat["state"])
    return limit is not None and age > max(limit, STALE_STEPS * (seconds_per_step(heartbeat, attempt) or 0.0))


def status_of(
    output: Path, job: Job | None, log: str | None, beat: Mapping[str, Any] | None, attempt: Attempt | None, now: float
) -> Status:
    """Combine what SLURM and the run's own files tell; the heartbeat may be that of an older job."""
    age = None if beat is None else max(0.0, now - beat["time"])
    running = job is None or job.state == "RUNNING"
    told: Mapping[str, Any] = beat or {}
    return Status(
        output=str(output),
        job=job.id if job else None,
        job_state=job.state if job else None,
        reason=job.reason if job and job.state == "PENDING" else None,
        nodes=job.nodes or None if job else None,
        elapsed=job.elapsed or None if job else None,
        limit=job.limit or None if job else None,
        state=told.get("state"),
        step=told.get("step"),
        total=told.get("total"),
        loss=finite(told.get("loss")),
        tokens_per_second=finite(told.get("tokens_per_second")),
        seconds_left=seconds_left(beat, attempt) if beat else None,
        restarts=max(job.restarts if job else 0, told.get("restarts", 0)),
        checkpoint=newest_step(output),
        heartbeat_age=age,
        stale=running and beat is not None and age is not None and is_stale(beat, attempt, age),
        log=log,
    )


def finite(value: float | None) -> float | None:
    """A number that JSON can hold; NaN and infinities become None."""
    return value if value is not None and math.isfinite(value) else None


def clock(seconds: float) -> str:
    """Seconds as 5 s, m:ss, h:mm:ss or days."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if whole < 60:
        return f"{whole} s"
    text = f"{hours}:{minutes:02d}:{whole % 60:02d}" if whole >= 3600 else f"{minutes}:{whole % 60:02d}"
    return f"{days} d {text}" if days else text


def text_of(status: Status) -> str:
    """A status as text, one line per subject."""
    lines = [f"output     {status.output}"]
    if status.job:
        where = f" on {status.nodes}" if status.nodes else ""
        spent = f", {status.elapsed} of {status.limit}" if status.elapsed and status.limit else ""
        why = f", waits for {status.reason}" if status.reason else ""
        lines.append(f"job        {status.job} {status.job_state}{where}{spent}{why}, restarts {status.restarts}")
    else:
        lines.append(f"job        none known, restarts {status.restarts}")
    if status.state is None:
        lines.append("run        no heartbeat yet")
    else:
        lines.append("run        " + ", ".join(progress(status)))
        age = clock(status.heartbeat_age or 0)
        stuck = ": STALE, the run hangs or has died; see the log" if status.stale else ""
        lines.append(f"heartbeat  {age} ago{stuck}")
    if status.checkpoint is not None:
        lines.append(f"checkpoint step {status.checkpoint}")
    if status.log:
        lines.append(f"log        {status.log}")
    return "\n".join(lines)


def progress(status: Status) -> list[str]:
    """The parts of the line on the run's progress."""
    share = f" ({100 * (status.step or 0) / status.total:.0f}%)" if status.total else ""
    parts = [str(status.state), f"step {status.step}/{status.total}{share}"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.tokens_per_second is not None:
        parts.append(f"{status.tokens_per_second:,.0f} tokens/s")
    if status.seconds_left is not None:
        parts.append(f"{clock(status.seconds_left)} left")
    return parts


def of_job(number: str) -> tuple[Job, Path, str]:
    """A job of `zerobert submit`, the folder of its run, and the path of its log.

    Raises:
        UserError: not a job's number, a job that SLURM doesn't know, or one that was submitted by hand.
    """
    job = slurm.find_job(slurm.check_job_id(number))
    record = read_record(Path(job.script).with_name(RECORD)) if job.script else None
    if record is None or record["job"] not in (job.id, job.array, number.partition("_")[0]):
        raise UserError(f"job: {number} was not submitted by zerobert submit; give the run's output folder instead")
    return job, Path(str(record["output"])), log_of(record)


def log_of(record: Mapping[str, object]) -> str:
    """The path of a submission's log; each task of an array has its own, so there * stands for the task's number."""
    return log_path(str(record["log"]), str(record["name"]), str(record["job"]), "*")


def of_folder(output: Path) -> tuple[Job | None, str | None]:
    """The newest job of a run's folder and the path of its log; the job is None where SLURM doesn't know it."""
    records = submissions(output)
    if not records:
        return None, None
    try:
        job = slurm.find_job(str(records[-1]["job"]))
    except (UserError, RunError):
        job = None
    return job, log_of(records[-1])


def build_parser() -> CommandParser:
    """The parser of the command."""
    parser = CommandParser(prog="zerobert status", description=DESCRIPTION)
    parser.add_argument("run", type=str, help="a job's number, or the output folder of a run")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: list[str]) -> int:
    """Print where a run stands."""
    values = build_parser().parse_args(arguments)
    output, job, log = Path(values.run), None, None
    if output.is_dir():
        job, log = of_folder(output)
    elif any(mark in values.run for mark in "/.") or not values.run[:1].isdecimal():
        raise UserError(f"run: {values.run!r} is neither a job's number nor a folder; give one of the two")
    else:
        job, output, log = of_job(values.run)
    status = status_of(output, job, log, read_heartbeat(output), read_attempt(output), time.time())
    print(json.dumps(asdict(status), ensure_ascii=False) if values.json else text_of(status))
    return 0
