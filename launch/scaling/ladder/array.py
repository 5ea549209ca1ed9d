"""A ladder as SLURM jobs: an array of the largest budgets, and behind it one of the runs that begin with those.

An element is the job of `zerobert submit`, which saves at USR1, requeues itself and resumes. The second array waits for
the end of the first one's elements, whatever their ends: a run whose checkpoint isn't there says so in its log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.errors import UserError
from launch.scaling.ladder.cells import Cell, Ladder, write_record
from launch.slurm import snapshot
from launch.slurm.sbatch import render
from launch.slurm.submit import check_container, check_idle, check_run, submit, template
from launch.suite.array import array_of, job_of


def submit_ladder(ladder: Ladder, cells: Sequence[Cell], options: Sequence[str], at_once: int | None) -> int:
    """Submit the runs that are missing.

    Args:
        options: of `zerobert submit` without those of a training.
        at_once: elements that run at the same time; None: as many as the cluster has room for.

    Raises:
        UserError: a wrong option, nothing to run, or SLURM refuses.
    """
    job, dry_run = job_of(options)
    missing = [cell for cell in cells if not cell.member.is_finished]
    if not missing:
        raise UserError(
            f"scaling: all of these runs are finished; zerobert scaling collect {ladder.output} measures them"
        )
    for cell in missing:
        check_run(job, cell.config)
    parts = [[cell.member for cell in missing if cell.is_trunk == trunks] for trunks in (True, False)]
    given = job.dependency
    if not dry_run:
        check_container(job)
        check_idle(job, ladder.output)
        write_record(ladder)
    for members in filter(None, parts):
        own, submission = array_of(job, ladder.output, members, at_once)
        if dry_run:
            print(render(template(), own, submission), end="\n")
            continue
        submission = replace(submission, folder=snapshot.submission_folder(ladder.output))
        number = submit(own, None, submission, render(template(), own, submission))
        print(f"job {number}: {len(members)} run(s) into {ladder.output}, {job.ranks} rank(s) each", flush=True)
        job = replace(job, dependency=",".join(filter(None, (given, f"afterany:{number}"))))
    return 0
