"""Facts about regression, several labels, choices, and a classifier's weights, smoothing and order, on a tiny BERT."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import cohen_kappa_score, f1_score, mean_absolute_error, mean_squared_error
from torch.nn import functional

from engine.config import TASKS, LabelledConfig, ModelConfig, RunConfig
from engine.data.loading.loader import BatchLayout, training_batches
from engine.data.loading.source import Cursor
from engine.errors import UserError
from engine.tasks.finetune import FineTuning, model_inputs
from engine.tasks.reports import multi_label, regression
from engine.train.checkpoint.folder import RunState, check_resumable
from tests.conftest import ROOT
from tests.tasks.tiny import WORDS, evaluate, tiny_bert, train

DATA = ROOT.parent / "shared" / "data" / "stsb"
Row = dict[str, Any]


def texts(count: int, seed: int) -> list[list[str]]:
    """Words of random number."""
    generator = np.random.default_rng(seed)
    return [generator.choice(WORDS[5:], size=generator.integers(1, 8)).tolist() for _ in range(count)]


def numbered(count: int, seed: int) -> list[Row]:
    """The number is that of "good" less that of "bad"."""
    return [{"sentence": " ".join(t), "label": t.count("good") - t.count("bad") / 2} for t in texts(count, seed)]


def labelled(count: int, seed: int) -> list[Row]:
    """Labels are the telling words of a text; some texts have none."""
    return [{"sentence": " ".join(t), "label": sorted({"good", "bad", "film"} & {*t})} for t in texts(count, seed)]


def questions(count: int, seed: int) -> list[Row]:
    """Two to four options, of which one says "good" and the others "bad"."""
    generator, rows = np.random.default_rng(seed), []
    for words in texts(count, seed):
        options = [f"{word} bad" for word in generator.choice(["film", "the", "was"], size=generator.integers(2, 5))]
        right = int(generator.integers(len(options)))
        options[right] = options[right].replace("bad", "good")
        rows.append({"sentence": " ".join(words[:3]), "options": options, "label": right})
    return rows


def graded(count: int, seed: int) -> list[Row]:
    """Classes 0 to 3, far from even: how often "good" is there."""
    return [{"sentence": " ".join(t), "label": min(t.count("good"), 3)} for t in texts(count, seed)]


ROWS: dict[str, Callable[[int, int], list[Row]]] = {
    "regression": numbered,
    "multi_label_classification": labelled,
    "multiple_choice": questions,
    "sequence_classification": graded,
}


def write(path: Path, rows: Sequence[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


MakeTask = Callable[..., Any]


@pytest.fixture
def make(tmp_path: Path) -> MakeTask:
    folder = tiny_bert(tmp_path / "bert")

    def make(task: str, **changes: Any) -> FineTuning:
        files = {name: write(tmp_path / f"{name}.jsonl", ROWS[task](*of)) for name, of in SIZES.items()}
        values: dict[str, Any] = {**files, "max_length": 14} | changes
        model = ModelConfig(init_from=str(folder), hidden_dropout=0.0, attention_dropout=0.0)
        config = RunConfig(task=task, model=model, labelled=LabelledConfig(**values))
        config.validate()
        config.monitor.tensorboard = False
        made: FineTuning = TASKS.get(task).load()(config)
        return made

    return make


SIZES = {"train": (90, 1), "validation": (31, 2)}


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
        every = [f1_score(truth[:, label], probabilities[:, label] >= cut / 1000) for cut in range(1, 1000)]
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
    assert source.totals(0, np.arange(7)) == {"questions": 7.0}
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


BAD: dict[str, tuple[str, dict[str, Any], Sequence[Row], str]] = {}


def bad(name: str, task: str, rows: Sequence[Row], message: str, **options: Any) -> None:
    BAD[name] = (task, options, rows, message)


GOOD = {"sentence": "good film", "label": 1.0}
bad("number as text", "regression", [GOOD, {**GOOD, "label": "much"}], "line 2: label 'much' is no finite number")
bad("number as a bool", "regression", [GOOD, {**GOOD, "label": True}], "line 2: label 'True' is no finite number")
bad("no number", "regression", [GOOD, {**GOOD, "label": None}], "line 2: no label in column 'label'")
bad("infinite number", "regression", [{**GOOD, "label": float("inf")}], "line 1: label 'inf' is no finite number")
bad("too large a number", "regression", [{**GOOD, "label": 1e39}], "line 1: label '9999999999")
bad("NaN", "regression", [GOOD, {**GOOD, "label": float("nan")}], "line 2: no label in column 'label'")
bad("one number", "regression", [GOOD, GOOD], "train.jsonl: every label is 1; give different numbers")
bad("list for a number", "regression", [{**GOOD, "label": [1.0]}], "line 1: label [1.0] in column 'label'")
SET = {"sentence": "good film", "label": ["a", "b"]}
bad("labels None", "multi_label_classification", [SET, {**SET, "label": None}], "line 2: no label in column 'label'")
bad("label None", "multi_label_classification", [{**SET, "label": ["a", None]}], "line 1: no label in column 'label'")
bad("label as a bool", "multi_label_classification", [{**SET, "label": [True]}], "line 1: label True in column 'label'")
bad("label as a float", "multi_label_classification", [{**SET, "label": [0.5]}], "line 1: label 0.5 in column 'label'")
bad("label twice", "multi_label_classification", [{**SET, "label": ["a", "a"]}], "line 1: label 'a' is twice in")
bad("one label", "multi_label_classification", [{**SET, "label": ["a"]}] * 2, "train.jsonl: of labels it has only 'a'")
bad("no labels", "multi_label_classification", [{**SET, "label": []}] * 2, "train.jsonl: of labels it has none")
bad(
    "texts for labels", "multi_label_classification", [{**SET, "label": [f"l{i}"]} for i in range(30)],
    "train.jsonl: 30 labels of its 30 examples occur once",
)  # fmt: skip
bad(
    "mark of 2", "multi_label_classification", [{"sentence": "a", "x": 1, "y": 0}, {"sentence": "a", "x": 2, "y": 0}],
    "line 2: column 'x' holds 2; give 1 where the example has it, and else 0", label="x,y",
)  # fmt: skip
bad(
    "mark that is missing", "multi_label_classification", [{"sentence": "a", "x": 1}],
    "line 1: no column 'y'; it has sentence, x; set labelled.label[1] to one of them", label="x,y",
)  # fmt: skip
ASKED = {"sentence": "film", "options": ["good", "bad"], "label": 0}
bad("no options", "multiple_choice", [ASKED, {**ASKED, "options": []}], "line 2: 0 option(s) in column 'options'")
bad("one option", "multiple_choice", [{**ASKED, "options": ["good"]}], "line 1: 1 option(s) in column 'options'")
bad("options as text", "multiple_choice", [{**ASKED, "options": "good"}], "line 1: column 'options' holds 'good'")
bad("empty option", "multiple_choice", [{**ASKED, "options": ["a", ""]}], "line 1: empty text in column 'options[1]'")
bad("option as a number", "multiple_choice", [{**ASKED, "options": ["a", 2]}], "line 1: column 'options[1]' holds 2")
bad("index beyond", "multiple_choice", [{**ASKED, "label": 2}], "line 1: label 2 in column 'label' names none of 2")
bad("letter beyond", "multiple_choice", [{**ASKED, "label": "C"}], "label 'C' in column 'label' names none of 2")
bad("negative index", "multiple_choice", [{**ASKED, "label": -1}], "label -1 in column 'label' names none of 2")
bad("index as a bool", "multiple_choice", [{**ASKED, "label": True}], "label True in column 'label' names none of 2")
bad("index as a float", "multiple_choice", [{**ASKED, "label": 1.0}], "label 1.0 in column 'label' names none of 2")
CLASS = [{"sentence": "good film", "label": label} for label in ("yes", "no")] * 4
for weights, why in {
    "maybe=2": "'maybe' is not among the classes of labelled.train (no, yes)",
    "yes=0": "the weight of 'yes' is '0'; give a number above 0",
    "yes=-1": "the weight of 'yes' is '-1'; give a number above 0",
    "yes=nan": "the weight of 'yes' is 'nan'; give a number above 0",
    "yes=2,yes=3": "'yes' has two weights; give one",
    "2": "'2' is no name=weight; give balanced, or such as no=2,yes=0.5",
    "": "it names no class",
}.items():
    told = f"labelled.class_weights: {weights!r} is not allowed; {why}"
    bad(f"weights {weights}", "sequence_classification", CLASS, told, class_weights=weights)
bad("smoothing of 1", "sequence_classification", CLASS, "labelled.label_smoothing: 1.0 is not", label_smoothing=1.0)
bad("smoothing below 0", "sequence_classification", CLASS, "labelled.label_smoothing: -0.1", label_smoothing=-0.1)
bad(
    "smoothing of an order", "sequence_classification", CLASS, "labelled.loss ordinal has no smoothing",
    loss="ordinal", label_smoothing=0.1,
)  # fmt: skip
bad("unknown loss", "sequence_classification", CLASS, "labelled.loss: 'focal' is not allowed; choose", loss="focal")
bad("no order", "sequence_classification", CLASS, "tells no order of its classes (no, yes)", loss="ordinal")
bad(
    "score of an order", "sequence_classification", CLASS, "labelled.metric: 'rank_error' is not allowed; it needs",
    metric="rank_error",
)  # fmt: skip
bad("another task's score", "regression", [GOOD], "labelled.metric: 'accuracy' is not allowed", metric="accuracy")
bad("no separator", "multi_label_classification", [SET], "labelled.separator: '' is not allowed", separator="")


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_line_that_names_file_and_row_or_field_and_value(
    make: MakeTask, tmp_path: Path, name: str
) -> None:
    task, options, rows, message = BAD[name]
    (tmp_path / "bad").mkdir()
    path = write(tmp_path / "bad" / "train.jsonl", rows)
    with pytest.raises(UserError) as caught:
        make(task, train=path, validation=path, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            "multi_label_classification",
            {"sentence": "a", "label": ["new"]},
            "line 2: label 'new' is not among the",
        ),
        ("regression", {"sentence": "a", "label": "new"}, "line 2: label 'new' is no finite number"),
        ("multiple_choice", {**ASKED, "label": 7}, "line 2: label 7 in column 'label' names none of 2 options"),
    ],
)
def test_a_mistake_in_the_test_file_shows_before_training(
    make: MakeTask, tmp_path: Path, task: str, row: Row, message: str
) -> None:
    path = write(tmp_path / "test.jsonl", [ROWS[task](1, 5)[0], row])
    with pytest.raises(UserError) as caught:
        make(task, test=path)
    assert f"{path}, {message}" in str(caught.value)


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
