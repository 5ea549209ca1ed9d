"""`zerobert search --lr-finder`: the run it makes, when it ends it, and what it reads off the curve."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.errors import UserError
from launch.search.command import main
from launch.search.finder import explodes, read, smooth
from launch.search.running import points
from tests.conftest import ROOT
from tests.launch.suite.real import write_real_suite
from tests.train.runs import environment

STAND_IN = f"{sys.executable} {Path(__file__).with_name('rates_stand_in.py')}"
TRAINING = ["--task=sequence_classification", "--model.init_from=bert", "--labelled.train=train.tsv"]


def find(folder: Path, *own: str, training: tuple[str, ...] = ()) -> int:
    return main(["--lr-finder", *own, f"--launcher={STAND_IN}", "--", *TRAINING, f"--output={folder}", *training])


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "lr_finder" / "report.json").read_text())
    return found


def test_the_run_is_ended_when_its_loss_explodes_and_a_rate_is_suggested(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    given = ("--train.epochs=3", "--optim.schedule=wsd", "--optim.decay", "0.5", "--optim.warmup=0.3", "--seed=4")
    assert find(tmp_path, training=given) == 0
    assert time.monotonic() - start < 50, "the stand-in waits a minute to be ended"
    found = report(tmp_path)
    options = json.loads((tmp_path / "lr_finder" / "run" / "options.json").read_text())
    assert (options["optim.warmup"], options["train.steps"], options["seed"]) == ("0", "200", "4")
    assert "optim.decay" not in options
    assert "train.epochs" not in options
    assert found["rates"] == [rate for _, rate in points(tmp_path / "lr_finder" / "run", "train/learning_rate")]
    assert found["rates"][0] == pytest.approx(1e-7, rel=1e-3)
    ratios = np.divide(found["rates"][1:], found["rates"][:-1])
    assert ratios == pytest.approx(np.full(len(ratios), 1e7 ** (1 / 200)), rel=1e-4)
    assert -3.5 < np.log10(found["lowest"]) < -2.9  # the loss is flat before 1e-3, and steep behind it
    assert found["suggestion"] == pytest.approx(found["lowest"] / 10)
    assert 1e-7 < found["steepest"] < found["lowest"]
    assert found["ended"].startswith("the loss exploded at a rate of 0.")
    assert len(found["losses"]) == len(found["smoothed"]) == len(found["rates"]) < 200
    assert (tmp_path / "lr_finder" / "lr_finder.png").read_bytes().startswith(b"\x89PNG")
    assert "suggested --optim.learning_rate" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^output: .*lr_finder holds a range test already; remove it, or give another"):
        find(tmp_path)


def test_a_range_of_ones_own_ends_before_the_lowest_loss(tmp_path: Path) -> None:
    assert find(tmp_path, "--lr-range", "1e-6", "1e-4", "--lr-steps=50") == 0
    found = report(tmp_path)
    assert (found["rates"][0], len(found["rates"])) == (pytest.approx(1e-6, rel=1e-3), 50)
    assert found["ended"] == "after 50 steps"
    assert found["notes"] == ["the loss was lowest at the end of the range; raise the highest rate of --lr-range"]


def test_no_rate_is_suggested_where_the_loss_does_not_fall(tmp_path: Path) -> None:
    assert find(tmp_path, training=("--seed=14",)) == 0
    found = report(tmp_path)
    assert found["suggestion"] is None
    assert found["notes"] == [
        "the loss has not clearly fallen at any rate, so no rate is suggested; take more --lr-steps"
    ]


def test_a_run_that_stops_at_nan_is_read_up_to_there(tmp_path: Path) -> None:
    assert find(tmp_path, training=("--seed=15",)) == 0
    assert report(tmp_path)["ended"] == "the run stopped: error: loss: nan at step 3 is not finite"
    assert -4.5 < np.log10(report(tmp_path)["suggestion"]) < -3.9


def test_what_the_run_refuses_is_the_users_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^labelled.train: no such file$"):
        find(tmp_path, training=("--seed=13",))
    assert not list(tmp_path.rglob("lr_finder")), "so the same command does it once that is mended"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr-finder", "--lr-range", "1", "1e-3", "--", *TRAINING], "lr-range: 1 0.001 is not allowed; give the low"),
        (["--lr-finder", "--lr-range", "0", "1", "--", *TRAINING], "lr-range: 0 1 is not allowed; give the lowest"),
        (["--lr-finder", "--lr-range", "1", "x", "--", *TRAINING], 'Parser key "lr_range" element 2: Expected'),
        (["--lr-finder", "--lr-steps=5", "--", *TRAINING], "lr-steps: 5 is not allowed; give at least 20"),
        (["--lr-finder", "--trials=5", "--", *TRAINING], "trials: it has no meaning in --lr-finder, which is a single"),
        (["--lr-finder", "--space", "s.yaml", "--", *TRAINING], "space: it has no meaning in --lr-finder"),
        (["--space=s.yaml", "--lr-steps=50", "--", *TRAINING], "lr-steps: it has no meaning in a search; give --lr-f"),
        (["--lr-finder", "--", *TRAINING, "--train.step=1"], "train.step: no such field; did you mean train.steps?"),
        (["--lr-finder"], "training: its options are missing; give them after --"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_smoothing_moves_no_minimum() -> None:
    values = np.abs(np.arange(-60.0, 60.0))
    means, share = smooth(values, 4.0)
    assert int(means.argmin()) == 60
    assert smooth(np.ones(30), 4.0)[0] == pytest.approx(np.ones(30))
    noise = np.random.default_rng(1).normal(size=4000)
    assert smooth(noise, 4.0)[0].var() == pytest.approx(share, rel=0.15)


def test_an_explosion_is_many_times_the_lowest_loss_or_no_number() -> None:
    assert not explodes([8.0] * 19)
    assert not explodes([1.0] * 30 + [3.9] * 5)
    assert explodes([1.0] * 30 + [4.1] * 5)
    assert explodes([1.0] * 30 + [float("nan")])


def test_losses_that_are_no_numbers_are_left_out() -> None:
    rates = np.geomspace(1e-6, 1e-2, 40)
    losses = [*np.linspace(2.0, 1.0, 38).tolist(), float("inf"), float("nan")]
    found = read(rates.tolist(), losses, "the loss exploded", 40)
    assert len(found.losses) == 38
    assert json.dumps(found.suggestion) != "NaN"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_run_grows_its_rate_on_two_ranks_and_its_losses_are_read(store: Path, tmp_path: Path) -> None:
    path = write_real_suite(tmp_path, store, tasks=1, steps=40)
    launcher = f"{Path(sys.executable).parent / 'deepspeed'} --num_accelerators 2 --master_port {{port}}"
    training = [
        "--task=sequence_classification", f"--model.init_from={path.parent / 'bert'}", "--labelled.max_length=16",
        f"--labelled.train={path.parent / 'train.jsonl'}", "--train.global_batch=16", f"--output={tmp_path / 'out'}",
    ]  # fmt: skip
    own = ["--lr-finder", "--lr-range", "1e-5", "1", "--lr-steps=60", f"--launcher={launcher}"]
    command = [sys.executable, "-m", "launch", "search", *own, "--", *training]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = report(tmp_path / "out")
    assert found["rates"] == pytest.approx([1e-5 ** (1 - step / 60) for step in range(len(found["rates"]))], rel=1e-4)
    assert 1e-4 < found["lowest"] < 1.0
    assert found["suggestion"] == pytest.approx(found["lowest"] / 10)
