"""Every process group of a run waits as long as the run says, those that DeepSpeed makes for itself too."""

from __future__ import annotations

import json
from pathlib import Path

from tests.train.runs import execute


def test_no_group_keeps_a_default_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "seconds.json"
    done = execute("tests/train/ranks/groups_worker.py", "777", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads(file.read_text())
    assert all(len(seconds) > 1 for seconds in stages), "DeepSpeed makes groups of its own"
    assert {second for seconds in stages for second in seconds} == {777.0}
