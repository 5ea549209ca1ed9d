"""Runs that learn answers: the same at every layout, and transformers opens what comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BertForQuestionAnswering

from tests.tasks.answers.test_task import rows_of, save_folder, write
from tests.train.runs import NO_DROPOUT, losses, run
from tests.train.test_layouts import largest_difference


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    save_folder(folder / "bert")
    for seed, split in enumerate(("train", "validation", "test")):
        write(folder / f"{split}.jsonl", rows_of(60, seed, 0.3))
    return folder


def options(inputs: Path, *more: str) -> list[str]:
    splits = [f"--labelled.{split}={inputs / split}.jsonl" for split in ("train", "validation", "test")]
    own = ["--task=question_answering", f"--model.init_from={inputs / 'bert'}", *splits, *NO_DROPOUT]
    lengths = ["--labelled.max_length=28", "--labelled.stride=8", "--labelled.max_answer_length=4"]
    return [*own, *lengths, "--train.steps=8", "--train.eval_interval=4", "--optim.learning_rate=5e-3", *more]


@pytest.fixture(scope="module")
def alone(inputs: Path) -> Path:
    printed = run(inputs / "alone", *options(inputs, "--train.zero_stage=0", "--train.micro_batch=16"))
    assert "train: 60 questions (" in printed
    assert "exact match " in printed
    return inputs / "alone"


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_two_ranks_and_accumulation_learn_and_score_the_same(
    inputs: Path, alone: Path, stage: int, tmp_path: Path
) -> None:
    run(tmp_path / "two", *options(inputs, f"--train.zero_stage={stage}", "--train.micro_batch=4"), ranks=2)
    assert largest_difference(losses(tmp_path / "two"), losses(alone)) < 1e-5
    assert largest_difference(losses(tmp_path / "two", "eval/loss"), losses(alone, "eval/loss")) < 1e-5
    for tag in ("eval/f1", "eval/exact_match", "test/f1", "test/no_answer_accuracy"):
        assert losses(tmp_path / "two", tag) == losses(alone, tag)
    for name in ("predictions.json", "nbest_predictions.json", "null_odds.json"):
        one, other = (json.loads((run_ / "report" / name).read_text()) for run_ in (alone, tmp_path / "two"))
        assert list(one) == list(other)
        if name == "predictions.json":
            assert one == other


def test_the_export_opens_and_has_its_threshold(alone: Path) -> None:
    model, told = BertForQuestionAnswering.from_pretrained(alone / "export", output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert model.config.num_labels == 2
    origin = json.loads((alone / "export" / "zerobert.json").read_text())
    report = json.loads((alone / "report" / "report.json").read_text())
    assert origin["tuned"] == {"null_threshold": report["null_threshold"]}
    assert set(origin["round_trip"]["differences"]) == {"start_logits", "end_logits"}


@pytest.mark.slow
def test_a_resume_goes_on_exactly(inputs: Path, alone: Path, tmp_path: Path) -> None:
    more = options(inputs, "--train.zero_stage=0", "--train.micro_batch=16", "--train.save_interval=4")
    run(tmp_path / "first", *more)
    checkpoint = tmp_path / "first" / "checkpoints" / "step-000004"
    run(tmp_path / "second", *more, f"--resume={checkpoint}")
    whole, rest = losses(alone), losses(tmp_path / "second")
    assert rest == whole[4:]
    same = ((path / "report" / "predictions.json").read_text() for path in (alone, tmp_path / "second"))
    assert len(set(same)) == 1


def test_other_windows_are_refused_on_resume(inputs: Path, alone: Path, tmp_path: Path) -> None:
    more = options(inputs, "--train.zero_stage=0", "--labelled.stride=4", f"--resume={alone}")
    assert "labelled.stride" in run(tmp_path / "run", *more, code=2)
