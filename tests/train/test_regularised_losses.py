"""Runs whose micro-batches have several passes: the same losses on every layout, and samples and tokens count once."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.train.audit import read_audit
from tests.tasks.labels import ROWS, write
from tests.tasks.tiny import tiny_bert
from tests.train.runs import losses
from tests.train.test_label_runs import BOUND, STEPS, train
from tests.train.test_layouts import largest_difference

FGM = ("--regularise.adversarial=fgm", "--regularise.adversarial_norm=0.5")
#: in so small a ball that its random start, which the layout changes, moves no loss
SMALL_START = ("--regularise.adversarial=freelb", "--regularise.adversarial_norm=1e-6")
LORA = ("--adapter.method=lora", "--adapter.rank=2")
RECOMPUTED = ("--model.activation_checkpointing=true",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "stage", "options", "more"),
    [
        ("sequence_classification", 2, FGM, ()),
        ("sequence_classification", 3, FGM, RECOMPUTED),
        ("multiple_choice", 3, FGM, ()),
        ("multiple_choice", 1, FGM, ()),
        ("regression", 0, FGM, ()),
        ("regression", 3, SMALL_START, RECOMPUTED),
        ("regression", 3, (*FGM, *LORA), ()),
        ("multi_label_classification", 2, (*FGM, "--train.freeze=embeddings"), RECOMPUTED),
    ],
)
def test_two_ranks_learn_under_noise_what_one_learns(
    tmp_path: Path, task: str, stage: int, options: tuple[str, ...], more: tuple[str, ...]
) -> None:
    tiny_bert(tmp_path / "bert")
    write(tmp_path / "train.jsonl", ROWS[task](90, 1))
    write(tmp_path / "validation.jsonl", ROWS[task](24, 2))
    alone, scores = train(tmp_path, tmp_path / "one", task, 1, 0, 1, *options, "--train.audit=true")
    together, scores_together = train(
        tmp_path, tmp_path / "two", task, 2, stage, 2, *options, *more, "--train.audit=true"
    )
    worst = largest_difference(together, alone)
    print(f"{task}, 2 ranks, ZeRO-{stage}, accumulation 2: largest relative difference {worst:.1e}")
    assert len(together) == STEPS
    assert worst < BOUND
    held_out = "mse" if task == "regression" else "loss"  # five steps leave correlations of all but equal predictions
    assert scores_together[held_out] == pytest.approx(scores[held_out], rel=BOUND)
    noised = [losses(tmp_path / run, "train/adversarial_loss") for run in ("one", "two")]
    assert largest_difference(*noised) < BOUND
    audits = [read_audit(tmp_path / run).steps for run in ("one", "two")]
    for step in range(1, STEPS + 1):
        first, second = (sorted(audit[step].samples) for audit in audits)
        assert first == second
        assert len(first) >= 16


@pytest.mark.slow
def test_a_random_start_is_the_same_at_every_stage(tmp_path: Path) -> None:
    tiny_bert(tmp_path / "bert")
    write(tmp_path / "train.jsonl", ROWS["multi_label_classification"](90, 1))
    write(tmp_path / "validation.jsonl", ROWS["multi_label_classification"](24, 2))
    curves = []
    for stage in (1, 3):
        output = tmp_path / f"stage-{stage}"
        options = (
            "--regularise.adversarial=freelb",
            "--regularise.adversarial_norm=1",
            "--regularise.adversarial_rate=0.5",
        )
        curve, _ = train(tmp_path, output, "multi_label_classification", 2, stage, 2, *options)
        curves += [curve, losses(output, "train/adversarial_loss")]
    assert largest_difference(curves[2], curves[0]) < BOUND
    assert largest_difference(curves[3], curves[1]) < BOUND
    assert curves[1][0][1] > curves[0][0][1], "the last noise raises the loss"
