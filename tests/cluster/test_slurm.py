"""Jobs on a real SLURM cluster: submission, status, cancellation and the protocol of requeueing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.bench import Bench
from tests.cluster.slurm_cluster import Cluster, wait_for

#: a legitimate name of a folder, however it looks to a shell
ODD = "a b  ünï 'q' \"d\" $(touch canary) `touch canary` ;touch canary; #x %x %j &"


@pytest.fixture
def bench(cluster: Cluster, tmp_path: Path) -> Bench:
    return Bench(cluster, tmp_path)


def test_a_job_is_submitted_watched_and_finished_from_a_folder_of_any_name(cluster: Cluster, tmp_path: Path) -> None:
    bench = Bench(cluster, tmp_path / ODD)
    bench.plan(seconds=0.15)
    job = bench.submit("--job-name=first.job", "--data.path=null", "--monitor.wandb_group=$(touch canary)'\"`\\ \n é")
    for path in (bench.code / "launch").glob("*.py"):
        path.unlink()  # what runs is the copy
    bench.code = Path(__file__).resolve().parents[2]
    bench.wait_steps(5)
    running = bench.status(job)
    assert (running["job"], running["job_state"], running["nodes"]) == (job, "RUNNING", "node[1-2]")
    assert (running["state"], running["total"], running["loss"]) == ("training", 20, 2.5)
    assert running["output"] == str(bench.output)
    assert running["stale"] is False
    assert 0 < float(str(running["seconds_left"])) < 60
    bench.finish(job)
    log = bench.log(job, "first.job")
    assert [f"rank {rank} of 4 on node{1 + rank // 2}" in log for rank in range(4)] == [True] * 4
    assert f"{bench.output}/submit/001/code/launch/train.py" in log
    assert f"job {job}: done; newest checkpoint: step 20" in log
    assert bench.steps() == list(range(1, 21))
    told = bench.zerobert("status", str(bench.output))
    assert f"job        {job} COMPLETED on node[1-2]" in told
    assert "done, step 20/20 (100%), loss 2.5000, 1,000 tokens/s" in told
    assert f"log        {bench.output}/logs/first.job-{job}.log" in told
    assert "$(touch canary)'\\\"`\\\\ \\n é" in (bench.output / "submit" / "001" / "config.yaml").read_text()
    assert not list(tmp_path.rglob("canary"))


@pytest.mark.slow
def test_usr1_saves_requeues_and_goes_on(bench: Bench) -> None:
    bench.plan(seconds=0.1)
    job = bench.submit(steps=15)
    bench.wait_steps(3)
    bench.cluster.run("scancel", "--signal=USR1", job)
    wait_for(lambda: "requeued, restart 1 of 50" in bench.log(job), 20, "the requeue")
    log = bench.finish(job)
    assert bench.steps() == list(range(1, 16))
    assert "'--resume', 'auto'" in log
    assert bench.status(job)["restarts"] == 1
    assert not (bench.output / "REQUEUE").exists()


@pytest.mark.slow
def test_a_crash_is_restarted_after_progress_and_never_without(bench: Bench) -> None:
    bench.plan(seconds=0.02, crash_at=5)
    job = bench.submit()
    log = bench.finish(job)
    assert "failed with exit code" in log
    assert "after new checkpoints, the last at step 5; requeued, restart 1 of 50" in log
    assert bench.steps() == list(range(1, 21))
    bench.plan(seconds=0.02, fail_at_once=True)
    again = bench.submit("--max-restarts=5", steps=40)
    assert "wrote no checkpoint since it started (step 20), so it would fail again" in bench.finish(again, "FAILED")
    assert bench.cluster.field(again, "Restarts") == "0"


@pytest.mark.slow
def test_restarts_end(bench: Bench) -> None:
    job = bench.submit("--max-restarts=0", steps=1000)
    bench.wait_steps(2)
    bench.cluster.run("scancel", "--signal=USR1", job)
    assert "not requeued: all 0 restarts are used up" in bench.finish(job, "FAILED")


@pytest.mark.slow
def test_cancel_saves_and_stops_or_just_stops(bench: Bench) -> None:
    saved = bench.submit(steps=1000)
    bench.wait_steps(2)
    assert f"job {saved} trains into" in bench.zerobert("submit", f"--output={bench.output}", code=2)
    assert f"job {saved} saves and stops" in bench.zerobert("cancel", saved, "--save")
    log = bench.finish(saved)
    last = bench.steps()[-1]
    assert f"job {saved}: cancelled; newest checkpoint: step {last}" in log
    assert not list(bench.output.glob("CANCEL*")) + list(bench.output.glob("REQUEUE*"))
    lost = bench.submit(steps=1000)
    bench.wait_steps(last + 2)
    assert bench.zerobert("cancel", lost) == f"job {lost} cancelled\n"
    bench.finish(lost, "CANCELLED")
    assert "is over (CANCELLED)" in bench.zerobert("cancel", lost, code=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--partition=nowhere"], "partition: choose one that `sinfo` lists"),
        (["--nodes=3", "--train.global_batch=66"], "nodes: ask for fewer"),
        (["--constraint=a100"], "constraint: `sinfo -o '%N %f'` lists the features"),
        (["--gres=gpu:1"], "gpus-per-node, gres: `sinfo -o '%N %G'`"),
        (["--exclude=node9"], "exclude: `sinfo -N` lists the nodes"),
        (["--container-image=debian"], "container-image: 'debian' needs pyxis"),
    ],
)
def test_what_slurm_refuses_is_one_line_and_leaves_nothing(
    cluster: Cluster, tmp_path: Path, options: list[str], message: str
) -> None:
    bench = Bench(cluster, tmp_path, standin=False)
    printed = bench.zerobert("submit", f"--output={bench.output}", *options, code=2)
    assert message in printed
    assert printed.count("\n") == 1
    assert not bench.output.exists()


def test_an_unknown_job_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    bench = Bench(cluster, tmp_path, standin=False)
    assert "job: 424242 is unknown to SLURM" in bench.zerobert("status", "424242", code=2)
    assert "job: 424242 is unknown to SLURM" in bench.zerobert("cancel", "424242", code=2)


@pytest.mark.slow
def test_a_chain_of_jobs_goes_on_from_one_another(bench: Bench) -> None:
    bench.plan(seconds=0.01)
    chain = bench.submit("--array=1-2%1", steps=10)
    wait_for(lambda: len(list((bench.output / "logs").glob("*.log"))) == 2, 30, "both logs")
    logs = [bench.output / "logs" / f"zerobert-{chain}_{task}.log" for task in (1, 2)]
    wait_for(lambda: all("done; newest checkpoint: step 10" in log.read_text() for log in logs), 30, "both jobs")
    assert bench.steps() == list(range(1, 11))
    record = json.loads((bench.output / "submit" / "001" / "job.json").read_text())
    assert record["job"] == chain


@pytest.mark.slow
def test_the_time_limit_saves_and_requeues(bench: Bench) -> None:
    """SLURM looks at time limits every 30 s: USR1 comes 20 s after the start or later, before the minute is over."""
    bench.plan(seconds=0.2)
    job = bench.submit("--time=1", "--grace=40", steps=350)
    log = bench.finish(job, seconds=280)
    assert "requeued, restart 1 of 50" in log
    assert bench.steps() == list(range(1, 351))
    assert int(bench.cluster.field(job, "Restarts")) >= 1


@pytest.mark.slow
def test_a_preempted_job_saves_within_the_grace_and_goes_on_later(bench: Bench) -> None:
    bench.plan(seconds=0.1)
    job = bench.submit("--cpus-per-task=4", "--partition=low", steps=40)
    bench.wait_steps(3)
    urgent = bench.cluster.run(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
    )
    bench.cluster.wait_state(urgent, "COMPLETED", seconds=60)
    log = bench.finish(job)
    assert "before its time was over; requeued, restart 1 of 50" in log
    assert bench.steps() == list(range(1, 41))


@pytest.mark.slow
def test_a_job_that_does_not_save_in_time_is_requeued_by_slurm(bench: Bench) -> None:
    """Preemption without a save: SLURM itself requeues the job after the grace, and it starts anew."""
    bench.plan(seconds=0.1, deaf=True)
    job = bench.submit("--cpus-per-task=4", "--partition=low", steps=300)
    bench.wait_steps(3)
    bench.cluster.run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    wait_for(lambda: bench.cluster.field(job, "Restarts") == "1", 60, "the requeue")
    bench.plan(seconds=0.0)
    bench.finish(job)
    assert bench.steps()[-300:] == list(range(1, 301))
