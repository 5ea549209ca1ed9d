"""Facts about regression, several labels, choices, and a classifier's weights, smoothing and order, on a tiny BERT."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import cohen_kappa_score, f1_score, mean_absolute_error, mean_squared_error
from torch.nn import functional

from engine.config import TASKS, LabelledConfig, RunConfig
from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor
from engine.errors import UserError
from engine.tasks.finetune import model_inputs
from engine.tasks.reports import multi_label, regression
from engine.train.checkpoint.folder import RunState, check_resumable
from tests.conftest import ROOT
from tests.tasks.labels import ROWS, SIZES, MakeTask, graded, labelled, questions, write
from tests.tasks.tiny import WORDS, evaluate, train

DATA = ROOT.parent / "shared" / "data" / "stsb"


@pytest.mark.parametrize(
    ("task", "metric", "least"),
    [
        ("regression", "pearson", 0.95),
        ("multi_label_classification", "micro_f1", 0.75),
        ("multiple_choice", "accuracy", 0.9),
        ("sequence_classification", "quadratic_kappa", 0.7),
    ],
)
def test_it_learns_what_its_words_tell(make: MakeTask, tmp_path: Path, task: str, metric: str, least: float) -> None:
    made = make(task, **({"loss": "ordinal"} if task == "sequence_classification" else {}))
    model = made.build_model()
    train(made, model, steps=150)
    evaluation = evaluate(made, model)
    assert evaluation.scalars[metric] > least
    assert metric in TASKS.get(task).metrics
    assert evaluation.scalars.keys() <= {*TASKS.get(task).metrics, "loss"}
    text = made.report(evaluation, tmp_path / "report")
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"report.txt", "report.json", "predictions.tsv"} <= names
    assert (tmp_path / "report" / "report.txt").read_text() == text
    assert len((tmp_path / "report" / "predictions.tsv").read_text().splitlines()) == 32
    assert "baseline" in text


@pytest.mark.parametrize("task", ROWS)
def test_shares_of_micro_batches_add_up_to_the_global_batch(make: MakeTask, task: str) -> None:
    options = {"class_weights": "0=0.5,2=3", "label_smoothing": 0.1} if task == "sequence_classification" else {}
    made = make(task, **options)
    model = made.build_model()
    sums = []
    for micro_batch in (16, 4):
        batches = training_batches(made.train_source(), BatchLayout(16, micro_batch), Cursor(), workers=0)
        outputs = [made.step(model, next(batches)) for _ in range(16 // micro_batch)]
        curves = [sum(float(part.metrics[name]) for part in outputs) for name in outputs[0].metrics]
        sums.append([sum(float(part.loss) for part in outputs), *curves])
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


@pytest.mark.parametrize("task", ROWS)
def test_an_evaluation_is_the_same_for_any_batch(make: MakeTask, task: str) -> None:
    made = make(task, group_by_length=True)
    model = made.build_model()
    train(made, model, 20)  # else predictions hardly differ, and correlations are those of their rounding
    assert evaluate(made, model, 1).scalars == pytest.approx(evaluate(made, model, 31).scalars, rel=1e-5, abs=1e-6)


def test_weights_and_smoothing_are_torchs_and_leave_the_evaluations_loss(make: MakeTask) -> None:
    plain, weighted = (
        make("sequence_classification"),
        make("sequence_classification", class_weights="balanced", label_smoothing=0.2),
    )
    model = plain.build_model()
    batch = next(training_batches(weighted.train_source(), BatchLayout(16, 16), Cursor(), workers=0))
    labels = torch.tensor([row["label"] for row in graded(*SIZES["train"])])
    weights = (len(labels) / (4 * labels.bincount())).float()
    logits = model(**model_inputs(batch))
    expected = functional.cross_entropy(logits, batch.inputs["labels"], weights, label_smoothing=0.2)
    assert weighted.step(model, batch).loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert evaluate(weighted, model).scalars == evaluate(plain, model).scalars


def test_scores_of_an_order_count_absent_classes(make: MakeTask, tmp_path: Path) -> None:
    made = make("sequence_classification", loss="ordinal")
    evaluation = evaluate(made, made.build_model())
    predictions = evaluation.records["predictions"]
    kappa = cohen_kappa_score(predictions.truth, predictions.predicted, labels=range(4), weights="quadratic")
    assert f"\nquadratic weighted kappa {kappa:.4f}, " in made.report(evaluation, tmp_path / "report")
    scalars = evaluation.scalars
    assert scalars["quadratic_kappa"] == pytest.approx(kappa)
    assert scalars["rank_error"] == pytest.approx(np.abs(predictions.truth - predictions.predicted).mean())


def test_a_regressions_scores_are_scipys_and_a_constant_correlates_with_nothing() -> None:
    generator = np.random.default_rng(1)
    truth = generator.integers(0, 5, 40).astype(float)
    predicted = truth + generator.normal(size=40)
    assert regression.scores(truth, predicted) == pytest.approx(
        {
            "pearson": pearsonr(truth, predicted)[0],
            "spearman": spearmanr(truth, predicted)[0],
            "mse": mean_squared_error(truth, predicted),
            "mae": mean_absolute_error(truth, predicted),
        }
    )
    found = regression.scores(truth, np.full(40, 2.0))
    assert (found["pearson"], found["spearman"]) == (0.0, 0.0)
    low, high = regression.correlation_interval(0.5, 28)  # atanh(0.5) - 1.96 / 5 and + 1.96 / 5
    assert (low, high) == pytest.approx((0.156, 0.736), abs=1e-3)


def test_thresholds_give_each_label_its_best_f1() -> None:
    generator = np.random.default_rng(3)
    truth = generator.random((60, 3)) < 0.3
    truth[:, 2] = False
    probabilities = np.clip(truth * 0.2 + generator.random((60, 3)) * 0.5, 0.0, 1.0).round(2)
    found = multi_label.tune(truth, probabilities)
    assert found[2] == 0.5
    for label in (0, 1):
        every = [f1_score(truth[:, label], probabilities[:, label] >= cut / 200) for cut in range(1, 200, 2)]
        assert f1_score(truth[:, label], probabilities[:, label] >= found[label]) == pytest.approx(max(every))


def test_thresholds_of_an_export_are_used(make: MakeTask, tmp_path: Path) -> None:
    made = make("multi_label_classification")
    model = made.build_model()
    tuned = evaluate(made, model)
    assert tuned.tuned["thresholds"].keys() == {"bad", "film", "good"}
    made.thresholds = np.array([2.0, 2.0, 2.0])
    assert evaluate(made, model).scalars["micro_f1"] == 0.0
    assert tuned.scalars["micro_f1"] > 0.0


def test_several_columns_of_marks_are_the_lists_of_their_names(make: MakeTask, tmp_path: Path) -> None:
    rows = labelled(*SIZES["train"])
    names = ("bad", "film", "good")
    lines = [f"{row['sentence']}\t" + "\t".join(str(int(name in row["label"])) for name in names) for row in rows]
    (tmp_path / "marks.tsv").write_text("\n".join(["sentence\t" + "\t".join(names), *lines]) + "\n")
    texts = [f"{row['sentence']}\t{'|'.join(row['label'])}" for row in rows]
    (tmp_path / "bars.tsv").write_text("\n".join(["sentence\tlabel", *texts]) + "\n")
    given = make("multi_label_classification", validation=None)
    marks = make(
        "multi_label_classification", train=str(tmp_path / "marks.tsv"), validation=None, label="bad, film,good"
    )
    bars = make("multi_label_classification", train=str(tmp_path / "bars.tsv"), validation=None, separator="|")
    for other in (marks, bars):
        assert other.names == given.names
        for split in ("train", "validation"):
            assert np.array_equal(other.sources[split].labels, given.sources[split].labels)
    assert given.sources["validation"].count == 9
    assert not given.sources["train"].labels.any(axis=1).all(), "a text without labels is an example"


def test_options_in_columns_follow_the_beginning_that_they_share(make: MakeTask, tmp_path: Path) -> None:
    """As SWAG's files have them, and as transformers' script reads them."""
    rows = ["sentence,start,ending0,ending1,label", "the film,it was,good,bad,0", "a film,the film was,bad,good,B"] * 10
    (tmp_path / "swag.csv").write_text("\n".join(rows[:1] + [row for row in rows if row != rows[0]]) + "\n")
    path = str(tmp_path / "swag.csv")
    made = make("multiple_choice", train=path, validation=path, text_pair="start", options="ending0,ending1")
    batch = made.sources["validation"].collate(np.array([1, 0]))
    ids = batch["input_ids"].split(batch["lengths"].tolist())
    read = [" ".join(WORDS[token] for token in sequence) for sequence in ids]
    assert read[0] == "[CLS] a film [SEP] the film was bad [SEP]"
    assert read[3] == "[CLS] the film [SEP] it [UNK] bad [SEP]".replace("it [UNK]", "[UNK] was")
    assert batch["labels"].tolist() == [1, 0]
    assert (batch["question"].tolist(), batch["option"].tolist()) == ([0, 0, 1, 1], [0, 1, 0, 1])


def test_a_question_counts_once_in_orders_lengths_and_totals(make: MakeTask) -> None:
    source = make("multiple_choice").train_source()
    rows = questions(*SIZES["train"])
    assert source.epoch_size(0) == 90
    counted = sum(float(source.counts[index]) for index in source.describe(0, np.arange(7)))
    assert source.totals(0, np.arange(7)) == {"questions": 7.0, "sequences": counted}
    order = source.describe(0, np.arange(90))
    assert sorted(order.tolist()) == list(range(90))
    batch = source.collate(order[:5])
    assert len(batch["lengths"]) == sum(len(rows[index]["options"]) for index in order[:5])
    assert source.lengths(0, np.arange(5)).sum() == len(batch["input_ids"])


@pytest.mark.skipif(not DATA.is_dir(), reason="STS-B is not here")
def test_sts_b_is_read_as_it_is(make: MakeTask) -> None:
    files = {split: str(DATA / f"{name}.jsonl.gz") for split, name in (("train", "train"), ("validation", "dev"))}
    columns = {"text": "sentence1", "text_pair": "sentence2", "label": "score"}
    made = make("regression", **files, **columns, max_unknown_share=1.0)
    labels = made.sources["train"].labels
    assert (len(labels), labels.min(), labels.max()) == (5749, 0.0, 5.0)
    assert made.model_config.id2label == {0: "score"}
    assert made.model_config.problem_type == "regression"
    assert "train: 5,749 examples: numbers from 0 to 5, mean 2.7" in made.describe_data()[0]


@pytest.mark.parametrize(
    ("task", "field", "value"),
    [
        ("sequence_classification", "class_weights", "balanced"),
        ("sequence_classification", "label_smoothing", 0.1),
        ("sequence_classification", "loss", "ordinal"),
        ("token_classification", "class_weights", "balanced"),
        ("token_classification", "label_smoothing", 0.1),
        ("multi_label_classification", "separator", ";"),
        ("multiple_choice", "options", "choices"),
    ],
)
def test_a_resume_keeps_what_the_loss_depends_on(tmp_path: Path, task: str, field: str, value: object) -> None:
    before, after = (RunConfig(task=task, labelled=LabelledConfig(**more)).to_dict() for more in ({}, {field: value}))
    state = RunState(step=1, cursor=Cursor(), world_size=1, config=before, facts={})
    check_resumable(state, tmp_path, before)
    with pytest.raises(UserError, match=rf"^labelled\.{field}: '?{value}'? differs from "):
        check_resumable(state, tmp_path, after)


def test_a_quoted_name_may_hold_a_comma(make: MakeTask, tmp_path: Path) -> None:
    rows = [{"sentence": "good film", "label": label} for label in ("yes, sir", "no")] * 4
    path = write(tmp_path / "quoted.jsonl", rows)
    made = make("sequence_classification", train=path, validation=path, class_weights='"yes, sir=2.5", no=0.5')
    assert made.class_weights.tolist() == [0.5, 2.5]


@pytest.mark.parametrize("task", ROWS)
def test_a_limit_takes_training_examples_alone(make: MakeTask, task: str) -> None:
    whole, few, same, more = (make(task, limit=limit) for limit in (None, 20, 20, 30))
    assert [made.sources["train"].count for made in (whole, few, more)] == [90, 20, 30]
    prints = [{name: source.fingerprint for name, source in made.sources.items()} for made in (whole, few, same, more)]
    assert len({each["validation"] for each in prints}) == 1
    assert len({each["train"] for each in prints}) == 3
    assert prints[1] == prints[2]
    held = [make(task, validation=None, limit=limit).sources["validation"].fingerprint for limit in (None, 20)]
    assert held[0] == held[1]
