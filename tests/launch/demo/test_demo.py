"""The demo does the whole job, shortened here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch.demo import command as demo
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


@pytest.mark.parametrize(
    ("gpus", "asked", "ranks", "passed_on"),
    [(0, None, 2, "cpu"), (4, None, 4, None), (4, "cpu", 2, "cpu"), (4, "cuda", 4, "cuda"), (0, "cpu", 2, "cpu")],
)
def test_ranks_are_gpus_unless_there_are_none_or_cpus_are_asked_for(
    gpus: int, asked: str | None, ranks: int, passed_on: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[list[str], str | None]] = []

    def run(command: list[str], env: dict[str, str], check: bool) -> subprocess.CompletedProcess[str]:
        ran.append((command, env.get("DS_ACCELERATOR")))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(demo.subprocess, "run", run)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if asked is not None:
        monkeypatch.setenv("DS_ACCELERATOR", asked)
    assert demo.deepspeed("demo_pretrain.yaml") == 0
    ((command, told),) = ran
    assert command[command.index("--num_accelerators") + 1] == str(ranks)
    assert told == passed_on
