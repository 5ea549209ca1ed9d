"""`zerobert cancel`: end a SLURM job, at once or after a checkpoint."""

from __future__ import annotations

from engine.durable import write_atomically
from engine.errors import UserError
from launch.cli import CommandParser
from launch.slurm import client as slurm
from launch.slurm.requeue import CANCEL_MARKER
from launch.slurm.status import of_job

DESCRIPTION = """End a SLURM job: at once, so that what came after the newest checkpoint is lost, or with --save after
another checkpoint. Either way the job isn't requeued.

  zerobert cancel 4711 --save
"""


def save_and_stop(number: str) -> str:
    """Ask a running job to save and then to stop for good.

    The ranks write REQUEUE as they do before a time limit; CANCEL, written before, keeps the job from being requeued.

    Returns:
        The message for the user.

    Raises:
        UserError: the job wasn't submitted by `zerobert submit`.
    """
    job, output, log = of_job(number)
    if job.state != "RUNNING":
        slurm.call("scancel", job.id)
        return f"job {number} cancelled; it was {job.state} and had nothing to save"
    write_atomically(output / CANCEL_MARKER, f"{job.id}\n")
    try:
        slurm.call("scancel", "--signal=USR1", job.id)
    except UserError:
        (output / CANCEL_MARKER).unlink(missing_ok=True)
        raise
    return f"job {number} saves and stops; {log} tells when it has"


def build_parser() -> CommandParser:
    """The parser of the command."""
    parser = CommandParser(prog="zerobert cancel", description=DESCRIPTION)
    parser.add_argument("job", type=str, help="the job's number")
    parser.add_argument("--save", action="store_true", help="save a checkpoint first")
    return parser


def main(arguments: list[str]) -> int:
    """Cancel one job."""
    values = build_parser().parse_args(arguments)
    number = slurm.check_job_id(values.job)
    job = slurm.find_job(number)
    if job.finished:
        raise UserError(f"job: {number} is over ({job.state}); there is nothing to cancel")
    if values.save:
        print(save_and_stop(number))
    else:
        slurm.call("scancel", number)
        print(f"job {number} cancelled")
    return 0
