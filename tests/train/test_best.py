"""Fine-tuning exports its best weights, also over a resume, and reports on the test file what they are worth.

The validation examples have the labels of the training examples exchanged: the more a model learns, the worse it gets.
"""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from engine.data.tokenizer.wordpiece import load_tokenizer
from launch.curves import Curve
from tests.train.runs import losses
from tests.train.watch.policy_worker import trained

OTHER = {"tool": "fruit", "fruit": "tool"}
WORDS = {"tool": ["type", "file", "list", "code"], "fruit": ["name", "time", "line", "data"]}
STEPS = 12


def sentences(tools: int, fruits: int) -> list[tuple[str, str]]:
    """Sentences in which one word tells the class, and that class."""
    kinds = ["tool"] * tools + ["fruit"] * fruits
    return [(f"this is the {WORDS[kind][i % 4]} of a", kind) for i, kind in enumerate(kinds)]


def exchanged_rows() -> list[tuple[str, str]]:
    """Sentences of 14 tools and 6 fruits, each labelled as the other."""
    return [(text, OTHER[kind]) for text, kind in sentences(14, 6)]


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"sentence": text, "label": label}) + "\n" for text, label in rows))
    return path


@pytest.fixture(scope="module")
def options(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Training: 30 tools, 18 fruits. Validation: 14 fruits, 6 tools. Test: the validation examples twice."""
    folder = tmp_path_factory.mktemp("labelled")
    vocabulary = load_tokenizer(store / "tokenizer").vocab_size
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    BertModel(BertConfig(vocab_size=vocabulary, max_position_embeddings=64, **sizes)).save_pretrained(folder / "bert")
    shutil.copytree(store / "tokenizer", folder / "bert", dirs_exist_ok=True)
    return [
        "--task=sequence_classification", f"--model.init_from={folder / 'bert'}",
        f"--labelled.train={write(folder / 'train.jsonl', sentences(30, 18))}",
        f"--labelled.validation={write(folder / 'validation.jsonl', exchanged_rows())}",
        f"--labelled.test={write(folder / 'test.jsonl', 2 * exchanged_rows())}",
        "--labelled.max_length=16", "--labelled.metric=loss", "--optim.warmup=0", "--optim.schedule=constant",
        "--optim.learning_rate=1e-3", "--train.eval_interval=3", "--train.save_interval=3", "--resume=auto",
        f"--train.steps={STEPS}",
    ]  # fmt: skip


def tune(rank: Pool, output: Path, options: list[str], *more: str) -> tuple[dict[str, Any], Curve]:
    """Train to the end; the report, and the curve of the held-out loss."""
    assert rank.apply(trained, (output, [*options, *more], {})) == "done"
    report: dict[str, Any] = json.loads((output / "report" / "report.json").read_text())
    return report, losses(output, "eval/loss")


@pytest.fixture(scope="module")
def tuned(one_rank: Pool, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of which the first evaluation is the best."""
    output = tmp_path_factory.mktemp("tuned")
    _, curve = tune(one_rank, output, options)
    assert [step for step, _ in curve] == [3, 6, 9, 12]
    assert all(earlier + 0.005 < later for (_, earlier), (_, later) in pairwise(curve))
    return output


def test_the_report_is_of_the_test_file_and_of_the_best_weights(tuned: Path) -> None:
    report = json.loads((tuned / "report" / "report.json").read_text())
    assert report["examples"] == 40
    assert report["scores"]["loss"] == pytest.approx(losses(tuned, "eval/loss")[0][1], rel=1e-5)


def test_transformers_finds_the_best_weights_in_the_export(tuned: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tuned / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(tuned / "export")
    rows = exchanged_rows()
    batch = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
    labels = torch.tensor([model.config.label2id[label] for _, label in rows])
    with torch.no_grad():
        loss = model(**batch, labels=labels).loss.item()
    assert loss == pytest.approx(losses(tuned, "eval/loss")[0][1], rel=1e-4)


def test_the_baseline_answers_what_training_has_most_of_and_counts_the_truth(tuned: Path) -> None:
    """Training has more tools, validation and test more fruits; the model answers tool to everything."""
    report = json.loads((tuned / "report" / "report.json").read_text())
    assert report["majority_baseline"] == {"label": "tool", "accuracy": pytest.approx(12 / 40)}
    assert report["labels"] == ["fruit", "tool"]
    assert report["confusion_matrix"] == [[0, 28], [0, 12]]


def test_a_resume_goes_on_from_the_best_value_too(
    one_rank: Pool, options: list[str], tuned: Path, tmp_path: Path
) -> None:
    """What comes after the resume is worse than what came before, and must not be exported."""
    tune(one_rank, tmp_path, options, f"--train.steps={STEPS // 2}")
    report, curve = tune(one_rank, tmp_path, options)
    assert curve == losses(tuned, "eval/loss")
    assert report["scores"]["loss"] == pytest.approx(curve[0][1], rel=1e-5)


def test_of_equal_values_the_first_is_the_best(one_rank: Pool, options: list[str], tmp_path: Path) -> None:
    """More of the same score is overfitting: its loss is higher."""
    report, curve = tune(one_rank, tmp_path, options, "--labelled.metric=accuracy")
    assert len({value for _, value in losses(tmp_path, "eval/accuracy")}) == 1
    assert report["scores"]["loss"] == pytest.approx(curve[0][1], rel=1e-5)


def test_without_a_test_file_the_report_is_of_the_validation_examples(
    one_rank: Pool, options: list[str], tmp_path: Path
) -> None:
    without = [option for option in options if not option.startswith("--labelled.test")]
    report, _ = tune(one_rank, tmp_path, without, "--train.steps=1")
    assert report["examples"] == 20
