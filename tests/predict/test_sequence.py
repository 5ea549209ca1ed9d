"""Predictions of sequence heads are those of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from engine.errors import UserError
from engine.predict.options import PredictConfig
from engine.predict.stream import predict_file, predict_rows
from tests.predict.models import POSITIONS, change_config, read_jsonl, some_texts, write_model, write_rows

CLOSE = 2e-5


def predicted(folder: Path, texts: list[str], pairs: list[str] | None = None, **options: Any) -> list[dict[str, Any]]:
    records = [{"text": text} for text in texts]
    if pairs is not None:
        records = [{"text": text, "other": other} for text, other in zip(texts, pairs, strict=True)]
        options["text_pair"] = "other"
    return list(predict_rows(PredictConfig(str(folder), "rows", "-", **options), records))


def their_logits(folder: Path, texts: list[str], pairs: list[str] | None = None) -> np.ndarray:
    """[N, classes], one text at a time, without padding."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    options: dict[str, Any] = {"truncation": True, "max_length": POSITIONS, "return_tensors": "pt"}
    with torch.no_grad():
        rows = [
            model(**tokenizer([text], None if pairs is None else [pairs[index]], **options)).logits[0]
            for index, text in enumerate(texts)
        ]
    return torch.stack(rows).double().numpy()


def test_classes_are_those_of_the_pipeline(classifier: Path, tmp_path: Path) -> None:
    texts = some_texts(50)
    summary = predict_file(
        PredictConfig(
            str(classifier), str(write_rows(tmp_path / "in.jsonl", texts)), str(tmp_path / "out.jsonl"),
            probabilities=True, chunk_rows=16, batch_tokens=100,
        )
    )  # fmt: skip
    assert summary is not None
    assert (summary.rows, summary.truncated, summary.length) == (50, 1, POSITIONS)
    pipeline = transformers.pipeline("text-classification", model=str(classifier), device="cpu")
    theirs = pipeline(texts, top_k=None, truncation=True, max_length=POSITIONS)
    rows = read_jsonl(tmp_path / "out.jsonl")
    assert [row["text"] for row in rows] == texts
    assert [row["id"] for row in rows] == list(range(50))
    assert len({row["predicted_label"] for row in rows}) > 1
    for row, scores in zip(rows, theirs, strict=True):
        expected = {each["label"]: each["score"] for each in scores}
        assert row["predicted_label"] == max(expected, key=lambda name: expected[name])
        assert row["predicted_probabilities"] == pytest.approx(expected, abs=CLOSE)
        assert row["predicted_confidence"] == max(row["predicted_probabilities"].values())


def test_pairs_are_those_of_transformers(classifier: Path) -> None:
    texts, pairs = some_texts(30, seed=1), some_texts(30, seed=2)[::-1]
    logits = their_logits(classifier, texts, pairs)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    rows = predicted(classifier, texts, pairs, probabilities=True)
    ours = np.array([list(row["predicted_probabilities"].values()) for row in rows])
    np.testing.assert_allclose(ours, expected, atol=CLOSE)


def test_a_row_does_not_depend_on_its_neighbours(classifier: Path) -> None:
    texts = some_texts(30)
    together = predicted(classifier, texts)
    alone = [row for text in texts for row in predicted(classifier, [text])]
    for one, other in zip(together, alone, strict=True):
        assert one["predicted_label"] == other["predicted_label"]
        assert one["predicted_confidence"] == pytest.approx(other["predicted_confidence"], abs=CLOSE)


def test_texts_are_cut_where_it_is_said(classifier: Path) -> None:
    long, cut = predicted(classifier, ["quick fox " * 50, "quick fox quick"], max_length=5)
    assert long["predicted_confidence"] == pytest.approx(cut["predicted_confidence"], abs=CLOSE)


def test_numbers(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "SequenceClassification", ("score",), problem_type="regression")
    texts = some_texts(20)
    ours = [row["predicted_score"] for row in predicted(folder, texts)]
    np.testing.assert_allclose(ours, their_logits(folder, texts)[:, 0], atol=CLOSE, rtol=CLOSE)
    with pytest.raises(UserError, match="probabilities: True has no effect: the model predicts numbers"):
        predicted(folder, texts, probabilities=True)


def test_several_labels_and_their_thresholds(tmp_path: Path) -> None:
    names = ("sport", "politics", "science")
    folder = write_model(tmp_path, "SequenceClassification", names, problem_type="multi_label_classification")
    texts = some_texts(20)
    shares = 1 / (1 + np.exp(-their_logits(folder, texts)))
    given: list[dict[str, float]] = [{}, {"politics": 0.9, "science": 0.1}]
    for thresholds in (*given, {"sport": 0.2}):
        if thresholds in given:
            change_config(folder, {"thresholds": thresholds})
        else:  # as a run tells what it tuned
            (folder / "zerobert.json").write_text(json.dumps({"tuned": {"thresholds": thresholds}}))
        bound = np.array([thresholds.get(name, 0.5) for name in names])
        rows = predicted(folder, texts, probabilities=True)
        for row, share in zip(rows, shares, strict=True):
            assert row["predicted_labels"] == [name for name, above in zip(names, share >= bound, strict=True) if above]
            assert list(row["predicted_probabilities"].values()) == pytest.approx(share.tolist(), abs=CLOSE)
    (folder / "zerobert.json").unlink()
    change_config(folder, {"thresholds": {"sprot": 0.9}})
    with pytest.raises(UserError, match="thresholds names 'sprot', which is no label of id2label"):
        predicted(folder, texts)


def test_bf16_is_near(classifier: Path) -> None:
    texts = some_texts(20)
    plain, half = predicted(classifier, texts), predicted(classifier, texts, precision="bf16")
    assert sum(a["predicted_label"] == b["predicted_label"] for a, b in zip(plain, half, strict=True)) >= 17
    assert plain != half


@pytest.mark.parametrize("kind", ["Roberta", "ModernBert"])
def test_other_architectures(kind: str, classifier: Path, tmp_path: Path) -> None:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=POSITIONS + 2, initializer_range=0.4, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(5)
    getattr(transformers, f"{kind}ForSequenceClassification")(config).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path)
    texts = some_texts(20)
    logits = their_logits(tmp_path, texts)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    rows = predicted(tmp_path, texts, probabilities=True, max_length=POSITIONS)
    ours = np.array([list(row["predicted_probabilities"].values()) for row in rows])
    np.testing.assert_allclose(ours, expected, atol=CLOSE)
