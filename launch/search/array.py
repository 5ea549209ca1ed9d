"""A search as a SLURM array: each element searches, and they share the folder's journal.

USR1, before the time limit, lets the run save and gives its trial back; the element goes back into the queue.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.config import RunConfig
from engine.errors import UserError
from engine.hub import fetch, hub_model
from launch.search.running import STOPPED
from launch.seeds.plan import without
from launch.slurm import snapshot
from launch.slurm.sbatch import JobConfig, Submission, check_path, directives
from launch.slurm.submit import check_container, check_run, submit


def submit_search(
    own: Sequence[str], training: Sequence[str], config: RunConfig, job: JobConfig, elements: int, *, dry_run: bool
) -> int:
    """Submit an array whose elements search.

    Args:
        own: options of the search.
        training: those of the training.
        config: of the training, validated.
        job: of the array.
        elements: how many search.

    Raises:
        UserError: a wrong option, or SLURM refuses; nothing is left behind then.
    """
    if elements < 1:
        raise UserError(f"submit: {elements} is not allowed; give the number of searches, at least 1")
    if job.nodes > 1 or (job.ntasks_per_node or 1) > 1 or job.array is not None or job.container_image is not None:
        raise UserError(
            "submit: an element is one search on one node; leave out nodes, ntasks-per-node, array and "
            "container-image, and give --launcher for runs of several ranks"
        )
    job = replace(job, ntasks_per_node=1, array=f"0-{elements - 1}")
    check_run(job, config)
    output, workdir = Path(config.output).absolute(), Path.cwd()
    for name, path in (("output", output), ("folder", workdir)):
        check_path(name, path)
    command = [*without(own, ["--submit"]), "--", *without(training, ["--output"]), f"--output={output}"]
    submission = Submission(snapshot.next_folder(output), output, workdir, sys.executable)
    if dry_run:
        print(script(job, submission, command), end="")
        return 0
    check_container(job)
    if (named := hub_model(config.model.init_from or "")) is not None:
        fetch(named)  # here, where there is network more often than on the nodes
    submission = replace(submission, folder=snapshot.submission_folder(output))
    number = submit(job, None, submission, script(job, submission, command))
    print(f"job {number}: {elements} search(es) into {output}; the last of them reports")
    print(f"status zerobert status {number}")
    return 0


def script(job: JobConfig, submission: Submission, command: Sequence[str]) -> str:
    """The batch script of an element."""
    code, python = shlex.quote(str(submission.code)), shlex.quote(submission.python)
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *directives(job, submission),
            "",
            "trap ':' USR1 # meant for the search; this shell must outlive it",
            f"export PYTHONPATH={code}",
            'export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}" SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"',
            "code=0",
            f"srun --ntasks=1 {python} {code}/launch/__main__.py search {shlex.join(command)} || code=$?",
            f'if [ "$code" -eq {STOPPED} ]; then scontrol requeue "$SLURM_JOB_ID" && exit 0; fi',
            'exit "$code"',
            "",
        ]
    )
