"""Runs in a folder that holds the records of earlier starts: no curve mixes them, and nothing is lost."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from engine.config import MonitorConfig, RunConfig
from engine.errors import UserError
from engine.train.curves.csv_files import cut_back
from engine.train.curves.monitor import Monitor
from engine.train.earlier import set_aside
from tests.single_rank import single_rank
from tests.train.runs import free_port, losses, run


def rows(folder: Path, name: str = "train_loss") -> list[list[str]]:
    with (folder / "csv" / f"{name}.csv").open() as file:
        return list(csv.reader(file))


def steps(folder: Path, name: str = "train_loss") -> list[int]:
    """The steps of a CSV file with one header."""
    return [int(step) for step, _ in rows(folder, name)[1:]]


@pytest.fixture(scope="module")
def twice(store: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which a run of 4 steps was followed by another of 3, neither with checkpoints."""
    output = tmp_path_factory.mktemp("runs") / "twice"
    options = [f"--data.path={store}", "--train.save_interval=null", "--monitor.csv=true"]
    run(output, *options, "--train.steps=4", "--seed=1")
    return output, run(output, *options, "--train.steps=3", "--seed=2", "--resume=auto")


def test_a_fresh_start_has_its_curves_alone(twice: tuple[Path, str]) -> None:
    output, _ = twice
    for tag in ("train/loss", "eval/loss"):
        assert [step for step, _ in losses(output, tag)] == ([1, 2, 3] if tag == "train/loss" else [3])
    assert steps(output) == [1, 2, 3]
    assert steps(output, "eval_loss") == [3]


def test_the_earlier_run_is_whole_where_the_user_is_told(twice: tuple[Path, str]) -> None:
    output, printed = twice
    earlier = output / "earlier-1"
    assert [line for line in printed.splitlines() if "earlier run" in line] == [
        f"moved what an earlier run recorded here to {earlier}"
    ]
    assert [step for step, _ in losses(earlier)] == [1, 2, 3, 4]
    assert steps(earlier) == [1, 2, 3, 4]
    assert {"config.yaml", "verify_update.csv"} <= {path.name for path in earlier.iterdir()}
    assert "seed: 1\n" in (earlier / "config.yaml").read_text()
    assert "seed: 2\n" in (output / "config.yaml").read_text()


@pytest.mark.slow
def test_a_checkpoint_of_another_folder_continues_no_curve_of_this_one(
    store: Path, twice: tuple[Path, str], tmp_path: Path
) -> None:
    options = [f"--data.path={store}", "--monitor.csv=true"]
    run(tmp_path / "saved", *options, "--train.steps=2")
    run(tmp_path / "here", *options, "--train.steps=4", "--train.save_interval=null")
    checkpoint = tmp_path / "saved" / "checkpoints" / "step-000002"
    printed = run(tmp_path / "here", *options, "--train.steps=4", f"--resume={checkpoint}")
    assert "moved what an earlier run recorded here" in printed
    assert [step for step, _ in losses(tmp_path / "here")] == steps(tmp_path / "here") == [3, 4]
    assert steps(tmp_path / "here" / "earlier-1") == [1, 2, 3, 4]


def test_folders_of_earlier_runs_are_numbered_and_never_written_over(tmp_path: Path) -> None:
    assert set_aside(tmp_path) is None
    for number in (1, 2, 3):
        (tmp_path / "csv").mkdir()
        (tmp_path / "csv" / "train_loss.csv").write_text(f"step,loss\n{number},1.0\n")
        (tmp_path / "faults.jsonl").write_text("{}\n")
        assert set_aside(tmp_path) == tmp_path / f"earlier-{number}"
    for number in (1, 2, 3):
        assert rows(tmp_path / f"earlier-{number}") == [["step", "loss"], [str(number), "1.0"]]
        assert (tmp_path / f"earlier-{number}" / "faults.jsonl").is_file()


def test_what_can_not_be_set_aside_is_refused_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorboard").mkdir()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError, match=r"^output: records of an earlier run .*\(Permission denied\).*--output$"):
        set_aside(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]


def write_a_restarted_run(folder: Path, *, tensorboard: bool) -> None:
    """A run that died after step 4 goes on from step 2, is done at step 3, and is started once more."""
    config = RunConfig(output=str(folder), monitor=MonitorConfig(csv=True, tensorboard=tensorboard))
    died = Monitor(config, 0)
    for step in (1, 2, 3, 4):
        died.scalars({"train/loss": 10.0 + step}, step)
    died.scalars({"eval/loss": 10.5}, 4)
    died.close()
    resumed = Monitor(config, 2)
    resumed.scalars({"train/loss": 20.1}, 3)
    resumed.scalars({"eval/loss": 0.1, "eval/accuracy": 0.5}, 3)
    resumed.end(3)
    again = Monitor(config, 3)
    again.scalars({"eval/loss": 0.1, "eval/accuracy": 0.75}, 3)
    again.end(3)


@pytest.mark.slow
@pytest.mark.parametrize("tensorboard", [True, False])
def test_a_resume_from_before_the_last_point_writes_none_twice(tmp_path: Path, tensorboard: bool) -> None:
    with single_rank(free_port()) as rank:
        rank.apply(write_a_restarted_run, (tmp_path,), {"tensorboard": tensorboard})
    assert rows(tmp_path) == [["step", "loss"], ["1", "11.0"], ["2", "12.0"], ["3", "20.1"]]
    assert rows(tmp_path, "eval_loss") == [["step", "loss"], ["3", "0.1"]]
    if tensorboard:
        assert losses(tmp_path) == [(1, 11.0), (2, 12.0), (3, pytest.approx(20.1))]
        assert losses(tmp_path, "eval/loss") == [(3, pytest.approx(0.1))]


@pytest.mark.slow
def test_a_score_that_differs_from_the_one_there_is_not_hidden(tmp_path: Path) -> None:
    with single_rank(free_port()) as rank:
        rank.apply(write_a_restarted_run, (tmp_path,), {"tensorboard": True})
    assert [value for _, value in losses(tmp_path, "eval/accuracy")] == [0.5, 0.75]


@pytest.mark.parametrize(
    ("text", "step", "left"),
    [
        ("step,loss\r\n1,5.0\r\n2,4.0\r\n3,3.0\r\n", 2, "step,loss\r\n1,5.0\r\n2,4.0\r\n"),
        ("step,loss\n1,5.0\nstep,loss\n2,4.0\n", 9, "step,loss\r\n1,5.0\r\n2,4.0\r\n"),
        ("step,loss\n1,5.0\n2,4.", 9, "step,loss\r\n1,5.0\r\n"),
        ("step,loss\n1,5.0\n2,nan\n", 9, "step,loss\r\n1,5.0\r\n2,nan\r\n"),
    ],
    ids=["later points", "a second header", "a line cut off", "not a number"],
)
def test_a_csv_file_is_cut_back_to_a_step(tmp_path: Path, text: str, step: int, left: str) -> None:
    path = tmp_path / "train_loss.csv"
    path.write_bytes(text.encode())
    kept = cut_back(path, step)
    assert path.read_bytes().decode() == left
    assert kept == [line.split(",") for line in left.splitlines()]


def test_an_empty_csv_file_gets_its_header(tmp_path: Path) -> None:
    path = tmp_path / "train_loss.csv"
    path.write_text("")
    cut_back(path, 3)
    assert path.read_bytes() == b"step,train_loss\r\n"
