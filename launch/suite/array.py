"""A suite as SLURM jobs: an array with an element a run, and a job behind it that makes the report.

An element is the job of `zerobert submit`: slurm/train.sbatch, which saves at USR1, requeues itself and resumes.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.errors import UserError
from engine.hub import fetch, hub_model
from launch.configure.options import parse
from launch.seeds.plan import Member
from launch.slurm import client, snapshot
from launch.slurm.sbatch import Element, JobConfig, Submission, check_path, directives, render
from launch.slurm.submit import check_container, check_idle, check_run, hand_in, parse_job, split, submit, template
from launch.suite.plan import Cell, Suite, prepare

REPORT_SCRIPT = "report.sbatch"


def submit_suite(command: str, suite: Suite, cells: Sequence[Cell], options: Sequence[str], at_once: int | None) -> int:
    """Submit the runs that are missing, and their report.

    Args:
        command: that makes the report, such as "suite".
        options: of `zerobert submit` without those of a training.
        at_once: elements that run at the same time; None: as many as the cluster has room for.

    Raises:
        UserError: a wrong option, nothing to run, or SLURM refuses; nothing is left behind then.
    """
    job, dry_run = job_of(options)
    members = [member for cell in cells for member in cell.members if not member.is_finished]
    if not members:
        raise UserError(f"{command}: all of its runs are finished; zerobert {command} {suite.output} makes the report")
    for cell in cells:
        check_run(job, parse(cell.members[0].options))
    job, submission = array_of(job, suite.output, members, at_once)
    if dry_run:
        print(render(template(), job, submission), end="")
        print(f"\n# then, behind the array:\n{report_script(command, job, submission, 'ARRAY')}", end="")
        return 0
    check_container(job)
    check_idle(job, suite.output)
    for model in {str(cell.record.options.get("model.init_from")) for cell in cells}:
        if (named := hub_model(model)) is not None and job.container_image is None:
            fetch(named)  # here, where there is network more often than on the nodes
    submission = replace(submission, folder=snapshot.submission_folder(suite.output))
    number = submit(job, None, submission, render(template(), job, submission))
    prepare(suite, cells)
    last = submit_report(command, job, submission, number)
    print(f"job {number}: {len(members)} run(s) into {suite.output}, {job.ranks} rank(s) each")
    print(f"job {last}: their report, behind them, as {suite.output / 'report'}")
    print(f"status zerobert status {number}; zerobert {command} {suite.output} reports at any time")
    return 0


def array_of(
    job: JobConfig, output: Path, members: Sequence[Member], at_once: int | None
) -> tuple[JobConfig, Submission]:
    """The array job whose elements are runs, and what is submitted, in a folder that isn't made yet.

    Args:
        output: folder of all runs.
        at_once: elements that run at the same time; None: as many as there is room for.

    Raises:
        UserError: a path that SLURM can't have.
    """
    limit = "" if at_once is None else f"%{at_once}"
    elements = tuple(
        Element(member.folder, member.log or member.folder.with_suffix(".log"), member.options) for member in members
    )
    workdir = Path.cwd()
    for name, path in (("output", output), ("folder", workdir)):
        check_path(name, path)
    submission = Submission(snapshot.next_folder(output), output, workdir, sys.executable, elements)
    return replace(job, array=f"0-{len(members) - 1}{limit}"), submission


def job_of(options: Sequence[str]) -> tuple[JobConfig, bool]:
    """The job's options, validated, and whether it is a dry run.

    Raises:
        UserError: the first option that is wrong, or an option of the training.
    """
    ours, training = split(list(options))
    if training:
        raise UserError(f"{training[0].lstrip('-')}: options of the training stand in the file; put it there")
    job, dry_run = parse_job(ours)
    if job.array is not None:
        raise UserError(f"array: {job.array!r} is not allowed; it is the runs of the file: give --runs before the --")
    return job, dry_run


def report_script(command: str, job: JobConfig, submission: Submission, array: str) -> str:
    """The batch script of the report: one process, once all elements of the array have ended, whatever their ends."""
    small = replace(
        job, nodes=1, gpus_per_node=None, ntasks_per_node=1, gres=None, array=None, job_name=f"{job.job_name}-report",
        dependency=f"afterany:{array}",
    )  # fmt: skip
    python, code, output = (shlex.quote(str(part)) for part in (submission.python, submission.code, submission.output))
    lines = ["#!/usr/bin/env bash", *directives(small, submission), "", f"cd {code} || exit"]
    return "\n".join([*lines, f"exec {python} -m launch {command} {output}"]) + "\n"


def submit_report(command: str, job: JobConfig, submission: Submission, array: str) -> str:
    """Submit the report behind an array; its job's number.

    Raises:
        UserError: SLURM refuses it; the array is cancelled then.
    """
    script = submission.folder / REPORT_SCRIPT
    script.write_text(report_script(command, job, submission, array), encoding="utf-8")
    try:
        return hand_in(job, script)
    except BaseException:
        client.call("scancel", array)
        raise
