"""Choices are those of the report of the run that trained the model, and of transformers."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from engine.config import TASKS, LabelledConfig, ModelConfig, RunConfig
from engine.errors import UserError
from engine.model.folder import described, export_huggingface, saved_files
from engine.predict.options import PredictConfig
from engine.predict.stream import predict_file, predict_rows
from tests.predict.models import read_jsonl, some_texts, write_model
from tests.tasks.labels import questions, write
from tests.tasks.tiny import evaluate, tiny_bert, train

Rows = list[dict[str, Any]]

#: the middles of the options are a column of their own, and the last questions have to be cut
ROWS = [{**row, "start": "the film"} for row in questions(40, 2)]
ROWS += [{**ROWS[0], "sentence": "bad film " * 9}, {**ROWS[1], "options": ["good " * 20, "bad " * 20], "label": 0}]
LABELLED = {"text": "sentence", "text_pair": "start", "options": "options", "max_length": 14}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with its report on `ROWS`."""
    folder = tmp_path_factory.mktemp("choices")
    splits = [folder / "train.jsonl", folder / "validation.jsonl"]
    for path, rows in zip(splits, ([{**row, "start": "the film"} for row in questions(90, 1)], ROWS), strict=True):
        write(path, rows)
    labelled = LabelledConfig(train=str(splits[0]), validation=str(splits[1]), **LABELLED)  # type: ignore[arg-type]
    model = ModelConfig(init_from=str(tiny_bert(folder / "bert")), hidden_dropout=0.0, attention_dropout=0.0)
    task: Any = TASKS.get("multiple_choice").load()(RunConfig(task="multiple_choice", model=model, labelled=labelled))
    learned = task.build_model()
    train(task, learned, 25)
    config = described(task.model_config, task.export_class(task.model_config))
    export_huggingface(learned.state_dict(), config, saved_files(task.vocabulary), folder / "run" / "export", {})
    task.report(evaluate(task, learned), folder / "run" / "report")
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump({"labelled": asdict(labelled)}))
    return folder / "run"


@pytest.fixture(scope="module")
def chooser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of nobody's run."""
    return write_model(tmp_path_factory.mktemp("chooser"), "MultipleChoice", ("LABEL_0", "LABEL_1"))


def choices(folder: Path, rows: Rows, **options: Any) -> Rows:
    return list(predict_rows(PredictConfig(str(folder), "rows", "-", **options), rows))


def test_choices_are_those_of_the_report(run: Path, tmp_path: Path) -> None:
    written = tmp_path / "out.jsonl"
    config = PredictConfig(str(run), write(tmp_path / "in.jsonl", ROWS), str(written), probabilities=True)
    summary = predict_file(config)
    assert summary is not None
    assert summary.truncated >= 2
    with (run / "report" / "predictions.tsv").open(newline="") as file:
        reported = list(csv.DictReader(file, delimiter="\t"))
    rows = read_jsonl(written)
    assert [row["predicted_choice"] for row in rows] == [int(each["predicted"]) for each in reported]
    assert len({each["predicted"] for each in reported}) > 1
    for row, each in zip(rows, reported, strict=True):
        assert row["predicted_label"] == row["options"][row["predicted_choice"]]
        assert row["predicted_confidence"] == pytest.approx(float(each["confidence"]), abs=1e-5)
        assert len(row["predicted_probabilities"]) == len(row["options"])
        assert max(row["predicted_probabilities"]) == row["predicted_confidence"]
        assert sum(row["predicted_probabilities"]) == pytest.approx(1.0, abs=1e-4)


def test_choices_are_those_of_transformers(chooser: Path) -> None:
    texts = [text for text in some_texts(30, longest=9) if text.strip() and len(text) < 100]
    rows = [{"question": texts[at], "options": texts[at + 1 : at + 3 + at % 3]} for at in range(15)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(chooser)
    model = transformers.AutoModelForMultipleChoice.from_pretrained(chooser).eval()
    for row, ours in zip(rows, choices(chooser, rows, probabilities=True, batch_tokens=60), strict=True):
        pairs = ([row["question"]] * len(row["options"]), row["options"])
        inputs = tokenizer(*pairs, return_tensors="pt", padding=True, truncation=True, max_length=40)
        with torch.no_grad():
            theirs = model(**{name: tensor[None] for name, tensor in inputs.items()}).logits[0].softmax(0)
        assert ours["predicted_choice"] == int(theirs.argmax())
        assert ours["predicted_probabilities"] == pytest.approx(theirs.tolist(), abs=2e-5)


def test_options_may_have_columns_of_their_own(chooser: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("text,a,b,c\nwho,quick fox,lazy dog,Ada\n,code,cafés,London\n")
    config = PredictConfig(str(chooser), str(source), str(tmp_path / "o.csv"), options="a, b,c", probabilities=True)
    predict_file(config)
    with (tmp_path / "o.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lists: Rows = [{"question": row["text"], "options": [row["a"], row["b"], row["c"]]} for row in rows]
    for row, other in zip(rows, choices(chooser, lists, probabilities=True), strict=True):
        assert int(row["predicted_choice"]) == other["predicted_choice"]
        assert row["predicted_label"] == row["abc"[int(row["predicted_choice"])]]
        assert json.loads(row["predicted_probabilities"]) == pytest.approx(other["predicted_probabilities"], abs=1e-5)


def test_text_pair_begins_every_option(chooser: Path) -> None:
    (split,) = choices(chooser, [{"text": "who", "b": "lazy", "options": ("fox", "dog")}], text_pair="b")
    (whole,) = choices(chooser, [{"text": "who", "options": ["lazy fox", "lazy dog"]}])
    assert split["predicted_label"] == whole["predicted_label"].removeprefix("lazy ")
    assert split["predicted_confidence"] == whole["predicted_confidence"]


GOOD = {"question": "who", "options": ["fox", "dog"]}
MISTAKES: dict[str, tuple[Mapping[str, Any], str]] = {
    "no options": ({"question": "who"}, "line 2: no column 'options'; it has question; set options to one of them"),
    "no question": ({"options": ["a", "b"]}, "line 2: no column question or text or sentence; it has options; set"),
    "null question": ({**GOOD, "question": None}, "line 2: no text in column 'question'; fill it in or remove the row"),
    "null options": ({**GOOD, "options": None}, "line 2: column 'options' holds None; give a list of at least two"),
    "empty list": ({**GOOD, "options": []}, "line 2: 0 option(s) in column 'options'; give at least two"),
    "one option": ({**GOOD, "options": ["fox"]}, "line 2: 1 option(s) in column 'options'; give at least two"),
    "text for a list": ({**GOOD, "options": "fox, dog"}, "line 2: column 'options' holds 'fox, dog'; give a list"),
    "null option": ({**GOOD, "options": ["fox", None]}, "line 2: empty text in column 'options[1]'; fill it in or"),
    "number for an option": ({**GOOD, "options": [3, "fox"]}, "line 2: column 'options[0]' holds 3, which is not text"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_bad_row_is_named(name: str, chooser: Path, tmp_path: Path) -> None:
    record, message = MISTAKES[name]
    source = write(tmp_path / "in.jsonl", [GOOD, dict(record)])
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        predict_file(PredictConfig(str(chooser), source, str(tmp_path / "out.jsonl")))
    assert len(str(raised.value).splitlines()) == 1


def test_bad_columns_are_refused(chooser: Path) -> None:
    for given, message in {
        " , ": "options: ' , ' is not allowed; give a column of lists, or several as a,b,c",
        "options,options": "options[1]: 'options' is options already; name another column",
        "a,b": "no column 'a'; it has question, options; set options to one of them",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            choices(chooser, [GOOD], options=given)
    with pytest.raises(UserError, match="no column question or text or sentence; it has options"):
        choices(chooser, [{"options": ["a", "b"]}])
