"""A run that is killed and resumed gives the losses of one that was never disturbed, bit for bit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.train.runs import losses, run, start_warm

STEPS = 12


def options(store: Path, stage: int, precision: str) -> list[str]:
    return [
        f"--data.path={store}",
        f"--train.steps={STEPS}",
        f"--train.zero_stage={stage}",
        f"--train.precision={precision}",
        "--train.save_interval=3",
        "--train.micro_batch=4",
        "--data.workers=1",
    ]


def kill_in_mid_run(output: Path, *arguments: str, step: int = 6, delay: float = 0.0) -> None:
    """Kill -9 every rank, some seconds after the checkpoint of a step is there."""
    process = start_warm(output, *arguments, ranks=2)
    deadline = time.monotonic() + 120
    while not (output / "checkpoints" / f"step-{step:06d}").is_dir():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        (2, "fp32"),
        pytest.param(3, "bf16", marks=pytest.mark.slow),
        pytest.param(0, "fp32", marks=pytest.mark.slow),
        pytest.param(0, "bf16", marks=pytest.mark.slow),
        pytest.param(1, "fp32", marks=pytest.mark.slow),
        pytest.param(1, "bf16", marks=pytest.mark.slow),
        pytest.param(2, "bf16", marks=pytest.mark.slow),
        pytest.param(3, "fp32", marks=pytest.mark.slow),
    ],
)
def test_losses_after_a_kill_and_resume_are_bit_equal_with_dropout_on(
    store: Path, tmp_path: Path, stage: int, precision: str
) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    arguments = options(store, stage, precision)
    run(undisturbed, *arguments, ranks=2)
    kill_in_mid_run(killed, *arguments)
    printed = run(killed, *arguments, "--resume=auto", ranks=2)
    assert "resumed" in printed
    truth = losses(undisturbed)
    assert [step for step, _ in truth] == list(range(1, STEPS + 1))
    assert losses(killed) == truth
    for tag in ("train/mlm_loss", "train/nsp_loss", "train/grad_norm", "train/learning_rate", "eval/mlm_loss"):
        assert losses(killed, tag) == losses(undisturbed, tag), tag


@pytest.mark.slow
def test_a_point_that_a_resume_cuts_in_two_is_the_undisturbed_runs(store: Path, tmp_path: Path) -> None:
    """Points at 5, 10 and 12 of a run that goes on from step 6 or 9: the first one covers steps from before."""
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    arguments = [*options(store, 2, "fp32"), "--train.log_interval=5", "--monitor.csv=true"]
    run(undisturbed, *arguments, ranks=2)
    kill_in_mid_run(killed, *arguments)
    assert "resumed" in run(killed, *arguments, "--resume=auto", ranks=2)
    assert [step for step, _ in losses(undisturbed)] == [5, 10, 12]
    for name in ("loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy"):
        assert losses(killed, f"train/{name}") == losses(undisturbed, f"train/{name}"), name
        exact = [(run / "csv" / f"train_{name}.csv").read_text() for run in (killed, undisturbed)]
        assert exact[0] == exact[1], name


def test_a_finished_run_resumes_to_nothing_more_to_do(store: Path, tmp_path: Path) -> None:
    arguments = [f"--data.path={store}", "--train.steps=2", "--monitor.csv=true"]
    run(tmp_path, *arguments)
    tags, files = ("train/loss", "eval/loss"), sorted((tmp_path / "csv").iterdir())
    before = [losses(tmp_path, tag) for tag in tags], [path.read_text() for path in files]
    assert "is finished" in run(tmp_path, *arguments, "--resume=auto")
    assert ([losses(tmp_path, tag) for tag in tags], [path.read_text() for path in files]) == before


@pytest.mark.slow
def test_a_longer_run_goes_on_from_a_shorter_ones_checkpoint(store: Path, tmp_path: Path) -> None:
    run(tmp_path, f"--data.path={store}", "--train.steps=2")
    run(tmp_path, f"--data.path={store}", "--train.steps=4", "--resume=auto")
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4]


def test_auto_without_a_checkpoint_starts_from_the_beginning(store: Path, tmp_path: Path) -> None:
    run(tmp_path, f"--data.path={store}", "--train.steps=2", "--resume=auto")
    assert [step for step, _ in losses(tmp_path)] == [1, 2]
