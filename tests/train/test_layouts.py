"""The same run on every layout gives the same losses: ranks, ZeRO stages, accumulation."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.curves import Curve
from tests.train.runs import NO_DROPOUT, losses, run

STEPS = 30
BOUND = 1e-4
#: half a percent is what rounding weights to 8 bits of mantissa may move a loss by in 30 steps
BF16_BOUND = 5e-3
EVERY = [
    (ranks, stage, accumulation)
    for ranks, stage in [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]
    for accumulation in (1, 2, 4)
]
FAST = {(2, 0, 1), (2, 1, 2), (2, 2, 4), (2, 3, 2)}


@pytest.fixture(scope="module")
def reference(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """One process, stage 0, no accumulation."""
    return train(store, tmp_path_factory.mktemp("reference"), 1, 0, 1)


def train(store: Path, output: Path, ranks: int, stage: int, accumulation: int, *more: str) -> Curve:
    options = [
        f"--data.path={store}",
        f"--train.steps={STEPS}",
        f"--train.zero_stage={stage}",
        f"--train.micro_batch={16 // ranks // accumulation}",
        "--train.save_interval=null",
    ]
    run(output, *options, *NO_DROPOUT, *more, ranks=ranks)
    return losses(output)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stage", "accumulation"),
    [
        pytest.param(*layout, marks=() if layout in FAST else pytest.mark.slow)
        for layout in EVERY
        if layout != (1, 0, 1)
    ],
)
def test_losses_do_not_depend_on_the_layout(
    store: Path, tmp_path: Path, reference: Curve, ranks: int, stage: int, accumulation: int
) -> None:
    curve = train(store, tmp_path, ranks, stage, accumulation)
    assert [step for step, _ in curve] == list(range(1, STEPS + 1))
    worst = largest_difference(curve, reference)
    print(f"{ranks} rank(s), ZeRO-{stage}, accumulation {accumulation}: largest relative difference {worst:.1e}")
    assert worst < BOUND
    assert curve[-1][1] < curve[0][1] - 0.2, "the run learns"


@pytest.mark.slow
def test_activation_checkpointing_changes_no_loss(store: Path, tmp_path: Path, reference: Curve) -> None:
    curve = train(store, tmp_path, 2, 3, 1, "--model.activation_checkpointing=true")
    assert largest_difference(curve, reference) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_bf16_stays_close_to_fp32_at_every_stage(store: Path, tmp_path: Path, reference: Curve, stage: int) -> None:
    curve = train(store, tmp_path, 2, stage, 2, "--train.precision=bf16")
    worst = largest_difference(curve, reference)
    print(f"bf16, ZeRO-{stage}: largest relative difference to fp32 {worst:.1e}")
    assert worst < BF16_BOUND


def largest_difference(curve: Curve, truth: Curve) -> float:
    """The largest relative difference of two curves with the same steps."""
    return max(abs(ours - theirs) / theirs for (_, ours), (_, theirs) in zip(curve, truth, strict=True))
