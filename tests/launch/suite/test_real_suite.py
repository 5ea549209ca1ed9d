"""A suite that is really trained, killed on its way, and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.compare.command import compare
from tests.conftest import ROOT
from tests.launch.suite.files import told
from tests.launch.suite.real import write_real_suite
from tests.train.runs import environment


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_suite_that_is_killed_goes_on_and_tells_what_learns(store: Path, tmp_path: Path) -> None:
    """SIGKILL of the command and its run, in the middle of the second of eight."""
    path, output = write_real_suite(tmp_path, store, tasks=2, steps=60), tmp_path / "out"
    command = [sys.executable, "-m", "launch", "suite", str(path), "--output", str(output)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True)
    first, second = (output / "tiny" / "kinds" / "learning_rate=0.01" / f"seed-{seed}" for seed in (1, 2))
    while not list(second.glob("checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = (first / "report" / "report.json").stat().st_mtime_ns
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    assert (first / "report" / "report.json").stat().st_mtime_ns == kept
    assert "resumed " in second.with_name("seed-2.log").read_text()
    found = {result["task"]: result for result in told(output)["results"]}
    assert found["kinds"]["chosen"] == found["numbers"]["chosen"] == "learning_rate=0.01"
    assert found["kinds"]["score"]["mean"] > 0.9 > found["kinds"]["of_settings"]["lowest_mean"]
    best = json.loads((second / "export" / "zerobert.json").read_text())["best"]
    cell = next(
        cell for cell in told(output)["cells"] if (cell["task"], cell["setting"]) == ("kinds", second.parent.name)
    )
    assert cell["runs"]["seed-2"]["validation"] == best["value"]
    pair = compare(second.parent, second.parent.with_name("learning_rate=1.0e-07"))["scores"]["accuracy"]
    assert pair["tests"] == found["kinds"]["against_chosen"]["learning_rate=1.0e-07"]["tests"]
