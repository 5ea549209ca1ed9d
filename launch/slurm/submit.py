"""`zerobert submit`: a training run as a SLURM job that saves, requeues and resumes by itself."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

from engine.config import RunConfig
from engine.errors import RunError, UserError
from engine.hub import fetch, hub_model
from launch.cli import CommandParser, known_options, unknown_option
from launch.configure.options import build_parser as training_parser
from launch.configure.options import parse_given
from launch.slurm import client as slurm
from launch.slurm import snapshot
from launch.slurm.sbatch import JobConfig, Submission, check_path, log_path, log_pattern, render, shown

DESCRIPTION = """Submit a training run to SLURM: one srun task a rank, no SSH.

  zerobert submit --nodes 4 --gpus-per-node 8 --time 12:00:00 --config launch/recipes/pretrain_base_phase1.yaml

Options that aren't listed here are those of `zerobert train`, checked before anything is submitted. Code and
configuration are copied into <output>/submit/NNN, so that later edits don't change a job that waits."""

RECORD = "job.json"
#: environment variables of a launcher around this command, which the job's ranks must not inherit
LAUNCHER_VARIABLES = re.compile(
    r"SLURM_(?!CONF$|CLUSTERS$)|OMPI_|PMI_|PMIX_|TORCHELASTIC_|GROUP_|ROLE_|CROSS_|"
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|LOCAL_SIZE|MASTER_ADDR|MASTER_PORT)$"
)
#: environment variables of sbatch that are defaults of options which the user may leave out; others would override ours
KEPT_DEFAULTS = {
    "SBATCH_PARTITION": "partition",
    "SBATCH_ACCOUNT": "account",
    "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_TIMELIMIT": "time",
    "SBATCH_GRES": "gres",
    "SBATCH_MEM_PER_NODE": "mem",
}


def build_parser() -> CommandParser:
    """The parser of all options of the command, those of the training too."""
    parser = training_parser()
    add_job_options(parser)
    return parser


def job_parser() -> CommandParser:
    """The parser of the job's own options."""
    parser = CommandParser(prog="zerobert submit", description=DESCRIPTION)
    add_job_options(parser)
    return parser


def add_job_options(parser: CommandParser) -> None:
    """Add the fields of `JobConfig` to a parser, and --dry-run."""
    types = get_type_hints(JobConfig)
    for field in fields(JobConfig):
        # Without the None of an optional type: jsonargparse reads values of those as YAML, where "#1" is null.
        plain = next(kind for kind in (get_args(types[field.name]) or (types[field.name],)) if kind is not type(None))
        name = f"--{shown(field.name)}"
        parser.add_argument(name, type=plain, default=field.default, help=field.metadata["help"])
    parser.add_argument("--dry-run", action="store_true", help="print the batch script, write and submit nothing")


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the job's options, each as one `--name=value`, and the options of the training.

    Raises:
        UserError: an option without its value, or an unknown one.
    """
    ours = set(known_options(job_parser()))
    flags = {"dry-run", "help"}
    training = known_options(training_parser())
    job: list[str] = []
    rest: list[str] = []
    index = 0
    while index < len(arguments):
        name, equals, _ = arguments[index].partition("=")
        bare = shown(name[2:]) if name.startswith("--") else {"-h": "help"}.get(name, "")
        if bare not in ours:
            if bare and "." not in bare and name[2:].split("=")[0] not in training:
                raise UserError(unknown_option(bare, [*ours, *training]))
            rest.append(arguments[index])
        elif bare in flags or equals:
            job.append(f"--{bare}{arguments[index][len(name) :]}")
        else:
            if index + 1 == len(arguments):
                raise UserError(f"{bare}: a value is missing; see zerobert submit --help")
            index += 1
            job.append(f"--{bare}={arguments[index]}")
        index += 1
    return job, rest


def parse_submission(arguments: list[str]) -> tuple[JobConfig, RunConfig, bool]:
    """The job's options, the run's configuration and whether it is a dry run, all validated.

    Raises:
        UserError: the first option that is wrong.
    """
    ours, training = split(arguments)
    job, dry_run = parse_job(ours)
    config, given = parse_given(training)
    resume = config.resume if "resume" in given else "auto"
    config = replace(config, resume=resume, output=str(Path(config.output).absolute()))
    check_path("output", Path(config.output))
    check_run(job, config)
    return job, config, dry_run


def parse_job(ours: list[str]) -> tuple[JobConfig, bool]:
    """The job's options, validated, and whether it is a dry run.

    Raises:
        UserError: the first option that is wrong.
    """
    values = job_parser().parse_args(ours).as_dict()
    dry_run = bool(values.pop("dry_run"))
    job = JobConfig(**values)
    job.validate()
    return job, dry_run


def check_run(job: JobConfig, config: RunConfig) -> None:
    """Refuse at once what the ranks would refuse when the job starts, hours later.

    Raises:
        UserError: a global batch that the ranks can't divide, or data that doesn't exist.
    """
    batch, micro = config.train.global_batch, config.train.micro_batch
    unit = job.ranks * (micro if isinstance(micro, int) else 1)
    if batch % unit:
        below = batch // unit * unit
        each = f" x train.micro_batch {micro}" if isinstance(micro, int) else ""
        raise UserError(
            f"train.global_batch: {batch} is not a multiple of {job.ranks} rank(s){each}; "
            f"give {f'{below} or ' if below else ''}{below + unit}"
        )
    if job.container_image is None:
        for name, path in (("data.path", config.data.path), ("model.init_from", config.model.init_from)):
            if path and not Path(path).exists() and not (name == "model.init_from" and hub_model(path)):
                raise UserError(f"{name}: {path!r} is not there; give a path that the nodes see")


def check_container(job: JobConfig) -> None:
    """Refuse a container where srun can't start one.

    Raises:
        UserError: pyxis is not installed.
    """
    if job.container_image and "--container-image" not in slurm.call("srun", "--help"):
        raise UserError(
            f"container-image: {job.container_image!r} needs pyxis, whose options this cluster's srun doesn't have; "
            "leave it out, or have pyxis installed"
        )


def active_job(output: Path) -> str | None:
    """Number of a pending or running job of an earlier submission into the same folder; None without one."""
    for record in reversed(submissions(output)):
        try:
            job = slurm.find_job(str(record["job"]))
        except UserError:
            continue
        if not job.finished:
            return job.array or job.id
    return None


def check_idle(job: JobConfig, output: Path) -> None:
    """Refuse a second job into the same folder, unless it waits for others.

    Raises:
        UserError: names the job that is there.
    """
    waiting = None if job.dependency else active_job(output)
    if waiting:
        raise UserError(
            f"output: job {waiting} trains into {str(output)!r}; zerobert cancel {waiting}, or give "
            f"--dependency afterany:{waiting} or another --output"
        )


def submissions(output: Path) -> list[dict[str, object]]:
    """The records of a run's submissions, oldest first; unreadable ones are left out."""
    records = [read_record(path) for path in sorted((output / "submit").glob(f"*/{RECORD}"))]
    return [record for record in records if record is not None]


def read_record(path: Path) -> dict[str, object] | None:
    """The record of a submission; None if it is missing or incomplete."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    wanted = {"job": str, "output": str, "log": str, "name": str}
    fits = isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in wanted.items())
    return record if fits and slurm.JOB_ID.fullmatch(record["job"]) else None


def sbatch_environment(env: Mapping[str, str], job: JobConfig) -> dict[str, str]:
    """The environment that the job inherits: without variables of launchers, or of sbatch that override the script."""
    kept = {name: value for name, value in env.items() if not LAUNCHER_VARIABLES.match(name)}
    for name in [name for name in kept if name.startswith("SBATCH_")]:
        if name not in KEPT_DEFAULTS or getattr(job, KEPT_DEFAULTS[name]) is not None:
            del kept[name]
    return kept


def template() -> str:
    """The text of slurm/train.sbatch.

    Raises:
        UserError: it isn't installed.
    """
    path = snapshot.ROOT / "slurm" / "train.sbatch"
    if not path.is_file():
        raise UserError(f"submit: {path} is not there; submit from a checkout of zerobert")
    return path.read_text(encoding="utf-8")


def submit(job: JobConfig, config: RunConfig | None, submission: Submission, script: str) -> str:
    """Write the files of a submission and hand its script to sbatch.

    Args:
        config: of the job's run; None where the script has the options of several.

    Returns:
        The job's number.

    Raises:
        UserError: SLURM refuses the job; no file is left behind, as for a RunError.
        RunError: a file can't be written, or SLURM's controller can't be reached.
    """
    pattern = log_pattern(job, submission.output)
    logs = Path(submission.workdir, log_path(pattern, job.job_name, "%j")).parent
    try:
        snapshot.copy_code(submission.code)
        if config is not None:
            snapshot.write_configuration(config, submission.config)
        submission.script.write_text(script, encoding="utf-8")
        if "%" not in str(logs).replace(str(submission.output), ""):
            logs.mkdir(parents=True, exist_ok=True)
        number = hand_in(job, submission.script)
    except BaseException:
        snapshot.discard(submission.folder, submission.output)
        raise
    record = {"job": number, "name": job.job_name, "output": str(submission.output), "log": pattern}
    (submission.folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    return number


def hand_in(job: JobConfig, script: Path) -> str:
    """Give a batch script to SLURM; the job's number.

    Raises:
        UserError: SLURM refuses it.
        RunError: its controller can't be reached, or it prints something else.
    """
    printed = slurm.call("sbatch", "--parsable", str(script), environment=sbatch_environment(os.environ, job)).strip()
    match = re.search(r"^(\d+)(;.*)?$", printed, re.MULTILINE)
    if match is None:
        raise RunError(f"sbatch printed {printed!r} and no job number; look into squeue")
    return match[1]


def main(arguments: list[str]) -> int:
    """Check everything, then write and submit, or print with --dry-run."""
    job, config, dry_run = parse_submission(arguments)
    output = Path(config.output)
    submission = Submission(snapshot.next_folder(output), output, Path.cwd(), sys.executable)
    check_path("folder", submission.workdir)
    script = render(template(), job, submission)
    if dry_run:
        print(script, end="")
        return 0
    check_container(job)
    named = hub_model(config.model.init_from or "")
    if named is not None and job.container_image is None:
        fetch(named)  # here, where there is network more often than on the nodes
    check_idle(job, output)
    submission = replace(submission, folder=snapshot.submission_folder(output))
    number = submit(job, config, submission, render(template(), job, submission))
    print(f"job {number}: {job.nodes} node(s) x {job.ranks_per_node} rank(s), {config.task} into {output}")
    print(f"log    {log_path(log_pattern(job, output), job.job_name, number)}")
    print(f"code   {submission.folder}")
    print(f"status zerobert status {number}")
    return 0
