"""Answers in a text are those of the report of the run that trained the model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from engine.config import LabelledConfig, ModelConfig, RunConfig
from engine.errors import UserError
from engine.model.folder import described, export_huggingface, saved_files
from engine.predict.options import PredictConfig
from engine.predict.stream import predict_file, predict_rows
from engine.tasks.answers.nbest import THRESHOLD
from engine.tasks.answers.report import Answers
from engine.tasks.answers.task import QuestionAnswering
from tests.predict.models import POSITIONS, SENTENCE, change_config, read_jsonl, write_model
from tests.tasks.answers.test_task import evaluate, rows_of, save_folder, train, write

LABELLED = {"max_length": 28, "stride": 8, "max_answer_length": 4}
ROWS = rows_of(60, 2, none=0.4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Answers]:
    """A run's folder, and what its report says of `ROWS`."""
    folder = tmp_path_factory.mktemp("answers")
    splits = [write(folder / f"{seed}.jsonl", rows) for seed, rows in enumerate((rows_of(120, 1, 0.4), ROWS))]
    model = ModelConfig(init_from=str(save_folder(folder / "bert")), hidden_dropout=0.0, attention_dropout=0.0)
    labelled = LabelledConfig(train=splits[0], validation=splits[1], **LABELLED)
    task = QuestionAnswering(RunConfig(task="question_answering", model=model, labelled=labelled))
    learned, _ = train(task, 60)
    evaluation = evaluate(task, learned)
    config = described(task.model_config, task.export_class(task.model_config))
    files, origin = saved_files(task.vocabulary), {"tuned": evaluation.tuned}
    export_huggingface(learned.state_dict(), config, files, folder / "run" / "export", origin)
    task.report(evaluation, folder / "run" / "report")
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump({"labelled": LABELLED}))
    answers: Answers = evaluation.records["answers"]
    return folder / "run", answers


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of nobody's run."""
    return write_model(tmp_path_factory.mktemp("reader"), "QuestionAnswering", ("LABEL_0", "LABEL_1"))


def answers(folder: Path, rows: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    return list(predict_rows(PredictConfig(str(folder), "rows", "-", **options), rows))


def test_answers_are_those_of_the_report(trained: tuple[Path, Answers], tmp_path: Path) -> None:
    run, reported = trained
    written = tmp_path / "out.jsonl"
    predict_file(PredictConfig(str(run), write(tmp_path / "in.jsonl", ROWS), str(written), batch_tokens=200))
    rows, texts = read_jsonl(written), json.loads((run / "report" / "predictions.json").read_text())
    assert {row["id"]: row["predicted_answer"] for row in rows} == texts
    assert 5 < sum(text == "" for text in texts.values()) < 50
    for row, found in zip(rows, reported.candidates, strict=True):
        start, end = row["predicted_start"], row["predicted_end"]
        assert row["context"][start:end] == row["predicted_answer"]
        assert (start, end) == (found.best[0].span if row["predicted_answer"] else (0, 0))
        shares = {each.span: share for each, share in found.ranked(null=True)}
        assert row["predicted_confidence"] == pytest.approx(shares.get((start, end), 0.0), abs=1e-5)
        assert not {"answers", "id", "question"} - row.keys()


def test_chunks_do_not_change_answers(trained: tuple[Path, Answers]) -> None:
    run, _ = trained
    whole, single = (answers(run, ROWS, chunk_rows=size) for size in (2048, 1))
    for one, other in zip(whole, single, strict=True):
        assert other == {**one, "predicted_confidence": pytest.approx(one["predicted_confidence"], abs=1e-5)}


def test_answers_are_those_of_transformers(reader: Path) -> None:
    """The pipeline joins windows another way, so these contexts fit into one."""
    words = SENTENCE.split()
    rows = [
        {"question": " ".join(words[at : at + 3]), "context": " ".join(words[at % 7 : at % 7 + 4 + at % 3])}
        for at in range(12)
    ]
    tokenizer = transformers.AutoTokenizer.from_pretrained(reader)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(reader).eval()
    for row, predicted in zip(rows, answers(reader, rows), strict=True):
        inputs = tokenizer(row["question"], row["context"], return_tensors="pt", return_offsets_mapping=True)
        offsets, sides = inputs.pop("offset_mapping")[0].tolist(), inputs.sequence_ids(0)
        output = model(**inputs)
        scores = {
            (offsets[first][0], offsets[last][1]): float(output.start_logits[0, first] + output.end_logits[0, last])
            for first in range(len(offsets))
            for last in range(first, len(offsets))
            if sides[first] == sides[last] == 1
        }
        assert (predicted["predicted_start"], predicted["predicted_end"]) == max(scores, key=lambda span: scores[span])


def test_without_a_threshold_every_question_gets_an_answer(reader: Path, tmp_path: Path) -> None:
    rows = [{"question": "who writes code", "context": SENTENCE} for _ in range(3)]
    assert all(row["predicted_answer"] for row in answers(reader, rows))
    strict = write_model(tmp_path / "strict", "QuestionAnswering", ("LABEL_0", "LABEL_1"), **{THRESHOLD: -1e4})
    assert [row["predicted_answer"] for row in answers(strict, rows)] == [""] * 3
    change_config(strict, {THRESHOLD: "high"})
    with pytest.raises(UserError, match=r"config\.json: null_threshold 'high' is not a number; correct it"):
        answers(strict, rows)


def test_columns_have_any_names_and_odd_texts_an_answer(reader: Path) -> None:
    odd = ["", " \n", "\u200b", "fox", "漢字 " * 40, SENTENCE * 9]
    rows = answers(reader, [{"q": "who", "body": text} for text in odd], text="q", text_pair="body")
    for row, text in zip(rows, odd, strict=True):
        start, end = row["predicted_start"], row["predicted_end"]
        assert text[start:end] == row["predicted_answer"]
        assert 0.0 < row["predicted_confidence"] <= 1.0
        assert bool(row["predicted_answer"]) == (text not in odd[:3])
    assert rows[0]["predicted_confidence"] == 1.0
    (row,) = answers(reader, [{"question": "", "context": "fox"}])
    assert row["predicted_answer"] == "fox"


def test_windows_shorter_than_the_run_s_share_less(trained: tuple[Path, Answers]) -> None:
    """A stride that leaves no room at the wanted length would refuse every long context."""
    run, _ = trained
    assert all(row["predicted_confidence"] > 0 for row in answers(run, ROWS[:9], max_length=14))


def test_a_table_has_a_column_of_each(reader: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text(f"question,context\nwho,{SENTENCE}\n")
    predict_file(PredictConfig(str(reader), str(source), str(tmp_path / "out.csv")))
    head = (tmp_path / "out.csv").read_text().splitlines()[0]
    assert head == "question,context,predicted_answer,predicted_start,predicted_end,predicted_confidence"


GOOD = {"question": "who", "context": SENTENCE}
MISTAKES: dict[str, tuple[Mapping[str, Any], str]] = {
    "no context": ({"question": "who"}, "line 2: no column 'context'; it has question; set text_pair to one of them"),
    "no question": ({"context": "fox"}, "line 2: no column 'question'; it has context; set text to one of them"),
    "null context": ({**GOOD, "context": None}, "line 2: no text in column 'context'; fill it in or remove the row"),
    "null question": ({**GOOD, "question": None}, "line 2: no text in column 'question'; fill it in or remove the row"),
    "number for context": ({**GOOD, "context": 7}, "line 2: column 'context' holds 7, which is not text"),
    "list for question": ({**GOOD, "question": ["a"]}, "line 2: column 'question' holds ['a'], which is not text"),
    "long question": (
        {**GOOD, "question": "fox " * 60},
        "line 2: the question has 60 tokens and leaves room for 0 of the context, which must be more than the "
        f"{POSITIONS // 3} that windows share; shorten it, or raise max_length as far as the model has positions",
    ),
    "long question, no context": ({"question": "fox " * 60, "context": ""}, "line 2: the question has 60 tokens"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_bad_row_is_named(name: str, reader: Path, tmp_path: Path) -> None:
    record, message = MISTAKES[name]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, record)))
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        predict_file(PredictConfig(str(reader), str(source), str(tmp_path / "out.jsonl"), text="question"))
    assert len(str(raised.value).splitlines()) == 1


def test_options_without_effect_are_refused(reader: Path) -> None:
    with pytest.raises(UserError, match="probabilities: True has no effect: question_answering has no such thing"):
        answers(reader, [GOOD], probabilities=True)
    with pytest.raises(UserError, match="options: 'a,b' has no effect: question_answering has no such thing"):
        answers(reader, [GOOD], options="a,b")
    with pytest.raises(UserError, match="text_pair: 'context' is text already; name another column"):
        answers(reader, [GOOD], text="context")
    with pytest.raises(UserError, match="no column question; it has text, context; set text to one of them"):
        answers(reader, [{"text": "who", "context": "fox"}])
