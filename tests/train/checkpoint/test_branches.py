"""A run that begins with another one's checkpoint is what it would have been alone; steps of `train.save_at` stay."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.runs import losses, run


def options(store: Path, steps: int, decay: int) -> list[str]:
    wsd = ["--optim.schedule=wsd", "--optim.warmup=2", f"--optim.decay={decay}"]
    return [f"--data.path={store}", f"--train.steps={steps}", "--train.zero_stage=2", *wsd]


@pytest.fixture(scope="module")
def trunk(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps that keeps its checkpoints of steps 3 and 5."""
    output = tmp_path_factory.mktemp("branches") / "trunk"
    saves = ["--train.save_at=3,5", "--train.save_interval=1", "--train.keep=1"]
    run(output, *options(store, 8, 2), *saves)
    return output


def names(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").glob("step-*"))


def test_named_steps_are_kept_beside_the_newest(trunk: Path) -> None:
    assert names(trunk) == ["step-000003", "step-000005", "step-000008"]


def test_a_branch_is_bit_equal_to_the_run_without_a_trunk(trunk: Path, store: Path, tmp_path: Path) -> None:
    alone, branch = tmp_path / "alone", tmp_path / "branch"
    run(alone, *options(store, 5, 2))
    begins = f"--branch_from={trunk / 'checkpoints' / 'step-000003'}"
    told = run(branch, *options(store, 5, 2), begins, "--resume=auto")
    assert "step-000003 at step 3" in told
    assert losses(branch) == [point for point in losses(alone) if point[0] > 3]
    assert losses(branch, "eval/mlm_loss") == losses(alone, "eval/mlm_loss")
    assert names(trunk) == ["step-000003", "step-000005", "step-000008"]
    assert "is finished" in run(branch, *options(store, 5, 2), begins, "--resume=auto")


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("--branch_from=nowhere", "branch_from: 'nowhere' is no checkpoint"),
        ("--train.save_at=9", "train.save_at: '9' is not allowed; the run ends at step 8"),
        ("--train.save_at=3,2", "train.save_at: '3,2' is not allowed; give steps from 1, rising"),
        ("--train.save_at=0", "train.save_at: '0' is not allowed; give steps from 1, rising"),
        ("--train.save_at=a", "train.save_at: 'a' is not allowed; give steps from 1, rising"),
        ("--train.save_at=3,", "train.save_at: '3,' is not allowed; give steps from 1, rising"),
    ],
)
def test_wrong_values_are_refused(store: Path, tmp_path: Path, option: str, told: str) -> None:
    assert told in run(tmp_path / "run", *options(store, 8, 2), option, code=2)
    assert not (tmp_path / "run").exists()


def test_a_branch_from_a_run_of_another_seed_is_refused(trunk: Path, store: Path, tmp_path: Path) -> None:
    begins = f"--branch_from={trunk / 'checkpoints' / 'step-000003'}"
    assert "seed: 2 differs from 1" in run(tmp_path / "run", *options(store, 5, 2), begins, "--seed=2", code=2)
