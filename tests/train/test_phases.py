"""The whole way of a model: two phases from one store, fine-tuning, and what transformers opens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForPreTraining

from tests.train.runs import losses, run

WORDS = {"fruit": ["apple", "pear", "plum", "cherry"], "tool": ["hammer", "saw", "drill", "file"]}


@pytest.fixture(scope="module")
def phase1(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 steps at 32 tokens."""
    output = tmp_path_factory.mktemp("phase1")
    run(output, f"--data.path={store}", "--data.sequence_length=32", "--train.steps=40", "--train.save_interval=null")
    return output


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences whose class is told by one word."""
    folder = tmp_path_factory.mktemp("examples")
    for name, count in (("train", 320), ("test", 80)):
        rows = [(kind, WORDS[kind][i % 4]) for i in range(count) for kind in [("fruit", "tool")[i // 4 % 2]]]
        lines = [
            json.dumps({"sentence": f"this is the {word} of number {i}", "label": k})
            for i, (k, word) in enumerate(rows)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_the_second_phase_starts_where_the_first_ended_from_the_same_shards(
    store: Path, phase1: Path, tmp_path: Path
) -> None:
    options = [f"--data.path={store}", "--data.sequence_length=64", "--train.steps=2"]
    run(tmp_path, *options, f"--model.init_from={phase1 / 'export'}")
    first = losses(phase1)
    assert losses(tmp_path)[0][1] < first[0][1] - 0.2
    assert abs(losses(tmp_path)[0][1] - first[-1][1]) < 0.3


def test_transformers_opens_the_export(phase1: Path) -> None:
    model, report = BertForPreTraining.from_pretrained(phase1 / "export", output_loading_info=True)
    assert not report["missing_keys"]
    tokenizer = AutoTokenizer.from_pretrained(phase1 / "export")
    with torch.no_grad():
        logits = model(**tokenizer("A first sentence.", "A second one.", return_tensors="pt")).prediction_logits
    assert logits.shape[-1] == len(tokenizer)


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_fine_tuning_ends_with_a_report_and_the_best_model(
    phase1: Path, examples: Path, tmp_path: Path, stage: int
) -> None:
    printed = run(
        tmp_path,
        "--task=sequence_classification",
        f"--model.init_from={phase1 / 'export'}",
        f"--labelled.train={examples / 'train.jsonl'}",
        f"--labelled.test={examples / 'test.jsonl'}",
        "--labelled.max_length=32",
        "--optim.learning_rate=3e-3",
        "--train.epochs=3",
        "--train.eval_interval=20",
        f"--train.zero_stage={stage}",
        ranks=2,
    )
    assert "majority baseline 0.5" in printed
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["accuracy"] > 0.9
    assert {"report.txt", "predictions.tsv", "confusion_matrix.png"} <= {
        p.name for p in (tmp_path / "report").iterdir()
    }
    assert losses(tmp_path, "eval/accuracy")[-1][0] == losses(tmp_path)[-1][0]
    best = max(value for _, value in losses(tmp_path, "eval/accuracy"))
    assert best > 0.9
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"eval/confusion_matrix", "test/confusion_matrix"} <= set(events.Tags()["images"])
    for name in ("accuracy", "loss"):
        assert losses(tmp_path, f"test/{name}") == [(losses(tmp_path)[-1][0], pytest.approx(report["scores"][name]))]
    text = events.Tensors("report/test/text_summary")[0].tensor_proto.string_val[0].decode()
    assert (tmp_path / "report" / "report.txt").read_text().strip() in text
    assert all(events.SummaryMetadata(tag).summary_description for tag in events.Tags()["scalars"])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    with torch.no_grad():
        guess = model(**tokenizer("this is the hammer of number 7", return_tensors="pt")).logits.argmax().item()
    assert model.config.id2label[guess] == "tool"


def test_a_store_with_no_held_out_text_trains_without_evaluation(tmp_path: Path) -> None:
    from engine.data.store.prepare import PrepareConfig, prepare

    text = "".join(f"The {kind} number {i} lay here. It was there.\n\n" for i in range(90) for kind in WORDS)
    (tmp_path / "text.txt").write_text(text)
    options = {"source": [str(tmp_path / "text.txt")], "vocab_size": 200, "validation_fraction": 0.0, "workers": 0}
    prepare(PrepareConfig(output=str(tmp_path / "store"), **options))
    printed = run(
        tmp_path / "run", f"--data.path={tmp_path / 'store'}", "--train.steps=2", "--train.save_interval=null"
    )
    assert "evaluation" not in printed
    assert len(losses(tmp_path / "run")) == 2
