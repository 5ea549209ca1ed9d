"""Runs that learn embeddings: the same at every layout, resumed as if they had not ended, exported as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from engine.export import export_checkpoint
from engine.predict.options import PredictConfig
from engine.predict.stream import predict_rows
from engine.train.audit import read_audit
from tests.tasks.embeddings import worlds
from tests.train.runs import NO_DROPOUT, losses, run
from tests.train.test_layouts import largest_difference

STEPS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.inputs(tmp_path_factory.mktemp("embeddings"))


def options(inputs: Path, stage: int, micro_batch: int, *more: str) -> list[str]:
    files = {"train": "train", "validation": "pairs", "test": "graded"}
    own = [f"--labelled.{split}={inputs / file}.jsonl" for split, file in files.items()]
    columns = ["--labelled.text=text", "--labelled.text_pair=positive", "--labelled.negatives=negatives"]
    return [
        "--task=embeddings", f"--model.init_from={inputs / 'bert'}", *own, *columns, "--labelled.max_length=14",
        f"--train.steps={STEPS}", "--train.eval_interval=3", "--optim.learning_rate=5e-3", "--optim.warmup=0",
        "--optim.schedule=constant", f"--train.zero_stage={stage}", f"--train.micro_batch={micro_batch}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(inputs: Path) -> Path:
    printed = run(inputs / "alone", *options(inputs, 0, 16, *NO_DROPOUT, "--train.audit=true"))
    assert "train: 90 pairs with " in printed
    assert "spearman 0." in printed
    return inputs / "alone"


@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_two_ranks_and_accumulation_learn_and_score_the_same(
    inputs: Path, alone: Path, stage: int, tmp_path: Path
) -> None:
    run(tmp_path / "two", *options(inputs, stage, 2, *NO_DROPOUT, "--train.audit=true"), ranks=2)
    worst = largest_difference(losses(tmp_path / "two"), losses(alone))
    print(f"2 ranks x accumulation 4, ZeRO-{stage}: largest relative difference of a loss {worst:.1e}")
    assert worst < 1e-4
    assert len(losses(alone)) == STEPS
    for tag in ("train/in_batch_accuracy", "eval/mrr_at_10", "eval/recall_at_1", "eval/ndcg_at_10"):
        assert largest_difference(losses(tmp_path / "two", tag), losses(alone, tag)) < 1e-6
    for tag in ("test/spearman", "test/pearson"):
        assert largest_difference(losses(tmp_path / "two", tag), losses(alone, tag)) < 1e-4
    one, other = (read_audit(folder).steps for folder in (alone, tmp_path / "two"))
    assert {step: sorted(each.samples) for step, each in one.items()} == {
        step: sorted(each.samples) for step, each in other.items()
    }, "a look ahead is none of the samples that are learned from"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_resume_goes_on_bit_for_bit_with_dropout(inputs: Path, stage: int, tmp_path: Path) -> None:
    more = options(inputs, stage, 2, "--model.hidden_dropout=0.2", "--train.save_interval=3")
    run(tmp_path / "whole", *more, ranks=2)
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000003"
    run(tmp_path / "rest", *more, f"--resume={checkpoint}", ranks=2)
    assert losses(tmp_path / "rest") == losses(tmp_path / "whole")[3:]
    weights = [(path / "export" / "model.safetensors").read_bytes() for path in (tmp_path / "whole", tmp_path / "rest")]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize("other", ["bf16", "activation checkpointing"])
def test_precision_and_recomputation_are_the_others(inputs: Path, alone: Path, other: str, tmp_path: Path) -> None:
    more = ["--train.precision=bf16"] if other == "bf16" else ["--model.activation_checkpointing=true"]
    run(tmp_path / "run", *options(inputs, 2, 4, *NO_DROPOUT, *more))
    assert largest_difference(losses(tmp_path / "run"), losses(alone)) < (0.1 if other == "bf16" else 1e-5)


def test_the_export_has_the_files_of_sentence_transformers(alone: Path, tmp_path: Path) -> None:
    exported = alone / "export"
    modules = json.loads((exported / "modules.json").read_text())
    assert [each["type"].rpartition(".")[2] for each in modules] == ["Transformer", "Pooling", "Normalize"]
    assert json.loads((exported / "sentence_bert_config.json").read_text())["max_seq_length"] == 14
    assert json.loads((exported / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"] is True
    assert list(json.loads((exported / "zerobert.json").read_text())["round_trip"]["differences"]) == [
        "last_hidden_state"
    ]
    again = tmp_path / "again"
    run(tmp_path / "run", *options(alone.parent, 0, 16, *NO_DROPOUT, "--train.steps=2"))
    export_checkpoint(tmp_path / "run" / "checkpoints" / "step-000002", again)
    export_checkpoint(tmp_path / "run" / "checkpoints" / "step-000002", again)  # an earlier one is replaced
    names = [path.relative_to(exported) for path in exported.rglob("*")]
    assert sorted(names) == sorted(path.relative_to(again) for path in again.rglob("*"))


def test_predictions_of_the_run_are_the_means_of_transformers_states(alone: Path) -> None:
    texts = ["good film", "a bad film was the film", "bad"]
    encoded = AutoTokenizer.from_pretrained(alone / "export")(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = AutoModel.from_pretrained(alone / "export").eval()(**encoded).last_hidden_state
    mask = encoded["attention_mask"][:, :, None]
    expected = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1))
    rows = list(predict_rows(PredictConfig(str(alone), "rows", "-"), texts))
    torch.testing.assert_close(torch.tensor([row["predicted_embedding"] for row in rows]), expected, rtol=0, atol=1e-5)
