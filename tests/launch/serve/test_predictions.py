"""What a server answers is what `zerobert predict` writes, whatever it is asked for at the same time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engine.predict.options import PredictConfig
from engine.predict.stream import predict_rows
from launch.serve.schema import response_model
from tests.launch.serve.live import serving
from tests.predict.models import TAGS, some_texts, write_model
from tests.predict.test_embeddings import make

Rows = list[dict[str, Any]]
TEXTS = some_texts(24)
PAIRS: Rows = [{"text": one, "other": other} for one, other in zip(TEXTS, TEXTS[::-1], strict=True)]
QUESTIONS: Rows = [{"question": "the quick fox", "context": text} for text in TEXTS]
#: by name: the head, its labels and what config.json has more; options of the prediction; rows
MODELS: dict[str, tuple[tuple[str, tuple[str, ...], dict[str, Any]], dict[str, Any], Rows]] = {
    "classes": (
        ("SequenceClassification", ("bad", "fair", "good"), {}),
        {"probabilities": True},
        [{"text": text} for text in TEXTS],
    ),
    "pairs": (("SequenceClassification", ("bad", "good"), {}), {"text_pair": "other"}, PAIRS),
    "labels": (
        ("SequenceClassification", ("a", "b", "c"), {"problem_type": "multi_label_classification"}),
        {"text": "class", "probabilities": True},
        [{"class": text} for text in TEXTS],
    ),
    "a number": (("SequenceClassification", ("score",), {}), {}, [{"text": text} for text in TEXTS]),
    "entities": (("TokenClassification", TAGS, {}), {}, [{"text": text} for text in TEXTS]),
    "tags": (("TokenClassification", TAGS, {}), {}, [{"text": text.split()} for text in TEXTS]),
    "answers": (("QuestionAnswering", ("LABEL_0", "LABEL_1"), {}), {}, QUESTIONS),
    "choices": (
        ("MultipleChoice", ("LABEL_0",), {}),
        {"probabilities": True},
        [{"question": text, "options": ["fox", f"dog {number}", "code"]} for number, text in enumerate(TEXTS)],
    ),
}


def served(folder: Path, options: dict[str, Any], rows: Rows) -> tuple[Rows, int]:
    """Predictions of rows that several clients ask for at once, one to five at a time; and how many were cut."""
    starts = [0, 1, 3, 8, 9, 14, 19, 20, len(rows)]
    parts = [rows[start:stop] for start, stop in pairwise(starts)]
    with serving(folder, options) as live, ThreadPoolExecutor(len(parts)) as clients:
        replies = list(clients.map(live.predict, parts))
        model = response_model(live.service.predictor)
        assert [reply.status for reply in replies] == [200] * len(parts)
        for reply in replies:
            model.model_validate(reply.body)
        assert live.metric("zerobert_rows_total") == len(rows)
    bodies = [reply.body for reply in replies]
    return [row for body in bodies for row in body["predictions"]], sum(body["truncated"] for body in bodies)


def predicted(folder: Path, options: dict[str, Any], rows: Rows) -> Rows:
    """What `zerobert predict` adds to the rows."""
    config = PredictConfig(str(folder), "rows", "-", **options)
    new = predict_rows(config, rows)
    return [{name[len("predicted_") :]: value for name, value in row.items() if name not in rows[0]} for row in new]


def close(one: Any, other: Any) -> bool:
    """Whether two values of a column are the same but for rounding."""
    if isinstance(one, float):
        return isinstance(other, float) and abs(one - other) <= 2e-5 * max(1.0, abs(one))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(value, other[name]) for name, value in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(close, one, other))
    return type(one) is type(other) and one == other


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def write(name: str) -> Path:
        head, labels, more = MODELS[name][0]
        return write_model(tmp_path_factory.mktemp("model"), head, labels, **more)

    return write


@pytest.mark.parametrize("name", MODELS)
def test_predictions_are_those_of_predict(model: Callable[[str], Path], name: str) -> None:
    folder, (_, options, rows) = model(name), MODELS[name]
    found, cut = served(folder, options, rows)
    expected = predicted(folder, options, rows)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert close(one, other), (one, other)
    assert cut == {"classes": 1, "pairs": 6, "labels": 1, "a number": 1, "choices": 1}.get(name, 0)


@pytest.mark.parametrize("options", [{}, {"text_pair": "other"}], ids=["vectors", "similarities"])
def test_embeddings_are_those_of_predict(tmp_path: Path, options: dict[str, Any]) -> None:
    rows = PAIRS if options else [{"text": text} for text in TEXTS]
    folder = make(tmp_path)
    found, _ = served(folder, options, rows)
    expected = predicted(folder, options, rows)
    assert all(close(one, other) for one, other in zip(found, expected, strict=True))


def test_a_server_tells_what_it_serves(model: Callable[[str], Path]) -> None:
    folder = model("classes")
    with serving(folder, {"max_length": 20}) as live:
        about = live.get("/").body
        assert about.pop("threads") >= 1
        assert about.pop("version")
        assert about == {
            "model": folder.name, "architecture": "bert", "head": "sequence_classification",
            "labels": ["bad", "fair", "good"], "columns": ["text"], "predicted": ["label", "confidence"],
            "max_length": 20, "precision": "fp32", "device": live.service.batcher.device.type,
        }  # fmt: skip
        schemas = live.get("/openapi.json").body["components"]["schemas"]
        assert schemas["Row"]["properties"]["text"]["type"] == "string"
        assert schemas["Prediction"]["properties"]["label"]["enum"] == ["bad", "fair", "good"]
        assert (live.get("/health").body, live.get("/ready").body) == ({"status": "ok"}, {"status": "ready"})
        assert b"/openapi.json" in live.get("/docs").content
        assert (live.get("/none").status, live.get("/none").error) == (404, "Not Found")
        assert live.get("/predict").status == 405
