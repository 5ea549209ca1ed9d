"""An optimizer that a test registers: certified, resumed and forecast, without a word of it in the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.pool import Pool
from pathlib import Path

import pytest
import torch

from engine.config import OPTIMIZERS, OptimConfig, Shape
from engine.errors import UserError
from launch.configure.options import parse
from launch.forecast.memory import Workload, forecast
from tests.optim.momentum import Momentum, changes
from tests.train.runs import NO_DROPOUT, SMALL, execute, losses


@pytest.fixture
def registered() -> Iterator[None]:
    OPTIMIZERS.register("momentum", Momentum())
    yield
    OPTIMIZERS.remove("momentum")


@pytest.mark.parametrize("stage", [0, 2])
def test_a_group_learns_at_its_own_rate(one_rank: Pool, tmp_path: Path, stage: int) -> None:
    """From the same gradients at the first step; the second one's differ a little, since the weights do."""
    half = one_rank.apply(changes, (tmp_path, stage, 0.5))
    whole = one_rank.apply(changes, (tmp_path, stage, 1.0))
    for name in half:
        if name != "position.weight":  # frozen
            expected = 0.5 if name in ("embedding.weight", "decoder.weight") else 1.0
            assert float(half[name].norm() / whole[name].norm()) == pytest.approx(expected, rel=0.02), name
    assert torch.equal(half["position.weight"], torch.zeros_like(half["position.weight"]))


def test_a_wrong_exact_rule_ends_the_run(one_rank: Pool, tmp_path: Path) -> None:
    said = one_rank.apply(changes, (tmp_path, 2, 0.5, 0.5))
    assert "the update of step 2 is wrong" in said
    assert "momentum_buffer" in said


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (3, 2)])
def test_a_run_goes_on_bit_for_bit(store: Path, tmp_path: Path, stage: int, ranks: int) -> None:
    options = [*SMALL, *NO_DROPOUT, f"--data.path={store}", "--optim.name=momentum", f"--train.zero_stage={stage}"]
    options += ["--train.steps=4", "--train.save_interval=2"]
    done = execute("tests/optim/momentum.py", *options, f"--output={tmp_path / 'whole'}", ranks=ranks)
    assert done.returncode == 0, done.stdout
    assert "update verified: step 1" in done.stdout
    resumed = f"--resume={tmp_path / 'whole' / 'checkpoints' / 'step-000002'}"
    again = execute("tests/optim/momentum.py", *options, resumed, f"--output={tmp_path / 'again'}", ranks=ranks)
    assert again.returncode == 0, again.stdout
    assert losses(tmp_path / "again") == losses(tmp_path / "whole")[2:]


def test_the_forecast_counts_its_states(registered: None) -> None:
    shape = Shape(768, 12, 12, 3072, 30522)
    work = Workload(shape, 128, 8, 2, 8, 8, "bf16")
    more = forecast(work).optimizer - forecast(replace(work, optimizer="momentum")).optimizer
    assert more == pytest.approx(4 * shape.parameters() / 8, rel=1e-3)


def test_what_it_does_not_read_is_refused(registered: None) -> None:
    assert parse(["--optim.name=momentum", "--optim.weight_decay=0.1"]).optim.name == "momentum"
    with pytest.raises(UserError, match=r"^optim\.eps: 0\.001 has no effect while optim\.name is momentum"):
        parse(["--optim.name=momentum", "--optim.eps=1e-3"])


def test_an_unknown_name_is_refused_with_the_choices() -> None:
    with pytest.raises(UserError, match=r"^optim\.name: 'momentum' is not allowed; choose one of adamw, lamb$"):
        OptimConfig(name="momentum").validate()
