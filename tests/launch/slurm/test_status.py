"""What is told of a run: from SLURM's words and from its own files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import UserError
from launch.slurm import client as slurm
from launch.slurm.client import Job, check_job_id, parse_jobs
from launch.slurm.requeue import Attempt
from launch.slurm.status import clock, read_heartbeat, seconds_left, status_of, text_of
from launch.slurm.submit import read_record
from tests.conftest import ROOT
from tests.train.runs import environment

BEAT = {
    "time": 1000.0, "step": 50, "total": 200, "loss": 2.5, "tokens_per_second": 1234.5, "restarts": 1, "job": "12",
    "state": "training", "host": "node1", "ranks": 4,
}  # fmt: skip
RUNNING = Job("12", "RUNNING", nodes="node[1-2]", elapsed="00:10:00", limit="12:00:00")
RECORD = """JobId=12 JobName=zero bert
   JobState=PENDING Reason=Resources Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   RunTime=00:00:04 TimeLimit=365-00:00:00 TimeMin=N/A
   NodeList=(null)
   Command=/a b/submit/001/JobState=DONE Restarts=9/train.sbatch
   WorkDir=/a b
"""


def test_a_record_of_scontrol() -> None:
    assert parse_jobs(RECORD) == [
        Job("12", "PENDING", "Resources", "", "00:00:04", "365-00:00:00", 2,
            "/a b/submit/001/JobState=DONE Restarts=9/train.sbatch")
    ]  # fmt: skip
    assert [job.id for job in parse_jobs(f"{RECORD}\n{RECORD.replace('JobId=12', 'JobId=13')}")] == ["12", "13"]
    assert parse_jobs("") == []


@pytest.mark.parametrize("text", ["", "x", "12;ls", "-1", "1 2", "12\n", "12_", "1" * 30, "١٢", "$(id)", "12.3"])
def test_job_numbers_are_checked(text: str) -> None:
    with pytest.raises(UserError, match="is not a job number"):
        check_job_id(text)


def test_job_numbers_pass() -> None:
    assert [check_job_id(text) for text in ("12", "12_3")] == ["12", "12_3"]


def test_the_rest_of_a_run_is_told_from_its_pace() -> None:
    assert seconds_left(BEAT, Attempt("12", 0, 10, 960.0)) == pytest.approx(150.0)
    assert seconds_left(BEAT, Attempt("12", 0, None, 950.0)) == pytest.approx(150.0)
    for attempt in (None, Attempt("12", 0, 50, 960.0), Attempt("12", 0, 10, 2000.0)):
        assert seconds_left(BEAT, attempt) is None
    assert seconds_left({**BEAT, "state": "done"}, Attempt("12", 0, 10, 960.0)) is None


def test_a_status_for_people(tmp_path: Path) -> None:
    status = status_of(tmp_path, RUNNING, "/logs/x.log", BEAT, Attempt("12", 0, 10, 960.0), 1004.0)
    assert text_of(status).splitlines() == [
        f"output     {tmp_path}",
        "job        12 RUNNING on node[1-2], 00:10:00 of 12:00:00, restarts 1",
        "run        training, step 50/200 (25%), loss 2.5000, 1,234 tokens/s, 2:30 left",
        "heartbeat  4 s ago",
        "log        /logs/x.log",
    ]


@pytest.mark.parametrize(
    ("state", "job", "age", "stale"),
    [
        ("training", RUNNING, 59, False),
        ("training", RUNNING, 61, True),
        ("training", None, 61, True),
        ("saving", RUNNING, 61, False),
        ("saving", RUNNING, 601, True),
        ("starting", RUNNING, 900, False),
        ("done", RUNNING, 900, False),
        ("preempted", RUNNING, 900, False),
        ("training", Job("12", "PENDING"), 900, False),
        ("training", Job("12", "TIMEOUT"), 900, False),
    ],
)
def test_a_silent_run_is_stale_only_where_it_should_speak(
    tmp_path: Path, state: str, job: Job | None, age: float, stale: bool
) -> None:
    status = status_of(tmp_path, job, None, {**BEAT, "state": state}, None, 1000.0 + age)
    assert status.stale == stale
    assert ("STALE" in text_of(status)) == stale


def test_long_steps_are_not_stale(tmp_path: Path) -> None:
    slow = Attempt("12", 0, 49, 1000.0 - 90)
    assert [status_of(tmp_path, RUNNING, None, BEAT, slow, 1000.0 + age).stale for age in (440, 460)] == [False, True]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "7", "{}", json.dumps({**BEAT, "step": "5"}), json.dumps({**BEAT, "state": None}),
     json.dumps({**BEAT, "time": True})],
)  # fmt: skip
def test_a_damaged_heartbeat_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "heartbeat.json").write_text(content)
    with pytest.raises(UserError, match=r"heartbeat.json .*; remove it"):
        read_heartbeat(tmp_path)


def test_a_damaged_record_is_none(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    for content in ("", "{}", "[]", '{"job": 1}', '{"job": "x", "output": "", "log": "", "name": ""}'):
        path.write_text(content)
        assert read_record(path) is None
    assert read_record(tmp_path / "absent") is None


def test_times() -> None:
    assert [clock(seconds) for seconds in (5, 65, 3700, 90000)] == ["5 s", "1:05", "1:01:40", "1 d 1:00:00"]


def command(*arguments: str, folder: Path, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launch", *arguments],
        cwd=folder,
        env=environment() | {"PYTHONPATH": str(ROOT), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_folder_is_told_without_slurm_and_json_is_json(tmp_path: Path) -> None:
    (tmp_path / "heartbeat.json").write_text(json.dumps({**BEAT, "loss": float("nan")}))
    done = command("status", str(tmp_path), "--json", folder=tmp_path, path=str(tmp_path))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(name))
    assert (told["step"], told["loss"], told["job"], told["stale"]) == (50, None, None, True)


def test_an_empty_folder_and_what_is_none(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    done = command("status", "run", folder=tmp_path, path=str(tmp_path))
    assert "no heartbeat yet" in done.stdout
    for wrong in ("nowhere/run", "abc"):
        done = command("status", wrong, folder=tmp_path, path=str(tmp_path))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"run: '{wrong}' is neither a job's number nor a folder" in done.stderr


def stub(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_a_job_that_the_controller_forgot_is_looked_up_in_the_accounting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    stub(tmp_path, "scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    row = "12|CANCELLED by 0|00:01:00|01:00:00|node1|sbatch --parsable /a b/submit/001/train.sbatch"
    stub(tmp_path, "sacct", f"echo '{row}'")
    job = slurm.find_job("12")
    assert (job.state, job.script, job.finished) == ("CANCELLED", "/a b/submit/001/train.sbatch", True)
    stub(tmp_path, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    with pytest.raises(UserError, match="job: 12 is unknown to SLURM"):
        slurm.find_job("12")
