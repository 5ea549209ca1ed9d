"""A ladder as two arrays of jobs that really train: the largest budgets, and behind them the runs that branch off."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from engine.scaling.points import read_points
from tests.cluster.bench import Bench
from tests.cluster.slurm_cluster import Cluster
from tests.launch.scaling.ladder.test_run import LADDER


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_branches_wait_for_the_runs_that_they_begin_with(cluster: Cluster, store: Path, tmp_path: Path) -> None:
    bench = Bench(cluster, tmp_path, standin=False)
    path, output = tmp_path / "ladder.yaml", tmp_path / "out"
    path.write_text(LADDER.format(store=store))
    submit = ["scaling", "run", str(path), f"--output={output}", "--submit", "--", "--cpus-per-task=1"]
    trunks, branches = re.findall(r"^job (\d+): 2 run\(s\)", bench.zerobert(*submit), re.MULTILINE)
    assert cluster.field(branches, "Dependency").startswith(f"afterany:{trunks}")
    assert f"trains into '{output}'" in bench.zerobert(*submit, code=2)
    cluster.wait_state(branches, "COMPLETED", "FAILED", "CANCELLED", seconds=600)
    assert cluster.state(branches) == "COMPLETED"
    assert "all of these runs are finished" in bench.zerobert(*submit, code=2)
    bench.zerobert("scaling", "collect", str(output))
    points = read_points(output / "points.csv")
    assert len(points) == 4
    assert len(set(points.runs)) == 2
    assert len(json.loads((output / "points.json").read_text())["abilities"]) > 0
