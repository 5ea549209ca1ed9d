"""A search as an array of jobs on one journal, one of them signalled and requeued."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.cluster.bench import Bench, slurm_environment
from tests.cluster.slurm_cluster import Cluster, wait_for
from tests.conftest import ROOT

TRIALS = 8


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_elements_make_one_search_and_a_signalled_one_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    bench = Bench(cluster, tmp_path, standin=False)
    (tmp_path / "space.yaml").write_text("optim.learning_rate: {low: 1e-5, high: 1e-1, log: true}\n")
    (tmp_path / "bert").mkdir()
    stand_in = f"{sys.executable} {ROOT / 'tests' / 'launch' / 'search' / 'stand_in.py'}"
    own = ["search", "--space=space.yaml", f"--trials={TRIALS}", "--sampler=random", f"--launcher={stand_in}"]
    job = ["--submit=4", "--", "--cpus-per-task=1", "--task=sequence_classification", "--labelled.train=train.tsv"]
    training = ["--model.init_from=bert", "--output=out", "--train.keep=9", "--train.eval_interval=1"]
    (array,) = re.findall(r"^job (\d+):", bench.zerobert(*own, *job, *training), re.MULTILINE)

    output = tmp_path / "out"
    started = lambda number: output / f"trial-{number:04d}" / "starts.txt"  # noqa: E731
    wait_for(lambda: started(0).is_file() and started(1).is_file(), 200, "two trials under way")
    log = output / "logs" / f"zerobert-{array}_0.log"
    with subprocess.Popen(["scancel", "--signal=USR1", f"{array}_0"], env=slurm_environment(cluster)) as scancel:
        wait_for(lambda: log.is_file() and "stopped by SIGUSR1" in log.read_text(), 100, "the stop")
        scancel.kill()
    report = output / "report" / "report.json"
    wait_for(lambda: report.is_file() and len(json.loads(report.read_text())["trials"]) == TRIALS, 400, "the report")
    trials = json.loads(report.read_text())["trials"]
    assert [trial["number"] for trial in trials] == list(range(TRIALS))
    assert Counter(trial["state"] for trial in trials) == {"complete": TRIALS}
    starts = [len(started(number).read_text().splitlines()) for number in range(TRIALS)]
    assert sorted(starts) == [1] * (TRIALS - 1) + [2], "the signalled trial was started again, each other one once"
