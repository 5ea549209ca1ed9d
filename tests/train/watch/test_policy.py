"""Losses and gradients that are no numbers, and spikes: the update is left out exactly, or the run goes back."""

from __future__ import annotations

import json
import math
import shutil
from itertools import product
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import pytest

from engine.config import FaultConfig, RunConfig
from engine.errors import UserError
from engine.train.watch.faults import SpikeDetector, found_late, read_faults
from tests.train.runs import NO_DROPOUT, execute, losses
from tests.train.watch.policy_worker import CASES, left_out, trained


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("check_interval", 0),
        ("hang_timeout", 0.0),
        ("hang_timeout", math.inf),
        ("slow_rank_factor", 1.0),
        ("slow_rank_factor", math.nan),
        ("non_finite", "ignore"),
        ("spike", "stop"),
        ("spike_factor", 1.0),
        ("spike_factor", math.inf),
        ("spike_window", 0),
        ("max_faults", 0),
        ("max_restarts", 0),
        ("max_stalled_restarts", 0),
    ],
)
def test_a_bad_value_names_its_field_and_value(field: str, value: object) -> None:
    config = RunConfig()
    setattr(config.fault, field, value)
    with pytest.raises(UserError, match=rf"^fault\.{field}: ") as caught:
        config.validate()
    assert repr(value) in str(caught.value)


def test_every_loss_is_looked_at_only_where_a_policy_needs_it() -> None:
    assert not FaultConfig().judges_updates
    assert FaultConfig(non_finite="skip").judges_updates
    assert FaultConfig(spike="rollback").judges_updates


def test_a_spike_is_far_above_the_median_of_the_last_losses() -> None:
    detector = SpikeDetector(2.0, window=10)
    for step in range(9):
        detector.add(step, 100.0)
    assert not detector.is_spike(1e9)
    for step in range(9, 20):
        detector.add(step, 1.0)
    assert detector.is_spike(2.1)
    assert not detector.is_spike(2.0)
    detector.go_back(12)
    assert not detector.is_spike(2.1)


def test_single_high_losses_leave_the_median_where_it_is() -> None:
    detector = SpikeDetector(2.0, window=10)
    for step, loss in enumerate([1.0, 50.0, 1.0, 50.0, 1.0, 50.0, 1.0, 50.0, 1.0, 1.0]):
        detector.add(step, loss)
    assert detector.is_spike(2.1)
    assert not detector.is_spike(1.9)


def test_a_fault_that_only_a_point_shows_is_told_with_its_step() -> None:
    assert found_late(7, 2.0, 1.0) is None
    assert found_late(7, 2.0, None) is None
    assert "the loss became nan by step 7" in str(found_late(7, math.nan, 1.0))
    for norm in (math.inf, -1.0):
        assert "the gradient became infinite or NaN by step 7" in str(found_late(7, 2.0, norm))


def check(found: dict[str, Any], kind: str, faulty: int = 3) -> None:
    assert found["faults"] == [f"skip {kind} {faulty}"]
    assert found["nothing changed"]
    assert found["as without it"]
    assert found["skipped"] == 1
    assert [tuple(one) for one in found["recorded"]] == [(faulty, kind, "skip", faulty)]


LAYOUTS = list(product((0, 1, 2, 3), ("fp32", "bf16")))


@pytest.mark.parametrize("kind", ["loss", "gradient", pytest.param("spike", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("stage", "precision"), LAYOUTS)
def test_a_skipped_update_changes_no_bit(one_rank: Pool, stage: int, precision: str, kind: str) -> None:
    check(one_rank.apply(left_out, (stage, precision, "lamb" if stage % 2 else "adamw", kind)), kind)


@pytest.mark.parametrize(
    ("stage", "precision"),
    [layout if layout == (1, "bf16") else pytest.param(*layout, marks=pytest.mark.slow) for layout in LAYOUTS],
)
def test_so_does_one_of_the_first_step_and_of_another_optimizer(one_rank: Pool, stage: int, precision: str) -> None:
    check(one_rank.apply(left_out, (stage, precision, "torch", "loss", 1)), "loss", 1)


def test_so_do_updates_of_two_ranks(tmp_path: Path) -> None:
    done = execute("tests/train/watch/policy_worker.py", str(tmp_path))
    assert done.returncode == 0, done.stdout
    for rank in range(2):
        for case, found in zip(CASES, json.loads((tmp_path / f"{rank}.json").read_text()), strict=True):
            check(found, case[3])


def options(store: Path, *more: str) -> list[str]:
    return [f"--data.path={store}", "--train.steps=6", "--train.save_interval=2", *more]


def test_stop_names_the_step(one_rank: Pool, store: Path, tmp_path: Path) -> None:
    ended = one_rank.apply(trained, (tmp_path, options(store, "--train.log_interval=4"), {3: math.nan}))
    assert ended.startswith("the loss became nan in step 3; ")
    assert json.loads((tmp_path / "heartbeat.json").read_text())["state"] == "failed"


def test_skip_goes_on_with_the_next_batch(one_rank: Pool, store: Path, tmp_path: Path) -> None:
    assert one_rank.apply(trained, (tmp_path, options(store, "--fault.non_finite=skip"), {3: math.nan})) == "done"
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 4, 5, 6]
    (found,) = read_faults(tmp_path / "faults.jsonl")
    assert (found["step"], found["cursor"]["consumed"], found["kind"], found["value"]) == (3, 32, "loss", "nan")


def test_rollback_goes_on_as_if_the_batch_had_not_been_there(one_rank: Pool, store: Path, tmp_path: Path) -> None:
    back, plain = tmp_path / "back", tmp_path / "plain"
    wanted = options(store, "--fault.non_finite=rollback", "--resume=auto")
    assert one_rank.apply(trained, (back, wanted, {4: math.nan})) == "done"
    (found,) = read_faults(back / "faults.jsonl")
    assert (found["step"], found["cursor"]["consumed"], found["action"]) == (4, 48, "rollback")
    assert one_rank.apply(trained, (plain, wanted, {}, 2)) == "stopped"
    shutil.copy(back / "faults.jsonl", plain)  # a start after a crash knows it from there
    assert one_rank.apply(trained, (plain, wanted, {4: math.nan})) == "done"
    assert [step for step, _ in losses(back)] == [1, 2, 3, 4, 5, 6]
    assert losses(back) == losses(plain)
    assert len(list(read_faults(plain / "faults.jsonl"))) == 1


@pytest.mark.slow
def test_a_rollback_leaves_out_all_micro_batches_of_the_global_batch_and_no_other(
    one_rank: Pool, store: Path, tmp_path: Path
) -> None:
    """With a rate that doesn't depend on the step, and no dropout, a skipped update is the same run one step longer."""
    constant = [*NO_DROPOUT, "--optim.schedule=constant", "--optim.warmup=0", "--train.micro_batch=4"]
    for policy, steps in (("rollback", 6), ("skip", 7)):
        judged = [f"--fault.non_finite={policy}", f"--fault.spike={policy}"]
        wanted = options(store, *constant, *judged, f"--train.steps={steps}")
        assert one_rank.apply(trained, (tmp_path / policy, wanted, {4: math.nan})) == "done"
    coarse = options(store, *constant, "--fault.non_finite=rollback", "--train.log_interval=2")
    assert one_rank.apply(trained, (tmp_path / "coarse", coarse, {4: math.nan})) == "done"
    back, skipped = losses(tmp_path / "rollback"), losses(tmp_path / "skip")
    assert [step for step, _ in back] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in skipped] == [1, 2, 3, 5, 6, 7]
    assert [loss for _, loss in back] == [loss for _, loss in skipped]
    kept = json.loads((tmp_path / "rollback" / "recent_losses.json").read_text())
    assert [step for step, _ in kept] == [1, 2, 3, 4, 5, 6]
    means = [(step, (before + loss) / 2) for (_, before), (step, loss) in zip(back[::2], back[1::2], strict=True)]
    assert losses(tmp_path / "coarse") == [(step, pytest.approx(mean, rel=1e-6)) for step, mean in means]


def test_the_loss_of_all_micro_batches_is_judged(one_rank: Pool, store: Path, tmp_path: Path) -> None:
    wanted = options(store, "--fault.spike=skip", "--fault.spike_window=3", "--train.micro_batch=4")
    assert one_rank.apply(trained, (tmp_path, wanted, {5: 3.0})) == "done"
    (found,) = read_faults(tmp_path / "faults.jsonl")
    usual = losses(tmp_path)[3][1]
    assert (found["step"], found["kind"]) == (5, "spike")
    assert found["value"] == pytest.approx(3 * usual, rel=0.05)


def test_a_spike_rolls_back_too_and_a_resume_judges_by_the_same_median(
    one_rank: Pool, store: Path, tmp_path: Path
) -> None:
    wanted = options(store, "--fault.spike=rollback", "--fault.spike_window=3", "--resume=auto")
    assert one_rank.apply(trained, (tmp_path, wanted, {5: 3.0}, 4)) == "stopped"
    assert len(json.loads((tmp_path / "recent_losses.json").read_text())) == 4
    assert one_rank.apply(trained, (tmp_path, wanted, {5: 3.0})) == "done"
    (found,) = read_faults(tmp_path / "faults.jsonl")
    assert (found["step"], found["kind"], found["action"]) == (5, "spike", "rollback")
    assert 20 < found["value"] < 25
    assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_run_gives_up_after_too_many_faults_and_without_a_checkpoint(
    one_rank: Pool, store: Path, tmp_path: Path
) -> None:
    bad = dict.fromkeys(range(3, 7), math.nan)
    wanted = options(store, "--fault.non_finite=skip", "--fault.max_faults=2")
    ended = one_rank.apply(trained, (tmp_path / "many", wanted, bad))
    assert ended == "the loss became nan in step 5, fault number 3 of this start; fault.max_faults is reached"
    ended = one_rank.apply(trained, (tmp_path / "first", options(store, "--fault.non_finite=rollback"), {1: math.nan}))
    assert ended.endswith("and there is no checkpoint to roll back to; set train.save_interval")


def test_a_damaged_list_of_losses_is_one_line(one_rank: Pool, store: Path, tmp_path: Path) -> None:
    wanted = options(store, "--fault.spike=skip", "--resume=auto")
    assert one_rank.apply(trained, (tmp_path, wanted, {}, 2)) == "stopped"
    (tmp_path / "recent_losses.json").write_text("[[1")
    with pytest.raises(UserError, match=r"recent_losses\.json is damaged .* delete it"):
        one_rank.apply(trained, (tmp_path, wanted, {}))
