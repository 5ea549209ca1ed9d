"""Runs before and after the ranks of a SLURM job: where it resumes, and whether it is requeued.

The batch script calls this file, outside of any container. Files in the run's folder:

    REQUEUE        written by rank 0 after USR1, once a checkpoint is durable: the job is to be requeued
    CANCEL         written by `zerobert cancel --save`, holds the job's number: it is to save and not to be requeued
    attempt.json   where this attempt started
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":  # run as a file: import the packages of this copy of the code
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from engine.durable import write_atomically
from engine.errors import HANG_EXIT_CODE
from engine.train.output import newest_step
from engine.train.watch.preempt import MARKER

CANCEL_MARKER = "CANCEL"
ATTEMPT_FILE = "attempt.json"
#: exit code that asks the batch script to requeue (EX_TEMPFAIL of sysexits.h)
REQUEUE_CODE = 75
#: exit code of an attempt that was cancelled before it began
CANCELLED_CODE = 3
#: exit code of srun whose ranks died of USR1 (128 + 10), because it came before they could handle it
SIGNALLED_CODE = 138
#: exit code of the user's mistakes; the same options would fail again
MISTAKE_CODE = 2


@dataclass(frozen=True)
class Attempt:
    """Where an attempt of a job (one start by SLURM) began."""

    job: str
    restarts: int
    """how often SLURM has restarted the job before"""
    step: int | None
    """step of the newest checkpoint at its start; None without one"""
    time: float
    """seconds since 1970"""


@dataclass(frozen=True)
class Ending:
    """How the ranks of an attempt ended."""

    code: int
    """exit code of srun"""
    saved: bool
    """whether REQUEUE exists"""
    cancelled: bool
    """whether CANCEL exists and names this job"""
    restarts: int
    max_restarts: int
    step_before: int | None
    step_after: int | None


@dataclass(frozen=True)
class Decision:
    """Exit code for the batch script, and the reason to print."""

    code: int
    reason: str


def decide(ending: Ending) -> Decision:
    """Decide whether a job is requeued, as a pure function of how its ranks ended."""
    at = "no checkpoint" if ending.step_after is None else f"step {ending.step_after}"
    failure = ending.code if ending.code not in (0, REQUEUE_CODE) else 1
    if ending.cancelled:
        stopped = ending.saved or ending.code == 0
        return Decision(0 if stopped else failure, f"cancelled; newest checkpoint: {at}")
    if ending.saved:
        return limited(ending, f"saved at {at} before its time was over")
    if ending.code == 0:
        return Decision(0, f"done; newest checkpoint: {at}")
    if ending.code == MISTAKE_CODE:
        return Decision(MISTAKE_CODE, "not requeued: a mistake in what the run was given would be met again; see above")
    if ending.code == SIGNALLED_CODE:
        return limited(ending, "the ranks were signalled before they could save")
    if ending.code == HANG_EXIT_CODE:  # fault.max_stalled_restarts bounds the restarts
        return limited(ending, f"the ranks hung; newest checkpoint: {at}")
    if ending.step_after is None or ending.step_after == ending.step_before:
        return Decision(
            failure,
            f"not requeued: failed with exit code {ending.code} and wrote no checkpoint since it started ({at}), "
            "so it would fail again; see above",
        )
    return limited(ending, f"failed with exit code {ending.code} after new checkpoints, the last at {at}")


def limited(ending: Ending, why: str) -> Decision:
    """Requeue unless the job's restarts are used up."""
    if ending.restarts < ending.max_restarts:
        return Decision(REQUEUE_CODE, f"{why}; requeued, restart {ending.restarts + 1} of {ending.max_restarts}")
    code = ending.code if ending.code not in (0, REQUEUE_CODE) else 1
    return Decision(
        code, f"{why}; not requeued: all {ending.max_restarts} restarts are used up; submit it again to go on"
    )


def cancelled_job(output: Path) -> str | None:
    """Number of the job that `zerobert cancel --save` has asked to stop; None without one."""
    try:
        return (output / CANCEL_MARKER).read_text().strip()
    except OSError:
        return None


def start(output: Path, env: Mapping[str, str]) -> int:
    """Record the attempt, remove the files of an earlier one, and print where a restart resumes.

    Returns:
        The exit code for the batch script: 0, or `CANCELLED_CODE`.
    """
    job, restarts = env.get("SLURM_JOB_ID", ""), int(env.get("SLURM_RESTART_COUNT") or 0)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).unlink(missing_ok=True)
    asked = cancelled_job(output)
    (output / CANCEL_MARKER).unlink(missing_ok=True)
    if job and asked == job:
        print(f"job {job}: cancelled before it began", file=sys.stderr)
        return CANCELLED_CODE
    step = newest_step(output)
    write_atomically(output / ATTEMPT_FILE, json.dumps(asdict(Attempt(job, restarts, step, time.time()))))
    if restarts and step is not None:
        print("auto")
    return 0


def read_attempt(output: Path) -> Attempt | None:
    """The attempt that is recorded in a run's folder; None without a readable record."""
    try:
        return Attempt(**json.loads((output / ATTEMPT_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def end(output: Path, code: int, max_restarts: int, env: Mapping[str, str]) -> int:
    """Print the verdict on how the ranks ended, and remove REQUEUE and CANCEL.

    Returns:
        The exit code for the batch script.
    """
    attempt = read_attempt(output)
    job = env.get("SLURM_JOB_ID", "")
    verdict = decide(
        Ending(
            code=code,
            saved=(output / MARKER).exists(),
            cancelled=bool(job) and cancelled_job(output) == job,
            restarts=int(env.get("SLURM_RESTART_COUNT") or 0),
            max_restarts=max_restarts,
            step_before=attempt.step if attempt else None,
            step_after=newest_step(output),
        )
    )
    for name in (MARKER, CANCEL_MARKER):
        (output / name).unlink(missing_ok=True)
    print(f"job {job}: {verdict.reason}", flush=True)
    return verdict.code


def output_folder(given: str, training: list[str]) -> Path:
    """The run's folder: `given`, or else what the options of launch/train.py say."""
    if given:
        return Path(given)
    from launch.configure.options import parse

    return Path(parse(training).output)


def main(arguments: list[str]) -> int:
    """`requeue.py start|end --output FOLDER [--code N --max-restarts N] -- TRAINING OPTIONS`."""
    mark = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="requeue.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("when", choices=["start", "end"])
    parser.add_argument("--output", required=True)
    parser.add_argument("--code", type=int, default=0)
    parser.add_argument("--max-restarts", type=int, default=0)
    values = parser.parse_args(arguments[:mark])
    output = output_folder(values.output, arguments[mark + 1 :])
    if values.when == "start":
        return start(output, os.environ)
    return end(output, values.code, values.max_restarts, os.environ)


if __name__ == "__main__":
    from launch.cli import run_command

    run_command(main)
