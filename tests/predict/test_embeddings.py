"""Vectors of texts are those of sentence-transformers, and similarities their cosines."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from engine.config import architecture_of
from engine.data.tokenizer.wordpiece import load_tokenizer
from engine.errors import UserError
from engine.model.folder import described, export_huggingface, saved_files
from engine.model.sentence import SentenceConfig, sentence_files
from engine.predict.options import PredictConfig
from engine.predict.stream import predict_file, predict_rows
from tests.model.test_task_heads import config_of
from tests.predict.models import POSITIONS, read_jsonl, some_texts, write_model, write_rows

TEXTS = some_texts(30)


def make(folder: Path, normalize: bool = True, pooling: Any = "mean", length: int | None = None) -> Path:
    """A random encoder with the files of sentence-transformers; its pooler has no weights, as is common."""
    write_model(folder, "SequenceClassification", ("a", "b"))
    config = transformers.BertConfig.from_pretrained(folder)
    classifier = transformers.BertForSequenceClassification.from_pretrained(folder)
    encoder = transformers.BertModel(config, add_pooling_layer=False)
    encoder.load_state_dict(classifier.bert.state_dict(), strict=False)
    encoder.save_pretrained(folder)
    SentenceConfig(pooling, normalize, length).put_into(config)
    for name, content in sentence_files(config).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("encoder"))


def theirs(folder: Path, texts: list[str], pooling: str = "mean", length: int = POSITIONS) -> torch.Tensor:
    """Vectors by transformers' encoder, one text after the other."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    rows = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        with torch.no_grad():
            states = model(**inputs).last_hidden_state[0]
        rows.append(states.mean(0) if pooling == "mean" else states[0])
    return torch.stack(rows)


def vectors(folder: Path, texts: list[str], **options: Any) -> torch.Tensor:
    rows = predict_rows(PredictConfig(str(folder), "rows", "-", **options), texts)
    return torch.tensor([row["predicted_embedding"] for row in rows])


@pytest.mark.parametrize(
    ("normalize", "pooling", "length"), [(True, "mean", None), (False, "mean", 9), (True, "cls", None)]
)
def test_pooling_length_and_size_are_the_folders(
    tmp_path: Path, normalize: bool, pooling: str, length: int | None
) -> None:
    folder = make(tmp_path, normalize, pooling, length)
    expected = theirs(folder, TEXTS, pooling, length or POSITIONS)
    expected = torch.nn.functional.normalize(expected) if normalize else expected
    torch.testing.assert_close(vectors(folder, TEXTS, batch_tokens=100), expected, rtol=1e-5, atol=1e-5)


def test_lists_in_every_format_and_similarities_of_pairs(encoder: Path, tmp_path: Path) -> None:
    expected = torch.nn.functional.normalize(theirs(encoder, TEXTS))
    others = TEXTS[1:] + TEXTS[:1]
    source = write_rows(tmp_path / "in.jsonl", TEXTS, other=others)
    found = {}
    for suffix in ("jsonl", "csv"):
        path = tmp_path / f"out.{suffix}"
        summary = predict_file(PredictConfig(str(encoder), str(source), str(path)))
        assert summary is not None
        assert summary.truncated == 1
        if suffix == "csv":
            with path.open(newline="") as file:
                found[suffix] = [json.loads(row["predicted_embedding"]) for row in csv.DictReader(file)]
        else:
            found[suffix] = [row["predicted_embedding"] for row in read_jsonl(path)]
    assert found["jsonl"] == found["csv"]
    np.testing.assert_allclose(found["csv"], expected, atol=1e-5)
    pairs = tmp_path / "pairs.jsonl"
    predict_file(PredictConfig(str(encoder), str(source), str(pairs), text_pair="other"))
    rows = read_jsonl(pairs)
    assert "predicted_embedding" not in rows[0]
    cosines = (expected * expected.roll(-1, 0)).sum(1)
    np.testing.assert_allclose([row["predicted_similarity"] for row in rows], cosines, atol=1e-5)


def test_an_encoder_without_those_files_predicts_nothing(encoder: Path, tmp_path: Path) -> None:
    config = transformers.BertConfig.from_pretrained(encoder)
    plain = tmp_path / "plain"
    transformers.BertModel(config).save_pretrained(plain)
    with pytest.raises(UserError, match=r"names 'BertModel' in architectures, which has no head of a task .*modules"):
        vectors(plain, ["a"])


def test_a_bad_row_or_option_is_named(encoder: Path) -> None:
    config = PredictConfig(str(encoder), "rows", "-", text_pair="other")
    with pytest.raises(UserError, match=re.escape("line 2: no text in column 'other'; fill it in or remove the row")):
        list(predict_rows(config, [{"text": "a", "other": "b"}, {"text": "a", "other": None}]))
    with pytest.raises(UserError, match="probabilities: True has no effect: embeddings has no such thing"):
        vectors(encoder, ["a"], probabilities=True)


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_sentence_transformers_opens_an_export(name: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers", exc_type=ImportError)
    folder = tmp_path / "export"
    write_model(tmp_path / "words", "SequenceClassification", ("a", "b"))
    config = config_of(name, "embeddings")
    SentenceConfig("mean", True, 20).put_into(config)
    config.vocab_size = len((tmp_path / "words" / "vocab.txt").read_text(encoding="utf-8").splitlines())
    config.pad_token_id = 0
    torch.manual_seed(3)
    architecture = architecture_of(config)
    model = architecture.build("embeddings", config, False)
    model.load_state_dict(architecture.export_class(architecture.class_for("embeddings"))(config).state_dict())
    told = described(config, architecture.class_for("embeddings"))
    export_huggingface(model.state_dict(), told, saved_files(load_tokenizer(tmp_path / "words")), folder)
    texts = [text for text in TEXTS if "[" not in text]
    opened = library.SentenceTransformer(str(folder), device="cpu")
    expected = torch.from_numpy(opened.encode(texts, batch_size=4))
    torch.testing.assert_close(vectors(folder, texts), expected, rtol=0, atol=1e-5)
