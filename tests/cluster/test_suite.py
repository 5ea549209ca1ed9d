"""A suite as an array of jobs that really train, one of them signalled and requeued; the report comes behind all."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.cluster.bench import Bench, slurm_environment
from tests.cluster.slurm_cluster import Cluster, wait_for
from tests.launch.suite.real import write_real_suite

STEPS = 200


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_array_goes_on_after_a_signal_and_a_report_comes_behind_it(
    cluster: Cluster, store: Path, tmp_path: Path
) -> None:
    bench = Bench(cluster, tmp_path, standin=False)
    path, output = write_real_suite(tmp_path, store, tasks=1, steps=STEPS), tmp_path / "out"
    submit = ["suite", str(path), f"--output={output}", "--runs=2", "--submit", "--", "--cpus-per-task=1"]
    printed = bench.zerobert(*submit)
    array, last = re.findall(r"^job (\d+):", printed, re.MULTILINE)
    assert f"job {array} trains into" in bench.zerobert(*submit, code=2)
    assert cluster.field(last, "Dependency").startswith(f"afterany:{array}")

    cell = output / "tiny" / "kinds" / "learning_rate=0.01"
    log = cell / "seed-2.log"
    wait_for(lambda: log.is_file() and f"step 5/{STEPS}" in log.read_text(), 200, "5 steps")
    # scancel itself doesn't return while elements of the array are waiting
    with subprocess.Popen(["scancel", "--signal=USR1", f"{array}_1"], env=slurm_environment(cluster)) as scancel:
        wait_for(lambda: "requeued, restart 1 of 50" in log.read_text(), 100, "the requeue")
        scancel.kill()
    cluster.wait_state(last, "COMPLETED", "FAILED", "CANCELLED", seconds=400)
    assert cluster.state(last) == "COMPLETED"
    assert "0: resumed " in log.read_text()
    assert log.read_text().count("--- started: job ") == 2
    report = json.loads((output / "report" / "report.json").read_text())
    assert [len(each["runs"]) for each in report["cells"]] == [2, 2]
    assert report["results"][0]["chosen"] == "learning_rate=0.01"
    assert "all of its runs are finished" in bench.zerobert(*submit, code=2)
    assert "# 4 of 4 runs" in bench.zerobert("suite", str(output))
