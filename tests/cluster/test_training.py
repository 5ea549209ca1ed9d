"""Real pre-training as a SLURM job: two nodes, two ranks each, interrupted and requeued."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.cluster.bench import Bench, slurm_environment
from tests.cluster.slurm_cluster import Cluster, wait_for
from tests.conftest import ROOT
from tests.train.runs import BIN, SMALL, losses

STEPS = 40


def pretrain(bench: Bench, store: Path) -> str:
    return bench.submit(f"--data.path={store}", *SMALL, steps=STEPS)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_interrupted_job_ends_with_the_losses_of_an_undisturbed_one(
    cluster: Cluster, store: Path, tmp_path: Path
) -> None:
    undisturbed = Bench(cluster, tmp_path / "undisturbed", standin=False)
    undisturbed.finish(pretrain(undisturbed, store), seconds=200)
    bench = Bench(cluster, tmp_path / "interrupted", standin=False)
    job = pretrain(bench, store)
    wait_for(lambda: f"step 5/{STEPS}" in bench.log(job), 120, "5 steps")
    assert bench.status(job)["state"] in ("training", "saving", "evaluating")
    cluster.run("scancel", "--signal=USR1", job)
    wait_for(lambda: "requeued, restart 1 of" in bench.log(job), 60, "the requeue")
    log = bench.finish(job, seconds=250)
    assert "0: resumed " in log
    assert losses(bench.output) == losses(undisturbed.output)
    assert [step for step, _ in losses(bench.output)] == list(range(1, STEPS + 1))
    status = bench.status(job)
    assert (status["state"], status["step"], status["job_state"]) == ("done", STEPS, "COMPLETED")


@pytest.mark.slow
def test_the_script_is_usable_by_hand(cluster: Cluster, store: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = [f"--output={tmp_path / 'run'}", f"--data.path={store}", *SMALL, "--train.steps=2"]
    sbatch = ["sbatch", "--parsable", "--nodes=2", "--cpus-per-task=1", f"--output={log}", "slurm/train.sbatch"]
    environment = slurm_environment(cluster)
    environment["PATH"] = f"{BIN}:{environment['PATH']}"
    done = subprocess.run(
        [*sbatch, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    job = done.stdout.strip()
    cluster.wait_state(job, "COMPLETED", "FAILED", seconds=120)
    assert "0: srun: 2 rank(s) on cpu" in log.read_text()
    assert f"job {job}: done; newest checkpoint: step 2" in log.read_text()
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2]
