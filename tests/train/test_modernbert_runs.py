"""Runs of ModernBERT: the same at any layout, resumed exactly, opened by transformers, fine-tuned from an export.

Four layers, the middle ones with windows of 128 tokens, on sequences of 192: whole sequences and windows differ.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import ModernBertForMaskedLM, ModernBertForSequenceClassification

from launch.curves import Curve
from tests.train.checkpoint.test_resume import kill_in_mid_run
from tests.train.runs import losses, run
from tests.train.test_layouts import BF16_BOUND, largest_difference

BOUND = 1e-4
#: sums in another order; a run of 30 steps is to stay below it
REACHED = 1e-6
WORDS = {"fruit": ["apple", "pear", "plum", "cherry"], "tool": ["hammer", "saw", "drill", "file"]}


def options(store: Path, *more: str) -> list[str]:
    return [
        f"--data.path={store}",
        "--data.objective=mlm",
        "--data.sequence_length=192",
        "--model.architecture=modernbert",
        "--model.layers=4",
        "--model.max_positions=192",
        *more,
    ]


def errors(printed: str) -> list[str]:
    """What was printed, without the note that a later option overrides an earlier one."""
    return [line for line in printed.splitlines() if not line.startswith("note: ")]


@pytest.fixture(scope="module")
def whole(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of one process, with a checkpoint in the middle."""
    output = tmp_path_factory.mktemp("modernbert")
    run(output, *options(store, "--train.steps=6", "--train.zero_stage=0", "--train.save_interval=3"))
    return output


@pytest.mark.slow
def test_two_ranks_at_zero_3_have_the_losses_of_one_process(store: Path, whole: Path, tmp_path: Path) -> None:
    printed = run(tmp_path, *options(store, "--train.steps=6", "--train.zero_stage=3"), ranks=2)
    assert "update verified: step 1" in printed
    assert largest_difference(losses(tmp_path), losses(whole)) < REACHED


def test_a_resume_at_another_layout_goes_on_with_the_same_losses(store: Path, whole: Path, tmp_path: Path) -> None:
    middle = whole / "checkpoints" / "step-000003"
    more = ("--train.steps=6", "--train.zero_stage=3", "--train.micro_batch=4", f"--resume={middle}")
    assert "update verified: step 4" in run(tmp_path, *options(store, *more), ranks=2)
    resumed = losses(tmp_path)
    assert [step for step, _ in resumed] == [4, 5, 6]
    assert largest_difference(resumed, losses(whole)[3:]) < REACHED


def test_transformers_opens_the_export(whole: Path) -> None:
    model, told = ModernBertForMaskedLM.from_pretrained(whole / "export", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert model.config.layer_types == ["full_attention", *["sliding_attention"] * 2, "full_attention"]
    assert model.config.max_position_embeddings == 192


@pytest.mark.slow
def test_a_classifier_is_tuned_from_the_export(whole: Path, tmp_path: Path) -> None:
    rows = [(kind, word) for number in range(40) for kind, words in WORDS.items() for word in words[number % 4 :][:1]]
    lines = [json.dumps({"sentence": f"this is the {word}", "label": kind}) for kind, word in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    run(
        tmp_path / "tuned",
        "--task=sequence_classification",
        f"--model.init_from={whole / 'export'}",
        f"--labelled.train={tmp_path / 'train.jsonl'}",
        "--labelled.max_length=16",
        "--optim.learning_rate=1e-2",
        "--train.epochs=6",
        "--train.zero_stage=2",
        ranks=2,
    )
    assert losses(tmp_path / "tuned", "eval/accuracy")[-1][1] > 0.9
    export = tmp_path / "tuned" / "export"
    model, told = ModernBertForSequenceClassification.from_pretrained(export, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert set(model.config.id2label.values()) == set(WORDS)


@pytest.mark.slow
def test_bf16_trains(store: Path, whole: Path, tmp_path: Path) -> None:
    run(tmp_path, *options(store, "--train.steps=6", "--train.precision=bf16"))
    assert largest_difference(losses(tmp_path), losses(whole)) < BF16_BOUND
    model = ModernBertForMaskedLM.from_pretrained(tmp_path / "export")
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_pairs_are_refused(store: Path, tmp_path: Path) -> None:
    printed = run(tmp_path / "run", *options(store, "--data.objective=mlm_nsp"), code=2)
    said = "data.objective: 'mlm_nsp' needs a head that no modernbert has; give --data.objective mlm"
    assert errors(printed) == [f"error: {said}"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.architecture=bert", "model.architecture: 'bert' differs from 'modernbert' in "),
        ("--model.layers=7", "model.layers: 7 differs from 4 in "),
        ("--data.objective=mlm_nsp", "data.objective: 'mlm_nsp'"),
        ("--data.sequence_length=96", "data.sequence_length: 96 differs from 192 in "),
    ],
)
def test_a_resume_as_something_else_is_refused(store: Path, whole: Path, option: str, said: str) -> None:
    (line,) = errors(run(whole, *options(store, "--train.steps=6", option), "--resume=auto", code=2))
    assert line.startswith(f"error: {said}")


@pytest.fixture(scope="module")
def reference(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Curve:
    """30 steps of one process, stage 0, no accumulation."""
    return layout(store, tmp_path_factory.mktemp("reference"), 1, 0, 1)


def layout(store: Path, output: Path, ranks: int, stage: int, accumulation: int) -> Curve:
    more = (f"--train.zero_stage={stage}", f"--train.micro_batch={16 // ranks // accumulation}")
    run(output, *options(store, "--train.steps=30", "--train.save_interval=null", *more), ranks=ranks)
    return losses(output)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_do_not_depend_on_the_layout(
    store: Path, tmp_path: Path, reference: Curve, ranks: int, stage: int, accumulation: int
) -> None:
    curve = layout(store, tmp_path, ranks, stage, accumulation)
    assert [step for step, _ in curve] == list(range(1, 31))
    worst = largest_difference(curve, reference)
    print(f"{ranks} rank(s), ZeRO-{stage}, accumulation {accumulation}: largest relative difference {worst:.1e}")
    assert worst < REACHED
    assert curve[-1][1] < curve[0][1] - 0.2, "the run learns"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16")])
def test_losses_after_a_kill_and_resume_are_bit_equal(store: Path, tmp_path: Path, stage: int, precision: str) -> None:
    """With dropout."""
    more = ["--train.steps=12", "--train.save_interval=3", "--train.micro_batch=4", "--data.workers=1"]
    more += ["--model.hidden_dropout=0.1", "--model.attention_dropout=0.1"]
    arguments = options(store, *more, f"--train.zero_stage={stage}", f"--train.precision={precision}")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run(undisturbed, *arguments, ranks=2)
    kill_in_mid_run(killed, *arguments)
    assert "resumed" in run(killed, *arguments, "--resume=auto", ranks=2)
    for tag in ("train/loss", "train/grad_norm", "eval/mlm_loss"):
        assert losses(killed, tag) == losses(undisturbed, tag), tag


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_killed_run_goes_on_at_another_layout(store: Path, tmp_path: Path, stage: int) -> None:
    more = ["--train.steps=12", "--train.save_interval=3", "--train.micro_batch=4"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    run(undisturbed, *options(store, *more, f"--train.zero_stage={stage}"), ranks=2)
    kill_in_mid_run(killed, *options(store, *more, f"--train.zero_stage={stage}"))
    run(killed, *options(store, *more, "--train.zero_stage=0"), "--resume=auto")
    assert largest_difference(losses(killed), losses(undisturbed)) < REACHED
