"""Submission without a cluster: options, hostile text, the script, and what a stub of SLURM is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import RunConfig
from engine.errors import RunError, UserError
from launch.configure.options import parse
from launch.slurm import client as slurm
from launch.slurm import snapshot
from launch.slurm.sbatch import (
    PATTERNS,
    JobConfig,
    Submission,
    container_options,
    directive,
    directives,
    log_path,
    render,
    shown,
)
from launch.slurm.submit import job_parser, main, parse_submission, sbatch_environment, split, template
from tests.conftest import ROOT
from tests.train.runs import environment

HOSTILE = [
    "$(touch canary)",
    "`touch canary`",
    "x; touch canary",
    "a\nb",
    "a b",
    '"',
    "'",
    "-rf",
    "#x",
    "a\\",
    "é\u2028x",
]
ODD = "a b  ünï 'q' \"d\" $(touch canary) `touch canary` ;touch canary; #x %x &"


def submission(folder: Path) -> Submission:
    return Submission(folder / "run" / "submit" / "001", folder / "run", folder, sys.executable)


def zerobert(folder: Path, *arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        cwd=folder,
        env=environment() | {"PYTHONPATH": str(ROOT)} | ({"PATH": path} if path else {}),
        capture_output=True,
        text=True,
        check=False,
    )


def test_options_are_shared_out_between_the_job_and_the_training() -> None:
    given = ["--nodes", "2", "--train.steps", "3", "--gpus_per_node=8", "--config", "a b.yaml", "--dry-run"]
    job, training = split(given)
    assert job == ["--nodes=2", "--gpus-per-node=8", "--dry-run"]
    assert training == ["--train.steps", "3", "--config", "a b.yaml"]


def test_a_submission_resumes_unless_told_otherwise(tmp_path: Path) -> None:
    job, config, dry_run = parse_submission(["--nodes=4", "--gpus-per-node=8", f"--output={tmp_path}"])
    assert (job.ranks, config.resume, dry_run) == (32, "auto", False)
    assert parse_submission(["--resume=never"])[1].resume == "never"
    assert Path(parse_submission(["--output=runs/x"])[1].output) == Path.cwd() / "runs" / "x"


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_hostile_words_are_refused(name: str, text: str) -> None:
    with pytest.raises(UserError, match=f"^{shown(name)}: .*; give"):
        JobConfig(**{name: text}).validate()


def test_a_word_is_taken_as_it_is_typed() -> None:
    for text in ("#1", "null", "'a'"):
        assert job_parser().parse_args([f"--partition={text}"]).partition == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes=0"], "nodes: 0 is not allowed; give a whole number from 1"),
        (["--nodes=two"], "nodes: 'two' is not allowed; give a whole number"),
        (["--nodes"], "nodes: a value is missing"),
        (["--node=2"], "node: no such field; did you mean nodes?"),
        (["--partitoin=gpu"], "partitoin: no such field; did you mean partition?"),
        (["--max-restarts=-1"], "max-restarts: -1 is not allowed; give 0 or more"),
        (["--grace=0"], "grace: 0 is not allowed"),
        (["--array=0-3"], "array: '0-3' is not allowed; give 1-5%1|array: .* such as 1-5%1"),
        (["--output-logs=a\nb"], "output-logs: .* without control characters"),
        (["--output-logs=a\\b"], "output-logs: .* leave out the backslash"),
        (["--container-image=-v"], "container-image: '-v'"),
        (["--container-mounts=/a:/b"], "container-mounts: .* give container-image too"),
        (["--output=a\nb"], "output: .* control character"),
        (["--output=a\\b"], "output: .* no backslash"),
        (["--train.steps=x"], "train.steps: 'x' is not allowed"),
        (["--train.stepz=3"], "train.stepz: no such field; did you mean train.steps"),
        (["--nodes=3"], "train.global_batch: 64 is not a multiple of 3 rank.*; give 63 or 66"),
        (["--gpus-per-node=8", "--train.micro_batch=16"], "64 is not .* 8 .* x train.micro_batch 16; give 128"),
        (["--data.path=/nowhere/data"], "data.path: '/nowhere/data' is not there"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(["--dry-run", *options])
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_the_script_and_writes_nothing(tmp_path: Path) -> None:
    done = zerobert(tmp_path, "submit", "--dry-run", "--nodes=2", "--gpus-per-node=8", "--time=2-00", "--output=x y")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    wanted = "--nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=2-00 --signal=USR1@120 --requeue"
    for line in wanted.split():
        assert f"\n#SBATCH {line}\n" in done.stdout
    assert f'\n#SBATCH --output="{tmp_path}/x y/logs/%x-%j.log"\n' in done.stdout
    assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0


def test_the_template_is_a_script_of_its_own() -> None:
    text = template()
    for needed in ("USR1@120", "--requeue", "--open-mode=append", "--kill-on-bad-exit=1", "--wait=60", "--label"):
        assert needed in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1))
@settings(max_examples=60, deadline=None)
def test_any_text_reaches_the_script_unchanged_and_is_never_run(text: str) -> None:
    """Bash itself reads the settings back."""
    place = Submission(Path("/f") / text, Path("/o") / text, Path("/w") / text, text)
    job = JobConfig(container_image=f"i{text}", container_python=text)
    try:
        options = container_options(job, place)
    except UserError:
        job, options = JobConfig(), []
    wanted = ("CODE=", "PYTHON=", "CONTAINER=")
    lines = [line for line in render(template(), job, place).split("\n") if line.startswith(wanted)]
    script = "\n".join(lines) + '\nprintf "%s\\0" "$CODE" "$PYTHON" "${CONTAINER[@]}"\n'
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    found = done.stdout.decode().split("\0")[:-1]
    assert found == [str(place.code), text, *options]


@given(st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"])))
def test_a_directive_is_one_comment_line(text: str) -> None:
    line = directive("output", text)
    assert line.startswith("#SBATCH --output=")
    assert "\n" not in line


def test_containers_get_the_runs_own_folders(tmp_path: Path) -> None:
    job = JobConfig(container_image="nvcr.io#nvidia/pytorch:25.01", container_mounts="/data:/data:ro")
    place = submission(tmp_path)
    assert container_options(job, place) == [
        "--container-image=nvcr.io#nvidia/pytorch:25.01",
        f"--container-mounts={tmp_path}:{tmp_path},{tmp_path}/run:{tmp_path}/run,/data:/data:ro",
        f"--container-workdir={tmp_path}",
    ]
    assert "RANK_PYTHON=python3" in render(template(), job, place)
    with pytest.raises(UserError, match="can't be mounted in a container"):
        container_options(job, submission(tmp_path / "a,b"))


def test_percent_signs_of_a_folder_are_no_patterns(tmp_path: Path) -> None:
    lines = directives(JobConfig(), submission(tmp_path / "100%j"))
    assert f"#SBATCH --output={tmp_path}/100%%j/run/logs/%x-%j.log" in lines
    assert log_path("/a%%j/%x-%A_%a %q", "name", "5", "2") == "/a%j/name-5_2 %q"


@pytest.mark.slow
def test_a_configuration_reads_back_as_it_was(tmp_path: Path) -> None:
    for text in ["1e3", "'yes'", "0x1", "1:30", "nan", "~", "a: b", "- a", "é ü", *HOSTILE[3:6]]:
        config = parse([f"--output={text}", f"--monitor.wandb_group={text}", "--optim.betas=[0.8,0.95]"])
        snapshot.write_configuration(config, tmp_path / "config.yaml")
        assert yaml.safe_load((tmp_path / "config.yaml").read_text())["output"] == text


def test_the_snapshot_runs_without_the_checkout(tmp_path: Path) -> None:
    snapshot.copy_code(tmp_path / "code")
    names = {path.name for path in (tmp_path / "code").rglob("*")}
    assert not names & {"__pycache__", ".git", ".mypy_cache"}
    code = "import sys; sys.path.insert(0, sys.argv[1]); import launch.train, engine; print(launch.train.__file__)"
    command = [sys.executable, "-c", code, str(tmp_path / "code")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / "code" / "launch" / "train.py")


def test_submissions_are_counted(tmp_path: Path) -> None:
    assert [snapshot.submission_folder(tmp_path / "run").name for _ in range(3)] == ["001", "002", "003"]
    snapshot.discard(tmp_path / "run" / "submit" / "003", tmp_path / "run")
    assert snapshot.next_folder(tmp_path / "run").name == "003"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output: .* (can't be written|is not a folder)"):
        snapshot.submission_folder(tmp_path / "file")


def test_a_launchers_variables_do_not_reach_the_job() -> None:
    env = {"PATH": "/bin", "SLURM_CONF": "/c", "SLURM_JOB_ID": "1", "RANK": "0", "OMPI_X": "1", "RANKING": "1"}
    env |= {"SBATCH_PARTITION": "a", "SBATCH_QOS": "b", "SBATCH_OPEN_MODE": "truncate", "NCCL_SOCKET_IFNAME": "ib0"}
    kept = sbatch_environment(env, JobConfig(partition="mine"))
    assert set(kept) == {"PATH", "SLURM_CONF", "RANKING", "SBATCH_QOS", "NCCL_SOCKET_IFNAME"}


@pytest.mark.parametrize(
    ("printed", "kind", "message"),
    [
        ("sbatch: error: Batch job submission failed: Invalid partition name specified\n", UserError, "`sinfo` lists"),
        ("sbatch: error: invalid account specified\n", UserError, "sacctmgr"),
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", RunError, "is SLURM up"),
        ("sbatch: error: something new.\nsbatch: error: and more", UserError, "something new; and more; correct"),
        ("", UserError, "no reason given"),
    ],
)
def test_refusals_are_one_line_with_a_remedy(printed: str, kind: type[Exception], message: str) -> None:
    error = slurm.refusal("sbatch", printed)
    assert type(error) is kind
    assert message in str(error)
    assert "\n" not in str(error)


def test_no_slurm_is_one_line(tmp_path: Path) -> None:
    for command in (["submit", "--output=run"], ["status", "12"], ["cancel", "12"]):
        done = zerobert(tmp_path, *command, path=str(tmp_path))
        assert (done.returncode, done.stdout) == (2, "")
        assert "SLURM is not on this machine" in done.stderr
        assert done.stderr.count("\n") == 1
        assert not list(tmp_path.iterdir())


STUB = """#!/usr/bin/env bash
printf '%s\\0' "$(basename "$0")" "$@" >> "$STUB_LOG"; printf '\\n' >> "$STUB_LOG"
{action}
"""


def test_the_script_hands_srun_every_argument_unchanged(tmp_path: Path) -> None:
    """The rendered script runs in bash with stubs for SLURM's commands."""
    folder, tools, log = tmp_path / ODD, tmp_path / "bin", tmp_path / "calls"
    tools.mkdir()
    folder.mkdir()
    place = submission(folder)
    snapshot.copy_code(place.code)
    snapshot.write_configuration(RunConfig(output=str(place.output)), place.config)
    marker = place.output / "REQUEUE"
    actions = {"srun": f"echo 5 > {json.dumps(str(tmp_path / 'link'))}/REQUEUE; exit 143", "scontrol": "exit 0"}
    (tmp_path / "link").symlink_to(place.output)
    for name, action in actions.items():
        (tools / name).write_text(STUB.format(action=action))
        (tools / name).chmod(0o755)
    job = JobConfig(container_image="an image $(touch canary)", container_mounts="/a b:/c`touch canary`")
    script = render(template(), job, place)
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "STUB_LOG": str(log), "SLURM_JOB_ID": "9"}
    done = subprocess.run(["bash", "-c", script], env=env, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "requeued, restart 1 of 50" in done.stdout
    calls = [line.split("\0")[:-1] for line in log.read_text().split("\n")[:-1]]
    assert calls[0] == [
        "srun", "--kill-on-bad-exit=1", "--wait=60", "--label", *container_options(job, place), "python3",
        str(place.code / "launch" / "train.py"), "--config", str(place.config),
    ]  # fmt: skip
    assert calls[1] == ["scontrol", "requeue", "9"]
    assert not marker.exists()
    assert not list(tmp_path.rglob("canary"))
