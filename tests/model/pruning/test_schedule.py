"""How much is kept when, and which units."""

from __future__ import annotations

import pytest
import torch

from engine.config import AdapterConfig, PruneConfig, RegulariseConfig
from engine.errors import UserError
from engine.model.pruning.schedule import Schedule, kept_units


def test_the_schedule_is_cubic_and_ends_where_it_should() -> None:
    schedule = Schedule.of(PruneConfig(heads=0.5, begin=0.1, end=0.7, interval=10), 100)
    shares = {step: schedule.share(step, 0.5) for step in range(1, 101)}
    told = {step: share for step, share in shares.items() if share is not None}
    assert list(told) == [20, 30, 40, 50, 60, 70]
    assert told[40] == pytest.approx(0.5 + 0.5 * 0.5**3)
    assert told[70] == 0.5
    assert sorted(told.values(), reverse=True) == list(told.values())


def test_an_interval_without_steps_is_refused() -> None:
    with pytest.raises(UserError, match=r"^prune.interval: 10 is not allowed; units go between steps 1"):
        Schedule.of(PruneConfig(heads=0.5), 12).check()


@pytest.mark.parametrize("even", [False, True])
def test_the_highest_scores_stay_and_what_went_does_not_return(even: bool) -> None:
    scores = [torch.tensor([5.0, 1.0, 4.0, 9.0]), torch.tensor([0.5, 0.4, 0.3, 0.2])]
    kept = [torch.tensor([True, True, True, False]), torch.ones(4, dtype=torch.bool)]
    found = kept_units(scores, kept, 0.5, even=even)
    if even:
        assert [each.tolist() for each in found] == [[True, False, True, False], [True, True, False, False]]
    else:
        assert [each.tolist() for each in found] == [[True, True, True, False], [True, False, False, False]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heads": 0.0}, "prune.heads: 0.0 is not allowed; give a share"),
        ({"neurons": 1.5}, "prune.neurons: 1.5 is not allowed"),
        ({"heads": 0.5, "begin": -0.1}, "prune.begin: -0.1 is not allowed"),
        ({"heads": 0.5, "end": 1.0}, "prune.end: 1.0 is not allowed"),
        ({"heads": 0.5, "begin": 0.8}, "prune.end: 0.7 is not allowed; give more than prune.begin"),
        ({"heads": 0.5, "interval": 0}, "prune.interval: 0 is not allowed"),
        ({"even": True}, "prune.even: True is not allowed; nothing is pruned"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        PruneConfig(**values).validate()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("beside", "field"),
    [
        ((AdapterConfig(method="lora"), RegulariseConfig(), None, "none"), "adapter.method"),
        ((AdapterConfig(), RegulariseConfig(ema=0.9), None, "none"), "regularise.ema"),
        ((AdapterConfig(), RegulariseConfig(start_decay=0.1), None, "none"), "regularise.start_decay"),
        ((AdapterConfig(), RegulariseConfig(), "layers:0", "none"), "train.freeze"),
        ((AdapterConfig(), RegulariseConfig(), None, "nvme"), "zero.offload_optimizer"),
    ],
)
def test_other_methods_that_do_not_go_with_it_are_refused(beside: tuple, field: str) -> None:  # type: ignore[type-arg]
    PruneConfig().check_beside(*beside)
    with pytest.raises(UserError, match=rf"^{field}: .*leave it or the section prune out"):
        PruneConfig(heads=0.5).check_beside(*beside)
