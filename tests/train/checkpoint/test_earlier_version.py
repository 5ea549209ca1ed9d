"""What an earlier version wrote goes on: its store, its recipe and its checkpoint give the losses that it had."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest

from tests.train.runs import SCRIPT, environment, losses
from tests.warm import SERVER

EARLIER = Path(__file__).parent / "version_4"
LOSSES = [(int(step), float(loss)) for step, loss in list(csv.reader((EARLIER / "losses.csv").open()))[1:]]


def trained(output: Path, *options: str) -> list[tuple[int, float]]:
    """The losses of a run from the recipe of before."""
    data = [f"--config={EARLIER / 'config.yaml'}", f"--data.path={EARLIER / 'store'}", f"--output={output}"]
    arguments = [SCRIPT, *data, "--monitor.tensorboard=true", "--train.save_interval=null", *options]
    done = SERVER.run(arguments, [environment()], output.parent, joined=True)
    assert done.returncode == 0, done.stdout
    return list(losses(output))


def test_its_checkpoint_goes_on(tmp_path: Path) -> None:
    """Equal up to the rounding of another machine's instructions; on the machine that made it, to the last bit."""
    shutil.copytree(EARLIER / "step-000004", tmp_path / "step-000004")
    curve = trained(tmp_path / "run", f"--resume={tmp_path / 'step-000004'}")
    assert [step for step, _ in curve] == [5, 6, 7, 8]
    assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in LOSSES[4:]], rel=1e-5)


def test_its_recipe_gives_the_same_run(tmp_path: Path) -> None:
    curve = trained(tmp_path / "run")
    assert [step for step, _ in curve] == list(range(1, 9))
    assert [loss for _, loss in curve] == pytest.approx([loss for _, loss in LOSSES], rel=1e-5)
