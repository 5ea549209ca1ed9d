"""Averages of a point are right over micro-batches and steps."""

from __future__ import annotations

import pytest
import torch

from engine.train.meter import Meter


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
