"""The Python API: the documentation's example, and its mistakes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import UserError
from launch import api
from tests.conftest import ROOT
from tests.train.runs import environment


@pytest.mark.slow
def test_the_example_of_the_page_runs(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    example = re.search(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert example is not None
    done = subprocess.run(
        [sys.executable, "-c", example[1]],
        cwd=tmp_path, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    loss = next(float(line) for line in lines if re.fullmatch(r"\d+\.\d{6,}", line))
    assert 5.0 < loss < 7.5
    assert 0.0 < float(lines[-3]) < 1.0
    label, confidence = lines[-2].split()
    assert label == lines[-1]
    assert 1 / 7 <= float(confidence) < 1.0
    assert lines[-1] in ("language", "graphics", "internet", "concurrency", "testing", "numbers", "imports")


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vocabsize: no such field; choose one of"):
        api.prepare(tmp_path, vocabsize=3)
    with pytest.raises(UserError, match=r"train.stesp: no such field; did you mean train.steps\?"):
        api.train({"train.stesp": 3})
    with pytest.raises(UserError, match="does not exist; make it with `zerobert prepare`"):
        api.train({"data.path": tmp_path / "none", "output": tmp_path / "run"})
    with pytest.raises(UserError, match=r"holds no config.yaml; give the folder of a run that is over"):
        api.evaluate(tmp_path)
    with pytest.raises(UserError, match="holds no model"):
        api.load(tmp_path)
    with pytest.raises(UserError, match="probability: no such field; choose one of text, text_pair"):
        api.predict(tmp_path, ["a text"], probability=True)
    with pytest.raises(UserError, match=r"config.json: no such file; give the folder of a Hugging Face encoder"):
        api.predict(tmp_path, ["a text"])


def test_seeds_and_their_comparison(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Runs that a stand-in makes: of seed N a tenth of N is right, of 10 N examples."""
    launcher = f"{sys.executable} {ROOT / 'tests' / 'launch' / 'seeds' / 'stand_in.py'}"
    task = {"task": "sequence_classification", "model.init_from": "bert", "labelled.train": "train.tsv"}
    (tmp_path / "some").mkdir()
    report = api.seeds({**task, "output": tmp_path / "some", "seed": 3}, count=2, launcher=launcher)
    assert report["scores"]["accuracy"]["mean"] == pytest.approx(0.35)
    assert "training seed-4" in capfd.readouterr().out
    assert api.seeds({**task, "output": tmp_path / "some", "seed": 3}, count=2, launcher=launcher) == report
    runs = []
    for name, right in (("first", 12), ("second", 18)):
        runs.append(tmp_path / name)
        rows = [f"{index}\tyes\t{'yes' if index < right else 'no'}\t0.9" for index in range(20)]
        (runs[-1] / "report").mkdir(parents=True)
        (runs[-1] / "report" / "predictions.tsv").write_text("index\ttrue\tpredicted\tconfidence\n" + "\n".join(rows))
        (runs[-1] / "report" / "report.txt").write_text("accuracy\n")
        (runs[-1] / "report" / "report.json").write_text('{"scores": {}}')
        (runs[-1] / "config.yaml").write_text("task: sequence_classification\n")
    found = api.compare(*runs)["scores"]["accuracy"]
    assert (found["right_in_second_alone"], found["real"]) == (6, True)
    with pytest.raises(UserError, match="metric: 'f1' is not allowed; choose one of accuracy"):
        api.compare(*runs, metric="f1")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "seed-1.json").write_text('{"code": 2}')
    with pytest.raises(UserError, match="options: a run refused them, in the line that it printed; correct them"):
        api.seeds({**task, "output": tmp_path / "bad"}, count=1, launcher=launcher)
    with pytest.raises(UserError, match="folds: 1 is not allowed; give a whole number of at least 2"):
        api.seeds({**task, "output": tmp_path / "folds"}, folds=1)
