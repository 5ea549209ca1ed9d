"""A run with MLM alone: the same at any layout, without a number of NSP, resumed exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import BertForMaskedLM

from tests.train.runs import NO_DROPOUT, losses, run


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of one process, with a checkpoint in the middle."""
    output = tmp_path_factory.mktemp("mlm")
    run(output, *options(store), "--train.zero_stage=0", "--train.save_interval=3")
    return output


def options(store: Path, objective: str = "mlm") -> list[str]:
    return [f"--data.path={store}", f"--data.objective={objective}", "--train.steps=6", *NO_DROPOUT]


def test_curves_and_export_are_those_of_mlm_alone(whole: Path) -> None:
    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/mlm_loss", "eval/mlm_loss", "eval/perplexity"} <= tags
    assert not [tag for tag in tags if "nsp" in tag]
    _, report = BertForMaskedLM.from_pretrained(whole / "export", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_two_ranks_at_zero_3_go_on_with_the_losses_of_one_process(store: Path, whole: Path, tmp_path: Path) -> None:
    middle = whole / "checkpoints" / "step-000003"
    printed = run(tmp_path, *options(store), "--train.zero_stage=3", f"--resume={middle}", ranks=2)
    assert "NSP" not in printed
    assert "update verified: step 4" in printed
    resumed, before = losses(tmp_path), losses(whole)
    assert [step for step, _ in resumed] == [4, 5, 6]
    assert [loss for _, loss in resumed] == pytest.approx([loss for _, loss in before[3:]], rel=1e-5)


def test_a_resume_with_the_other_objective_is_refused(store: Path, whole: Path) -> None:
    printed = run(whole, *options(store, "mlm_nsp"), "--resume=auto", code=2)
    assert "data.objective: 'mlm_nsp' differs from 'mlm' in " in printed
