"""The same run on every layout gives the same losses: ranks, ZeRO stages, accumulation."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.curves import Curve
from tests.train.runs import NO_DROPOUT, losses, run

STEPS = 30
BOUND = 1e-4
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


def train(store: Path, output: Path, ranks: int, stage: int, accumulation: int) -> Curve:
    options = [
        f"--data.path={store}",
        f"--train.steps={STEPS}",
        f"--train.zero_stage={stage}",
        f"--train.micro_batch={16 // ranks // accumulation}",
        "--train.save_interval=null",
    ]
    run(output, *options, *NO_DROPOUT, launcher="python" if ranks == 1 else "deepspeed", ranks=ranks)
    return losses(output)


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
    worst = max(abs(ours - truth) / truth for (_, ours), (_, truth) in zip(curve, reference, strict=True))
    print(f"{ranks} rank(s), ZeRO-{stage}, accumulation {accumulation}: largest relative difference {worst:.1e}")
    assert worst < BOUND
    assert curve[-1][1] < curve[0][1] - 0.2, "the run learns"
