"""The parts of `benchmarks.neighbour` that judge; none is timed here."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import neighbour
from benchmarks.neighbour import PLACES, Step, Turn, missed, parse_step, rate, table, undisturbed
from launch.configure.options import parse as parse_training
from tests.conftest import ROOT


def rates(**changed: list[float]) -> dict[str, dict[str, list[float]]]:
    """Speeds of before and after; `alone` and `beside` are those of after."""
    found = {place: {"before": [100.0, 101.0, 99.0], "after": [100.0, 101.0, 99.0]} for place in PLACES}
    for place, speeds in changed.items():
        found[place]["after"] = speeds
    return found


def test_a_step_is_read_from_its_line() -> None:
    line = "step 12/900  loss 1.2345  lr 1.00e-04  tokens/s 1,234  left 0:10\n"
    assert parse_step(line, 3.0) == Step(3.0, 1234.0)
    assert parse_step("evaluation at step 12: loss 3", 3.0) is None


def test_a_rate_weighs_steps_by_their_time() -> None:
    assert rate([Step(0.0, 7.0), Step(1.0, 100.0), Step(4.0, 20.0)]) == pytest.approx(160 / 4)
    assert rate([Step(0.0, 7.0)]) == 0


def test_disturbed_turns_are_left_out_while_enough_remain() -> None:
    turns = [Turn(1.0, 0.0), Turn(2.0, 0.9), Turn(3.0, 0.05), Turn(4.0, 0.1), Turn(5.0, 0.3)]
    assert sorted(undisturbed(turns)) == [1, 3, 4]
    assert sorted(undisturbed(turns[1:])) == [3, 4, 5]


def test_goals_are_missed_by_more_than_the_figures_are_uncertain() -> None:
    assert missed(rates()) == []
    assert missed(rates(alone=[98.5, 98.0, 99.0])) == []
    assert len(missed(rates(alone=[90.0, 90.5, 89.5]))) == 1
    assert missed(rates(alone=[70.0, 90.0, 120.0])) == []
    assert missed(rates(beside=[60.0, 61.0, 59.0])) == []
    assert len(missed(rates(beside=[40.0, 41.0, 39.0]))) == 1
    assert len(missed(rates(beside=[0.0, 0.0, 0.0]))) == 1


def test_the_table_compares_with_before_and_with_alone() -> None:
    row = table(rates(beside=[50.0, 51.0, 49.0]))["after"]
    assert (row["alone, × before"], row["beside, × before"], row["beside / alone"]) == (1, 0.5, 0.5)


@pytest.mark.parametrize("layout", neighbour.LAYOUTS)
def test_every_layout_is_a_valid_run(layout: tuple[int, int], tmp_path: Path) -> None:
    command = neighbour.training(layout, tmp_path, tmp_path / "train.jsonl", tmp_path / "run", "fp32")
    config = parse_training(command[command.index(str(ROOT / "launch" / "train.py")) + 1 :])
    assert config.train.threads == layout[1]
    assert config.fault.hang_timeout is None
    assert ("torch.distributed.run" in command) == (layout[0] > 1)


def test_a_rival_gets_no_other_variable_of_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("KMP_BLOCKTIME", "1")
    found = neighbour.environment(2, neighbour.RIVALS["after"])
    assert [name for name in found if name.startswith(("OMP_", "GOMP_", "KMP_"))] == ["OMP_NUM_THREADS"]
    assert neighbour.environment(2, neighbour.RIVALS["before"])["GOMP_SPINCOUNT"] == "300000"


@pytest.mark.parametrize("wrong", [["--rounds=0"], ["--rivals", "passive"]])
def test_wrong_options_are_refused(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        neighbour.parse(wrong)
    assert caught.value.code == 2


def test_a_look_is_short() -> None:
    given = neighbour.parse(["--quick"])
    assert (given.rounds, given.rivals) == (1, ["before", "after"])
