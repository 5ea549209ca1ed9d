"""The demo does the whole job, shortened here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.runs import ROOT, environment, losses


@pytest.mark.slow
def test_the_demo_makes_everything_under_its_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launch", "demo", f"--output={tmp_path / 'demo'}", "--steps=60"]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rank(s) on cpu, ZeRO-2" in done.stdout
    curve = losses(tmp_path / "demo" / "pretrain")
    assert curve[-1][1] < curve[0][1] - 0.5
    report = json.loads((tmp_path / "demo" / "finetune" / "report" / "report.json").read_text())
    assert report["accuracy"] > 2 * report["majority_baseline"]["accuracy"]
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
