"""Whether a job goes back into the queue, and what its attempts leave."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.slurm import requeue
from launch.slurm.requeue import REQUEUE_CODE, Ending, decide
from tests.conftest import ROOT

DONE = Ending(
    code=0, saved=False, cancelled=False, restarts=0, max_restarts=3, step_before=None, step_after=100
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        ({}, 0, "done"),
        ({"saved": True}, REQUEUE_CODE, "saved at step 100 .* restart 1 of 3"),
        ({"saved": True, "code": 143}, REQUEUE_CODE, "saved at step 100"),
        ({"saved": True, "restarts": 3}, 1, "all 3 restarts are used up"),
        ({"saved": True, "restarts": 3, "code": 143}, 143, "all 3 restarts are used up"),
        ({"saved": True, "cancelled": True}, 0, "cancelled; newest checkpoint: step 100"),
        ({"cancelled": True, "code": 143}, 143, "cancelled"),
        ({"cancelled": True, "code": 143, "step_after": None}, 143, "no checkpoint"),
        ({"code": 2}, 2, "a mistake in what the run was given"),
        ({"code": 1}, REQUEUE_CODE, "exit code 1 after new checkpoints"),
        ({"code": 1, "step_before": 100}, 1, "wrote no checkpoint since it started \\(step 100\\)"),
        ({"code": 143, "step_before": 50}, REQUEUE_CODE, "the last at step 100"),
        ({"code": 1, "step_after": None}, 1, "no checkpoint"),
        ({"code": 138, "step_before": 100}, REQUEUE_CODE, "signalled before they could save"),
        ({"code": 138, "restarts": 3}, 138, "restarts are used up"),
        ({"code": 75, "step_before": 100}, REQUEUE_CODE, "the ranks hung"),
        ({"code": 75, "restarts": 3}, 1, "restarts are used up"),
    ],
)
def test_the_verdict(change: dict[str, int], code: int, reason: str) -> None:
    verdict = decide(replace(DONE, **change))  # type: ignore[arg-type]
    assert verdict.code == code
    assert re.search(reason, verdict.reason)


@pytest.mark.parametrize("code", range(1, 256))
def test_no_failure_asks_for_a_requeue_without_restarts_left(code: int) -> None:
    verdict = decide(replace(DONE, code=code, max_restarts=0))
    assert verdict.code not in (0, REQUEUE_CODE)


def checkpoint(output: Path, step: int) -> None:
    folder = output / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")


def run(output: Path, *arguments: str, **env: str) -> tuple[int, str, str]:
    """Call the file as the batch script does, in an environment that has nothing but the job's variables."""
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "launch" / "slurm" / "requeue.py"),
            *arguments,
            "--output",
            str(output),
            "--",
            "--x",
            "y z",
        ],
        env={"SLURM_JOB_ID": "7", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_first_attempt_and_its_restart(tmp_path: Path) -> None:
    output = tmp_path / "a run"
    assert run(output, "start") == (0, "", "")
    checkpoint(output, 20)
    (output / "REQUEUE").write_text("20\n")
    code, printed, _ = run(output, "end", "--code=0", "--max-restarts=1")
    assert (code, printed) == (75, "job 7: saved at step 20 before its time was over; requeued, restart 1 of 1\n")
    assert not (output / "REQUEUE").exists()
    assert run(output, "start", SLURM_RESTART_COUNT="1") == (0, "auto\n", "")
    attempt = json.loads((output / "attempt.json").read_text())
    assert (attempt["job"], attempt["restarts"], attempt["step"]) == ("7", 1, 20)
    code, printed, _ = run(output, "end", "--code=1", "--max-restarts=9", SLURM_RESTART_COUNT="1")
    assert code == 1
    assert "wrote no checkpoint since it started (step 20)" in printed


def test_a_restart_without_a_checkpoint_begins_as_it_was_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-000009").mkdir(parents=True)  # incomplete: no state.json
    (tmp_path / "checkpoints" / ".partial-step-000010").mkdir()
    assert run(tmp_path, "start", SLURM_RESTART_COUNT="2") == (0, "", "")


def test_markers_of_other_jobs_and_attempts_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "REQUEUE").write_text("3\n")
    (tmp_path / "CANCEL").write_text("6\n")
    assert run(tmp_path, "start")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["attempt.json"]
    (tmp_path / "CANCEL").write_text("6\n")
    assert run(tmp_path, "end", "--code=0") == (0, "job 7: done; newest checkpoint: no checkpoint\n", "")


def test_a_job_cancelled_before_it_began_does_not_begin(tmp_path: Path) -> None:
    (tmp_path / "CANCEL").write_text("7\n")
    assert run(tmp_path, "start") == (3, "", "job 7: cancelled before it began\n")


def test_by_hand_the_folder_is_what_the_training_options_say(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "slurm" / "requeue.py"), "start", "--output", "", "--"]
    subprocess.run([*command, f"--output={tmp_path / 'run'}", "--debug"], cwd=tmp_path, check=True)
    assert (tmp_path / "run" / "attempt.json").is_file()
    wrong = subprocess.run([*command, "--train.steps=x"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: train.steps: 'x' is not allowed")
    assert not (tmp_path / "runs").exists()


def test_a_damaged_attempt_file_is_no_attempt(tmp_path: Path) -> None:
    for content in ("", "{}", "[1]", '{"job": 1, "unknown": 2}', "\x00"):
        (tmp_path / "attempt.json").write_text(content)
        assert requeue.read_attempt(tmp_path) is None
