"""The options of a SLURM job, their checks, and the batch script that is rendered from slurm/train.sbatch.

A user's values never become shell code: `#SBATCH` lines, which are comments to the shell, hold values of allowed
characters or quoted paths without control characters; in the script itself every value is quoted by shlex.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import require
from engine.errors import UserError

WORD = r"\w[\w.@+-]*"
#: options with values in SLURM's own syntax -> pattern of these values
PATTERNS = {
    "time": (r"\d+|\d+:[0-5]?\d(:[0-5]?\d)?|\d+-\d+(:[0-5]?\d){0,2}", "give minutes, h:mm:ss or days-hours"),
    "partition": (rf"{WORD}(,{WORD})*", "give a partition's name, or several with commas"),
    "account": (WORD, "give an account's name"),
    "qos": (rf"{WORD}(,{WORD})*", "give a quality of service's name"),
    "reservation": (rf"{WORD}(,{WORD})*", "give a reservation's name"),
    "constraint": (r"\w[\w&|()\[\]*:,.+-]*", "give features such as a100&ib"),
    "exclude": (r"\w[\w\[\],.-]*", "give nodes such as gpu[03-05],gpu9"),
    "gres": (r"[a-zA-Z]\w*(:[\w.+-]+){0,2}(,[a-zA-Z]\w*(:[\w.+-]+){0,2})*", "give such as gpu:a100:8"),
    "mem": (r"\d+[KMGT]?", "give megabytes, or such as 200G"),
    "dependency": (r"(singleton|[a-z]+(:\d+(_\d+)?(\+\d+)?)+)([,?](singleton|[a-z]+(:\d+(_\d+)?(\+\d+)?)+))*",
                   "give such as afterok:12 or singleton"),
    "array": (r"\d+-\d+%1", "give such as 1-5%1: jobs that go on from one another, as all write one folder"),
    "job_name": (WORD, "give letters, digits and . @ + - only"),
}  # fmt: skip
#: begins the line of a run's log that tells of a start
STARTED = "--- started:"
#: control characters and line ends of any reader, and surrogates, which UTF-8 can't hold
CONTROL = re.compile("[\x00-\x1f\x7f\x80-\x9f\u2028\u2029\ud800-\udfff]")


def option(help_text: str, default: Any = None) -> Any:
    """A field of `JobConfig` with the help text of its option."""
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class JobConfig:
    """The resources that SLURM is asked for; null leaves an option to the cluster's default."""

    nodes: int = option("nodes", 1)
    gpus_per_node: int | None = option("GPUs of a node, one rank each")
    ntasks_per_node: int | None = option("ranks of a node; gpus-per-node, or 1, when null")
    cpus_per_task: int = option("CPU cores of a rank", 4)
    mem: str | None = option("memory of a node, such as 200G; 0 takes all of it")
    gres: str | None = option("generic resources of a node, such as gpu:a100:8, where gpus-per-node doesn't do")
    time: str | None = option("time limit, such as 12:00:00 or 2-00; before it the run saves and requeues itself")
    partition: str | None = option("partition, or several with commas")
    account: str | None = option("account that is charged")
    qos: str | None = option("quality of service")
    reservation: str | None = option("reservation")
    constraint: str | None = option("features that the nodes must have, such as a100&ib")
    exclude: str | None = option("nodes to avoid, such as gpu[03-05]")
    dependency: str | None = option("jobs to wait for, such as afterok:12 or singleton")
    array: str | None = option("a chain of jobs that go on from one another, such as 1-5%%1")
    job_name: str = option("name of the job", "zerobert")
    grace: int = option(
        "seconds before the time limit at which USR1 asks the ranks to save; SLURM is up to 60 late", 120
    )
    max_restarts: int = option("how often the job may go back into the queue", 50)
    output_logs: str | None = option("log file, SLURM's %%x %%j %%A %%a allowed; <output>/logs/%%x-%%j.log when null")
    container_image: str | None = option("image to run the ranks in, by pyxis")
    container_mounts: str | None = option(
        "further mounts, SOURCE:TARGET[:FLAGS] with commas; the run's own folders are in"
    )
    container_python: str = option("python inside of the container", "python3")

    def validate(self) -> None:
        """Check every option.

        Raises:
            UserError: the first one that is wrong.
        """
        for name in ("nodes", "gpus_per_node", "ntasks_per_node", "cpus_per_task", "grace"):
            value = getattr(self, name)
            require(value is None or 1 <= value <= 65535, shown(name), value, "give a whole number from 1 to 65535")
        require(self.max_restarts >= 0, "max-restarts", self.max_restarts, "give 0 or more")
        for name, (pattern, remedy) in PATTERNS.items():
            value = getattr(self, name)
            fits = value is None or re.fullmatch(pattern, value, re.ASCII) is not None
            require(fits, shown(name), value, remedy)
        for name in ("output_logs", "container_image", "container_mounts", "container_python"):
            value = getattr(self, name)
            fits = value is None or (value.strip() != "" and not CONTROL.search(value))
            require(fits, shown(name), value, "give a line without control characters")
        image = self.container_image
        require(image is None or not image.startswith("-"), "container-image", image, "give the name of an image")
        mounts = self.container_mounts
        require(mounts is None or image is not None, "container-mounts", mounts, "give container-image too")

    @property
    def ranks_per_node(self) -> int:
        """SLURM tasks of a node, one per rank."""
        return self.ntasks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        """Number of ranks of the job."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Element:
    """A run of an array job."""

    output: Path
    log: Path
    """file that gets what it prints"""
    arguments: list[str]
    """of launch/train.py"""


@dataclass(frozen=True)
class Submission:
    """The paths of one submission's files."""

    folder: Path
    output: Path
    workdir: Path
    """folder that relative paths in the configuration refer to"""
    python: str
    elements: tuple[Element, ...] = ()
    """runs of an array job by their indices; none of a job that is one run"""

    @property
    def code(self) -> Path:
        return self.folder / "code"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def script(self) -> Path:
        return self.folder / "train.sbatch"


def shown(name: str) -> str:
    """The name of an option as it is typed, with hyphens."""
    return name.replace("_", "-")


def check_path(name: str, path: Path) -> None:
    """Refuse a path that SLURM can't take: one with control characters, or a backslash, which disables %-patterns."""
    text = str(path)
    require(not CONTROL.search(text), name, text, "it holds a control character; rename the folder")
    require("\\" not in text, name, text, "SLURM takes no backslash in the path of a log; rename the folder")


def log_pattern(job: JobConfig, output: Path) -> str:
    """The path of the log as a pattern of SLURM's, in which %% is a percent sign."""
    if job.output_logs:
        require("\\" not in job.output_logs, "output-logs", job.output_logs, "leave out the backslash")
        return job.output_logs
    number = "%A_%a" if job.array else "%j"
    return str(output / "logs").replace("%", "%%") + f"/%x-{number}.log"


def log_path(pattern: str, job_name: str, job: str, task: str = "%a") -> str:
    """The path of a job's log, from its pattern."""
    values = {"%%": "%", "%x": job_name, "%j": job, "%A": job, "%a": task}
    return re.sub("%.", lambda match: values.get(match[0], match[0]), pattern)


def directive(name: str, value: object) -> str:
    """One `#SBATCH` line, quoted as sbatch reads it."""
    text = str(value)
    assert not CONTROL.search(text), f"{name}: {text!r}"
    if not re.fullmatch(r"[\w./:=,@%+-]+", text, re.ASCII):
        escaped = text.replace("\\", "\\\\").replace('"', '\\"')
        text = f'"{escaped}"'
    return f"#SBATCH --{name}={text}"


def directives(job: JobConfig, submission: Submission) -> list[str]:
    """The `#SBATCH` lines of a job."""
    named = (
        "job_name", "nodes", "cpus_per_task", "gpus_per_node", "gres", "mem", "time", "partition", "account", "qos",
        "reservation", "constraint", "exclude", "dependency", "array",
    )  # fmt: skip
    values = {shown(name): getattr(job, name) for name in named}
    values["ntasks-per-node"] = job.ranks_per_node
    values["signal"] = f"USR1@{job.grace}"
    values["open-mode"] = "append"
    values["chdir"] = submission.workdir
    values["output"] = log_pattern(job, submission.output)
    return [directive(name, value) for name, value in values.items() if value is not None] + ["#SBATCH --requeue"]


def container_options(job: JobConfig, submission: Submission) -> list[str]:
    """Options of srun for pyxis: the image, and the run's own folders mounted at the same paths.

    Raises:
        UserError: a folder whose name can't be in a list of mounts.
    """
    if job.container_image is None:
        return []
    folders = dict.fromkeys([str(submission.workdir), str(submission.output)])
    for folder in folders:
        if re.search("[,:]", folder):
            raise UserError(f"output: {folder!r} can't be mounted in a container; use a path without , and :")
    mounts = [f"{folder}:{folder}" for folder in folders] + ([job.container_mounts] if job.container_mounts else [])
    return [
        f"--container-image={job.container_image}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={submission.workdir}",
    ]


def settings(job: JobConfig, submission: Submission) -> list[str]:
    """Assignments of the script's shell variables, every value quoted."""
    run = [
        f"OUTPUT={shlex.quote(str(submission.output))}",
        f"ARGUMENTS=({shlex.join(['--config', str(submission.config)])})",
    ]
    return [
        f"CODE={shlex.quote(str(submission.code))}",
        f"PYTHON={shlex.quote(submission.python)}",
        f"RANK_PYTHON={shlex.quote(job.container_python if job.container_image else submission.python)}",
        f"MAX_RESTARTS={job.max_restarts}",
        f"CONTAINER=({shlex.join(container_options(job, submission))})",
        *(element_choice(submission.elements) if submission.elements else run),
    ]


def element_choice(elements: Sequence[Element]) -> list[str]:
    """Lines that choose the run of an array job's element, whose output then goes to the run's own log."""
    cases = [
        f"{index}) OUTPUT={shlex.quote(str(element.output))} LOG={shlex.quote(str(element.log))} "
        f"ARGUMENTS=({shlex.join(element.arguments)}) ;;"
        for index, element in enumerate(elements)
    ]
    return [
        'case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac",
        'echo "log $LOG"',
        'mkdir -p "${LOG%/*}"',
        'exec >>"$LOG" 2>&1',
        f'echo "{STARTED} job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"',
    ]  # fmt: skip


def render(template: str, job: JobConfig, submission: Submission) -> str:
    """A job's batch script: slurm/train.sbatch with the `#SBATCH` lines and variables of the template replaced."""
    lines = template.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("#SBATCH"))
    begin, end = lines.index("# --- settings"), lines.index("# --- end of settings")
    between = [line for line in lines[first:begin] if not line.startswith("#SBATCH")]
    kept = lines[:first] + directives(job, submission) + between
    return "\n".join([*kept, lines[begin], *settings(job, submission), *lines[end:]]) + "\n"
