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
