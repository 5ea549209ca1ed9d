"""Facts about fine-tuning for answers, on a tiny BERT in a real Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering, BertModel

from engine.config import LabelledConfig, ModelConfig, RunConfig
from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor
from engine.data.tokenizer.wordpiece import load_tokenizer
from engine.errors import UserError
from engine.model.folder import described, export_huggingface, saved_files
from engine.tasks.answers.nbest import Candidate, Candidates
from engine.tasks.answers.report import Answers, nbest
from engine.tasks.answers.task import QuestionAnswering
from engine.tasks.outcomes import read_outcomes
from engine.tasks.task import Evaluation
from tests.tasks import tiny
from tests.tasks.tiny import evaluate

NAMES = [*"bcdefghijklm"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "who", "is", "old", "the", "and", "of", ".", *NAMES]
TINY = BertConfig(
    vocab_size=len(WORDS),
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
)

MakeTask = Callable[..., QuestionAnswering]


def rows_of(count: int, seed: int, none: float = 0.0) -> list[dict[str, Any]]:
    """Contexts of random words in which the answer is a word of three; a share `none` of them lacks it."""
    generator = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        words = generator.choice(NAMES[3:], size=generator.integers(6, 40)).tolist()
        place, right = int(generator.integers(0, len(words))), str(generator.choice(NAMES[:3]))
        has = generator.random() >= none
        if has:
            words[place] = right
        answers = [{"text": right, "answer_start": len(" ".join([*words[:place], ""]))}] if has else []
        rows.append({"id": f"q{index}", "question": "who is old", "context": " ".join(words), "answers": answers})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def save_folder(folder: Path) -> Path:
    torch.manual_seed(0)
    BertModel(TINY).save_pretrained(folder)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    load_tokenizer(folder / "vocab.txt").save(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_folder(tmp_path / "bert")


@pytest.fixture
def make_task(tmp_path: Path, folder: Path) -> MakeTask:
    def make(none: float = 0.0, **changes: Any) -> QuestionAnswering:
        values: dict[str, Any] = {
            "train": write(tmp_path / "train.jsonl", rows_of(120, 1, none)),
            "validation": write(tmp_path / "validation.jsonl", rows_of(31, 2, none)),
            "max_length": 28,
            "stride": 8,
        } | changes
        model = ModelConfig(init_from=str(folder), hidden_dropout=0.0, attention_dropout=0.0)
        return QuestionAnswering(RunConfig(task="question_answering", model=model, labelled=LabelledConfig(**values)))

    return make


def texts_of(evaluation: Evaluation) -> dict[str, str]:
    return {key: each.text for key, each in evaluation.records["answers"].given().items()}


def train(task: QuestionAnswering, steps: int) -> tuple[torch.nn.Module, list[float]]:
    model = task.build_model()
    return model, tiny.train(task, model, steps, rate=1e-2, batch=32)


def test_training_finds_answers_and_lacks_of_them(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task(none=0.4, test=write(tmp_path / "test.jsonl", rows_of(20, 3, 0.4)))
    model, losses = train(task, 80)
    assert losses[-1] < 0.1 * losses[0]
    evaluation = evaluate(task, model)
    assert evaluation.scalars["f1"] > 0.9
    assert {"has_answer_f1", "no_answer_accuracy", "loss", "exact_match"} <= evaluation.scalars.keys()
    assert evaluation.tuned.keys() == {"null_threshold"}
    check_export(task, model, evaluation, tmp_path)


def check_export(task: QuestionAnswering, model: torch.nn.Module, evaluation: Evaluation, tmp_path: Path) -> None:
    """The export's threshold decides on the test questions, and transformers finds the same spans."""
    config = described(task.model_config, task.export_class(task.model_config))
    out, files = tmp_path / "export", saved_files(task.vocabulary)
    export_huggingface(model.state_dict(), config, files, out, {"tuned": {"null_threshold": -1e4}})
    opened = task.load_export(out)
    assert texts_of(evaluate(task, opened, split="test")) == {f"q{index}": "" for index in range(20)}
    export_huggingface(model.state_dict(), config, files, out, {"tuned": evaluation.tuned})
    given = evaluate(task, task.load_export(out), split="test").records["answers"]
    assert given.threshold == evaluation.tuned["null_threshold"]
    assert given.reason == "chosen on the validation questions"
    theirs, words = BertForQuestionAnswering.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    for question, found in zip(given.questions, given.candidates, strict=True):
        options = {"truncation": "only_second", "max_length": 28, "stride": 8, "return_overflowing_tokens": True}
        inputs = words(question.text, question.context, return_offsets_mapping=True, **options)
        if question.answers or len(inputs["input_ids"]) == 1:
            assert found.best[0].text == their_answer(theirs, inputs, question.context)


@torch.no_grad()
def their_answer(model: Any, inputs: Any, context: str) -> str:
    """The answer as the scripts of transformers choose it, with windows that begin elsewhere than ours at the end."""
    best, text = -np.inf, ""
    for window, ids in enumerate(inputs["input_ids"]):
        types = torch.tensor([inputs["token_type_ids"][window]])
        output = model(input_ids=torch.tensor([ids]), token_type_ids=types)
        sides = inputs.sequence_ids(window)
        for first, last in ((s, e) for s in range(len(ids)) for e in range(s, min(s + 30, len(ids)))):
            score = float(output.start_logits[0, first] + output.end_logits[0, last])
            if sides[first] == sides[last] == 1 and score > best:
                offsets = inputs["offset_mapping"][window]
                best, text = score, context[offsets[first][0] : offsets[last][1]]
    return text


def test_scores_do_not_depend_on_the_batches(make_task: MakeTask) -> None:
    task = make_task()
    model, _ = train(task, 10)
    one, other = evaluate(task, model, 1), evaluate(task, model, 64)
    assert one.scalars == pytest.approx(other.scalars, rel=1e-5)
    assert texts_of(one) == texts_of(other)
    assert one.tuned == {}


def test_shares_of_micro_batches_add_up_to_the_global_batch(make_task: MakeTask) -> None:
    task = make_task()
    model = task.build_model()
    sums = []
    for size in (16, 4):
        batches = training_batches(task.train_source(), BatchLayout(16, size), Cursor(), workers=0)
        sums.append(sum(task.step(model, next(batches)).loss.item() for _ in range(16 // size)))
    assert sums[0] == pytest.approx(sums[1], rel=1e-6)


def test_the_report_has_the_official_files(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task(none=0.3)
    evaluation = evaluate(task, task.build_model())
    text = task.report(evaluation, tmp_path / "report")
    assert text.startswith("exact match ")
    names = ("predictions.json", "nbest_predictions.json", "null_odds.json", "report.json")
    predictions, several, odds, report = (json.loads((tmp_path / "report" / name).read_text()) for name in names)
    ids = [f"q{index}" for index in range(31)]
    assert list(predictions) == list(several) == list(odds) == ids
    for key in ids:
        assert several[key][0].keys() == {"text", "probability", "start_logit", "end_logit"}
        assert sum(each["probability"] for each in several[key]) == pytest.approx(1.0)
        expected = "" if odds[key] > report["null_threshold"] else next(e["text"] for e in several[key] if e["text"])
        assert predictions[key] == expected
    assert report["questions"] == report["with_answer"] + report["without_answer"] == 31
    assert report["exact_match_interval_95"][0] <= report["exact_match"] <= report["exact_match_interval_95"][1]
    assert (tmp_path / "report" / "report.txt").read_text() == text


def test_a_report_without_texts_has_none(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task(none=0.3)
    task.config.monitor.texts = False
    evaluation = evaluate(task, task.build_model())
    task.report(evaluation, tmp_path / "report")
    for path in (tmp_path / "report").glob("*"):
        content = path.read_text()
        assert not [name for name in NAMES if f'"{name}"' in content or f'"{name} ' in content], path
    spans = json.loads((tmp_path / "report" / "predictions.json").read_text())
    questions = {question.id: question for question in task.sources["validation"].questions}
    for key, text in texts_of(evaluation).items():
        assert questions[key].context[slice(*spans[key])] == text
    outcomes = read_outcomes(tmp_path / "report")
    assert len(outcomes) == 31
    assert outcomes.scores["f1"].mean() == pytest.approx(evaluation.scalars["f1"])


def test_answers_alone_have_no_odds(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    evaluation = evaluate(task, task.build_model())
    task.report(evaluation, tmp_path / "report")
    assert not (tmp_path / "report" / "null_odds.json").exists()
    assert evaluation.scalars.keys() == {"loss", "f1", "exact_match"}
    assert all(each["text"] for each in nbest(evaluation.records["answers"])["q0"])


def test_the_threshold_is_tuned_for_the_highest_f1(make_task: MakeTask) -> None:
    questions = make_task(none=0.5).sources["validation"].questions[:8]
    found = [
        Candidates([Candidate(question.answers[0].text if question.answers else "x", (0, 1), 1.0, 1.0)],
                   Candidate("", (0, 0), 0.0, 9.0 - (8.0 if question.answers else 0.0)))
        for question in questions
    ]  # fmt: skip
    answers = Answers.of(questions, found, 0.0).tuned()
    assert answers.scores() == {
        "f1": 1.0, "exact_match": 1.0, "has_answer_f1": 1.0, "has_answer_exact_match": 1.0, "no_answer_accuracy": 1.0,
    }  # fmt: skip
    assert answers.threshold == 3.0
    assert Answers.of(questions, found, 10.0).scores()["no_answer_accuracy"] == 0.0


def test_validation_is_held_out_by_context(make_task: MakeTask) -> None:
    task = make_task(validation=None)
    counts = [len(task.sources[split].questions) for split in ("train", "validation")]
    assert counts == [108, 12]
    assert task.evaluation_source("test") is None


def test_a_head_for_answers_is_trained_on_and_another_is_not(make_task: MakeTask, folder: Path) -> None:
    fresh = make_task().build_model().qa_outputs.weight
    given = BertForQuestionAnswering(TINY)
    given.save_pretrained(folder)
    assert torch.equal(make_task().build_model().qa_outputs.weight, given.qa_outputs.weight)
    values = json.loads((folder / "config.json").read_text()) | {"architectures": ["BertForTokenClassification"]}
    (folder / "config.json").write_text(json.dumps(values))
    assert torch.equal(make_task().build_model().qa_outputs.weight, fresh)


def test_classes_of_the_folder_are_none_of_the_model(make_task: MakeTask, folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text()) | {"id2label": {"0": "a", "1": "b", "2": "c"}}
    (folder / "config.json").write_text(json.dumps(values))
    assert make_task().model_config.num_labels == 2


def test_training_without_any_answer_is_refused(make_task: MakeTask, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: no question to learn from has an answer"):
        make_task(train=write(tmp_path / "none.jsonl", rows_of(5, 1, 1.0)))


def test_the_data_is_described(make_task: MakeTask) -> None:
    told = make_task(none=0.5).describe_data()
    assert told[0].startswith("train: 120 questions (")
    assert told[1].startswith("validation: 31 questions (")
