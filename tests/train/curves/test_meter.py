"""Averages of a point are right over micro-batches and steps."""

from __future__ import annotations

import json

import pytest
import torch

from engine.train.curves.meter import Meter


def test_shares_add_up_in_a_step_and_average_over_steps() -> None:
    meter = Meter(torch.device("cpu"))
    for step in ([1.0, 2.0], [3.0, 6.0]):
        for share in step:
            meter.add({"loss": torch.tensor(share)}, tokens=5)
        meter.end_step()
    point = meter.point()
    assert point["loss"] == (1 + 2 + 3 + 6) / 2
    assert point["tokens_per_second"] == pytest.approx(20 / (2 * point["step_time"]))


def test_a_point_starts_the_next_one_from_zero() -> None:
    meter = Meter(torch.device("cpu"))
    for value in (4.0, 2.0):
        meter.add({"loss": torch.tensor(value)}, tokens=1)
        meter.end_step()
        assert meter.point()["loss"] == value


def test_time_outside_training_is_no_step_time() -> None:
    meter = Meter(torch.device("cpu"))
    meter.add({"loss": torch.tensor(1.0)}, tokens=1)
    meter.end_step()
    meter.exclude(-10.0)
    assert meter.point()["step_time"] > 10.0


def add_steps(meter: Meter, values: list[float]) -> None:
    for value in values:
        meter.add({"loss": torch.tensor(value, dtype=torch.float64), "accuracy": torch.tensor(value / 7)}, tokens=3)
        meter.end_step()


VALUES = [0.1, 1 / 3, 2.7, 1e-9, 4.4]


def test_a_point_goes_on_from_a_checkpoint_bit_for_bit() -> None:
    undisturbed, before, after = (Meter(torch.device("cpu")) for _ in range(3))
    add_steps(undisturbed, VALUES)
    add_steps(before, VALUES[:3])
    after.restore(json.loads(json.dumps(before.state())))
    add_steps(after, VALUES[3:])
    assert (after.steps, after.timed_steps) == (5, 2)
    expected, found = undisturbed.point(), after.point()
    assert (found["loss"], found["accuracy"]) == (expected["loss"], expected["accuracy"])


def test_the_throughput_of_such_a_point_is_that_of_the_steps_since() -> None:
    meter = Meter(torch.device("cpu"))
    meter.restore({"steps": 1000, "sums": [{"loss": 7000.0}]})
    for _ in range(2):
        meter.add({"loss": torch.tensor(0.0)}, tokens=5)
        meter.end_step()
    point = meter.point()
    assert point["loss"] == pytest.approx(7000 / 1002)
    assert point["tokens_per_second"] == pytest.approx(10 / (2 * point["step_time"]))


def test_a_point_of_steps_that_were_all_made_before_is_written_too() -> None:
    """As where a fault skips every update from a resume to the next point."""
    meter = Meter(torch.device("cpu"))
    meter.restore({"steps": 2, "sums": [{"loss": 5.0}]})
    point = meter.point()
    assert (point["loss"], point["tokens_per_second"]) == (2.5, 0.0)


def test_right_after_a_point_there_is_nothing_to_keep() -> None:
    meter = Meter(torch.device("cpu"))
    add_steps(meter, VALUES)
    meter.point()
    assert meter.state() == {}


def test_going_back_to_a_checkpoint_forgets_what_came_after_it() -> None:
    meter = Meter(torch.device("cpu"))
    add_steps(meter, VALUES[:2])
    saved = meter.state()
    add_steps(meter, VALUES[2:])
    meter.restore(saved)
    assert meter.point()["loss"] == (VALUES[0] + VALUES[1]) / 2


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_other_ranks_share_the_same_sums(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    state = {"steps": 3, "sums": [{"loss": 1.5}, {"loss": 4.0}]}
    found = []
    for rank in range(ranks):
        monkeypatch.setattr("engine.train.curves.meter.dist.place", lambda rank=rank: (rank, ranks))
        meter = Meter(torch.device("cpu"))
        meter.restore(state)
        found.append(meter.point()["loss"] * 3)
    assert sum(found) == pytest.approx(5.5)
    if ranks == 2:
        assert found == [1.5, 4.0]
