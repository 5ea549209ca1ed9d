"""An ablation that is really trained: what a pair has in common, and a switch that harms."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engine.model.folder import read_origin
from tests.conftest import ROOT
from tests.launch.suite.files import told
from tests.launch.suite.real import write_real_suite
from tests.train.runs import environment


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_pair_learns_from_the_same_examples_and_an_idle_rate_harms(store: Path, tmp_path: Path) -> None:
    path, output = write_real_suite(tmp_path, store, tasks=1, steps=40), tmp_path / "out"
    suite = yaml.safe_load(path.read_text())
    del suite["grid"]
    suite["base"]["optim"] = {"learning_rate": 1e-2}
    ablation = suite | {"switches": {"idle": {"optim.learning_rate": 1e-7}}, "sizes": [20]}
    path.write_text(yaml.safe_dump(ablation, sort_keys=False))
    command = [sys.executable, "-m", "launch", "ablate", str(path), "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    learned = {}
    for switch in ("base", "idle"):
        for seed in (1, 2):
            run = output / "tiny" / "kinds" / f"{switch},n=20" / f"seed-{seed}"
            assert "train: 20 examples" in run.with_name(f"seed-{seed}.log").read_text()
            learned[switch, seed] = (read_origin(run / "export") or {})["facts"]["training examples"]
    assert learned["base", 1] == learned["idle", 1] != learned["base", 2] == learned["idle", 2]
    (found,) = told(output)["effects"]
    assert (found["switch"], found["size"], found["pairs"], found["scored_on"]) == ("idle", "20", 2, "test")
    assert found["effect"] < -0.2
