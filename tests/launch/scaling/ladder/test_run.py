"""A ladder that is really trained, killed on the way, and measured."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from engine.data.store.manifest import read_manifest
from engine.errors import UserError
from engine.scaling.points import read_points
from launch.scaling.ladder import collect as collecting
from launch.scaling.ladder.collect import main as collect
from launch.scaling.ladder.run import main as run_ladder
from tests.train.runs import ROOT, SCRIPT, environment, losses

LADDER = """
base:
  data: {{path: {store}, sequence_length: 64, workers: 0}}
  model: {{max_positions: 64}}
  train: {{eval_samples: 16, log_interval: 1, verify_update: 0}}
sizes: [1e4, 3e4]
tokens: [1e4, 2e4]
proportions: {{width_per_layer: 16, head_width: 16}}
architectures: [modernbert]
seeds: 1
rules: {{learning_rate: 1e-3, global_batch: 8}}
held_out: {{embedded: {store}}}
abilities: {{questions: 20}}
"""


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "launch", "scaling", "run", str(folder / "ladder.yaml"), *options]


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(folder, "--output", str(folder / "runs")), cwd=ROOT, env=environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def finish(folder: Path) -> str:
    process = start(folder)
    told, _ = process.communicate(timeout=600)
    assert process.returncode == 0, told
    return told


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_ladder_that_is_killed_three_times_ends_with_the_same_points(store: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
        (folder / "ladder.yaml").write_text(LADDER.format(store=store))
    assert "4 run(s), 4 to make" in finish(whole)
    for seconds in (9, 14, 11):
        process = start(killed)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finish(killed)
    assert "4 run(s), 0 to make" in finish(killed)
    texts = []
    for folder in (whole, killed):
        assert collect([str(folder / "runs")]) == 0
        texts.append((folder / "runs" / "points.csv").read_text())
    assert texts[0] == texts[1]
    rows = list(csv.DictReader(texts[0].splitlines()))
    assert len(rows) == 4
    assert len({row["run"] for row in rows}) == 2
    points = read_points(whole / "runs" / "points.csv")
    assert set(points.tokens) == {20 * 512, 39 * 512}
    told = json.loads((whole / "runs" / "points.json").read_text())
    assert {"cloze_frequent", "agreement_simple"} <= {each["name"] for each in told["abilities"]}
    branch = whole / "runs" / rows[-1]["name"]
    (checkpoint,) = (whole / "runs" / rows[-1]["run"] / "checkpoints").glob("step-000016")
    assert checkpoint.is_dir()
    alone = ["--config", str(branch / "config.yaml"), "--branch_from=null", f"--output={tmp_path / 'alone'}"]
    subprocess.run([sys.executable, SCRIPT, *alone], env=environment(), check=True, capture_output=True)
    assert losses(branch) == [point for point in losses(tmp_path / "alone") if point[0] > 16]


def test_folders_that_are_none_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        ([str(tmp_path)], "holds no ladder.json and no config.yaml"),
        ([str(tmp_path), "--sequences", "1"], "sequences: 1 is not allowed; give at least 2"),
        ([str(tmp_path), "--questions", "0"], "questions: 0 is not allowed; give at least 2"),
    ):
        with pytest.raises(UserError, match=message):
            collect(options)
    (tmp_path / "ladder.json").write_text(json.dumps({"runs": {"a/b": {}}}))
    with pytest.raises(UserError, match=r"collect: no run of .* is finished; zerobert scaling run makes them"):
        collect([str(tmp_path)])
    (tmp_path / "ladder.json").write_text("{}")
    with pytest.raises(UserError, match="it is no record of a ladder"):
        collect([str(tmp_path)])


def test_what_cannot_be_measured_is_refused_before_training(store: Path, tmp_path: Path) -> None:
    file = LADDER.format(store=store).replace(f"embedded: {store}", f"gone: {tmp_path}")
    (tmp_path / "ladder.yaml").write_text(file)
    with pytest.raises(UserError, match=f"{tmp_path}"):
        run_ladder([str(tmp_path / "ladder.yaml"), f"--output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_text_that_was_trained_on_and_names_of_other_columns_are_refused(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collecting.check_held_out({"own": str(store)}, store)
    with pytest.raises(UserError, match="held-out: 'error_wiki' is not allowed; its columns would be others' too"):
        collecting.check_held_out({"error_wiki": str(store)}, store)
    manifest = read_manifest(store)
    whole = replace(manifest, splits={**manifest.splits, "validation": []})
    monkeypatch.setattr(collecting, "read_manifest", lambda path: whole)
    with pytest.raises(UserError, match=r"held-out: .* was trained on and holds out nothing"):
        collecting.check_held_out({"own": str(store)}, store)
