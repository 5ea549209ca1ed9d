"""Regression, several labels and choices train alike on every layout, and transformers computes their exports' loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from launch.curves import Curve
from tests.tasks.labels import ROWS, write
from tests.tasks.tiny import tiny_bert
from tests.train.runs import NO_DROPOUT, losses, run

BOUND = 1e-4
STEPS = 5
CLASSES = {
    "regression": "AutoModelForSequenceClassification",
    "multi_label_classification": "AutoModelForSequenceClassification",
    "multiple_choice": "AutoModelForMultipleChoice",
    "sequence_classification": "AutoModelForSequenceClassification",
}
MORE = {"sequence_classification": ["--labelled.class_weights=balanced", "--labelled.label_smoothing=0.1"]}


def train(
    folder: Path, output: Path, task: str, ranks: int, stage: int, accumulation: int, *more: str
) -> tuple[Curve, Any]:
    """The curve of the loss, and the scores of the report."""
    options = [
        f"--task={task}", f"--model.init_from={folder / 'bert'}", f"--labelled.train={folder / 'train.jsonl'}",
        f"--labelled.validation={folder / 'validation.jsonl'}", "--labelled.max_length=14", f"--train.steps={STEPS}",
        f"--train.micro_batch={16 // ranks // accumulation}", f"--train.zero_stage={stage}",
        "--train.save_interval=null", "--optim.learning_rate=5e-3", "--optim.schedule=constant", "--optim.warmup=0",
    ]  # fmt: skip
    run(output, *options, *NO_DROPOUT, *MORE.get(task, []), *more, ranks=ranks)
    return losses(output), json.loads((output / "report" / "report.json").read_text())["scores"]


@pytest.mark.parametrize(
    ("task", "stage"),
    [
        pytest.param("regression", 2, marks=pytest.mark.slow),  # a classifier but for its loss
        ("multi_label_classification", 3),
        pytest.param("multiple_choice", 3, marks=pytest.mark.slow),
        pytest.param("regression", 3, marks=pytest.mark.slow),
        pytest.param("multi_label_classification", 2, marks=pytest.mark.slow),
        pytest.param("multiple_choice", 2, marks=pytest.mark.slow),
        pytest.param("sequence_classification", 2, marks=pytest.mark.slow),
        pytest.param("sequence_classification", 3, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_learn_what_one_learns_and_transformers_opens_it(tmp_path: Path, task: str, stage: int) -> None:
    tiny_bert(tmp_path / "bert")
    rows = ROWS[task](24, 2)
    write(tmp_path / "train.jsonl", ROWS[task](90, 1))
    write(tmp_path / "validation.jsonl", rows)
    alone, scores = train(tmp_path, tmp_path / "one", task, 1, 0, 1)
    together, scores_together = train(tmp_path, tmp_path / "two", task, 2, stage, 2)
    worst = max(abs(ours - theirs) / theirs for (_, ours), (_, theirs) in zip(together, alone, strict=True))
    print(f"{task}, 2 ranks, ZeRO-{stage}, accumulation 2: largest relative difference {worst:.1e}")
    assert len(together) == STEPS
    assert worst < BOUND
    assert scores_together == pytest.approx(scores, rel=BOUND)
    assert transformers_loss(tmp_path / "two" / "export", task, rows) == pytest.approx(
        scores["mse" if task == "regression" else "loss"], rel=1e-4
    )


def transformers_loss(folder: Path, task: str, rows: list[dict[str, Any]]) -> float:
    """The mean over examples of what transformers' own loss is of each."""
    model = getattr(transformers, CLASSES[task]).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        firsts, seconds, label = [row["sentence"]], None, row["label"]
        if task == "multiple_choice":
            firsts, seconds = firsts * len(row["options"]), row["options"]
        inputs = tokenizer(firsts, seconds, return_tensors="pt", padding=True, truncation=True, max_length=14)
        if task == "multiple_choice":
            inputs, labels = {name: values[None] for name, values in inputs.items()}, torch.tensor([label])
        elif task == "multi_label_classification":
            labels = torch.tensor([[float(name in label) for name in model.config.label2id]])
        else:
            labels = torch.tensor([model.config.label2id.get(str(label), label)])
        with torch.no_grad():
            found.append(float(model(**inputs, labels=labels).loss))
    return sum(found) / len(found)
