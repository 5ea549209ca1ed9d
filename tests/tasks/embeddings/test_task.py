"""Facts about embeddings as a task: its data and their mistakes, its scores, its start from other models."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score
from transformers import BertConfig

from engine.config import LabelledConfig, RunConfig
from engine.data.labelled.pairs import POSITIVE, TEXT
from engine.data.loading.source import Cursor
from engine.errors import UserError
from engine.model.sentence import FLAGS, SentenceConfig, read_sentence_config, sentence_files
from engine.tasks.embeddings import retrieval
from engine.tasks.embeddings.retrieval import Ranks, ranks
from engine.tasks.outcomes import read_outcomes, score_of
from engine.train.checkpoint.folder import RunState, check_resumable
from tests.tasks.embeddings.worlds import GLOBAL_BATCH, Row, graded, inputs, make_task, triples, write
from tests.tasks.tiny import evaluate, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inputs(tmp_path_factory.mktemp("pairs"))


def test_it_learns_what_its_words_tell(folder: Path, tmp_path: Path) -> None:
    task = make_task(folder, test=str(folder / "graded.jsonl"))
    assert (task.best_metric, task.higher_is_better) == ("mrr_at_10", True)
    model = task.build_model()
    before = evaluate(task, model, split="test").scalars["spearman"]
    train(task, model, steps=60, batch=GLOBAL_BATCH)
    found = evaluate(task, model)
    assert found.scalars["recall_at_1"] > 0.9
    assert evaluate(task, model, split="test").scalars["spearman"] > max(before, 0.7)
    text = task.report(found, tmp_path / "report")
    assert f"MRR@10 {found.scalars['mrr_at_10']:.4f}" in text
    assert "guessing baseline: recall@1 0.0" in text
    outcomes = read_outcomes(tmp_path / "report")
    for name, value in found.scalars.items():
        assert score_of(name, outcomes.scores[name]) == pytest.approx(value)


def test_cosines_are_scored_as_scipy_scores_them(folder: Path, tmp_path: Path) -> None:
    task = make_task(folder, validation=str(folder / "graded.jsonl"))
    assert task.best_metric == "spearman"
    found = evaluate(task, task.build_model())
    text = task.report(found, tmp_path / "report")
    assert text.startswith(f"spearman {found.scalars['spearman']:.4f}, pearson {found.scalars['pearson']:.4f} (95 %")
    with (tmp_path / "report" / "predictions.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    truth, predicted = ([float(row[name]) for row in rows] for name in ("true", "predicted"))
    assert truth == pytest.approx([row["label"] for row in graded(40, 2)])
    assert found.scalars["spearman"] == pytest.approx(spearmanr(truth, predicted)[0])
    assert {path.name for path in (tmp_path / "report").iterdir()} >= {"scatter.png", "outcomes.tsv", "report.json"}


@pytest.mark.parametrize("validation", ["pairs", "graded"])
def test_an_evaluation_is_the_same_for_any_batch(folder: Path, validation: str) -> None:
    task = make_task(folder, validation=str(folder / f"{validation}.jsonl"))
    model = task.build_model()
    assert evaluate(task, model, 1).scalars == pytest.approx(evaluate(task, model, 40).scalars, rel=1e-6)


def brute_force(vectors: np.ndarray, rows: Sequence[Row]) -> dict[str, float]:
    """The scores, text by text; of each row there are the vectors of its text, its positive and its negatives."""
    places = iter(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    texts, candidates, relevant = {}, {}, dict[str, set[str]]()
    for row in rows:
        texts.setdefault(row["text"], next(places))
        for one in (row["positive"], *row["negatives"]):
            candidates.setdefault(one, next(places))
        relevant.setdefault(row["text"], set()).add(row["positive"])
    found = []
    for text, vector in texts.items():
        names = [name for name in candidates if name != text or name in relevant[text]]
        cosines = np.array([vector @ candidates[name] for name in names])
        truth = np.array([name in relevant[text] for name in names])
        order = np.argsort(-cosines)
        hits = truth[order]
        first = int(hits.argmax()) + 1
        found.append(
            {
                "mrr_at_10": 1 / first if first <= 10 else 0.0,
                "ndcg_at_10": ndcg_score([truth], [cosines], k=10),
                "recall_at_1": hits[:1].sum() / truth.sum(),
                "recall_at_10": hits[:10].sum() / truth.sum(),
            }
        )
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def test_retrieval_is_scored_as_by_brute_force(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = triples(40, 1)
    rows += [{**rows[0], "positive": "a text of many", "negatives": []}, {**rows[1], "positive": rows[1]["text"]}]
    rows += [{"text": "the film", "positive": rows[2]["text"], "negatives": [rows[3]["positive"]]}]
    numbers: dict[str, int] = {}
    member, text, of_text = [], [], dict[int, np.ndarray]()
    generator = np.random.default_rng(4)
    for row in rows:
        for place, one in enumerate((row["text"], row["positive"], *row["negatives"])):
            member.append(min(place, 2))
            text.append(numbers.setdefault(one, len(numbers)))
            of_text.setdefault(text[-1], generator.normal(size=8).astype(np.float32))
    vectors = np.stack([of_text[number] for number in text])
    found = ranks(vectors, np.array(member), np.array(text))
    expected = brute_force(vectors, rows)
    means = {name: float(values.mean()) for name, values in found.scores().items()}
    assert means == pytest.approx(expected)
    assert 0.0 < means["recall_at_1"] < means["recall_at_10"] < 1.0
    monkeypatch.setattr(retrieval, "COSINES", 100)
    blocks = ranks(vectors, np.array(member), np.array(text))
    assert np.array_equal(blocks.rank, found.rank)


def test_vectors_that_are_no_numbers_find_nothing() -> None:
    vectors = np.full((24, 4), np.nan, dtype=np.float32)
    member = np.tile([TEXT, POSITIVE], 12)
    found = ranks(vectors, member, np.arange(24))
    assert isinstance(found, Ranks)
    assert {name: values.max() for name, values in found.scores().items()} == {
        "mrr_at_10": 0.0, "ndcg_at_10": 0.0, "recall_at_1": 0.0, "recall_at_10": 0.0,
    }  # fmt: skip


def test_negatives_are_lists_texts_or_columns_of_their_own(folder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"good {a}", "positive": f"film {a}", "n": "bad a", "m": "bad the"} for a in ("a", "the", "was")]
    lists = write(tmp_path / "lists.jsonl", [{**row, "n": [row["n"], row["m"]]} for row in rows])
    columns = write(tmp_path / "columns.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "columns.parquet")
    (tmp_path / "columns.csv").write_text("\n".join(["text,positive,n,m", *(",".join(row.values()) for row in rows)]))
    one = make_task(folder, train=lists, negatives="n")
    for path in (columns, str(tmp_path / "columns.parquet"), str(tmp_path / "columns.csv")):
        other = make_task(folder, train=path, negatives="n,m")
        assert other.sources["train"].fingerprint == one.sources["train"].fingerprint
    single = make_task(folder, train=columns, negatives="n")
    assert single.sources["train"].counts.tolist() == [3, 3, 3]
    assert single.sources["train"].encoded.offsets.tolist()[-1] == 7 * 4, "a text of several rows is kept once"


def test_a_source_counts_pairs_and_their_tokens(folder: Path) -> None:
    source = make_task(folder).train_source()
    rows = triples(90, 0)
    sequences = float(source.counts[source.describe(0, np.arange(7))].sum())
    assert source.totals(0, np.arange(7)) == {"pairs": 7.0, "sequences": sequences}
    batch = source.collate(np.arange(5))
    lengths = [len(one.split()) + 2 for row in rows[:5] for one in (row["text"], row["positive"], *row["negatives"])]
    assert batch["lengths"].tolist() == lengths
    places = source.describe(0, np.arange(5))
    assert source.lengths(0, np.arange(5)).tolist() == [
        sum(len(one.split()) + 2 for one in (rows[i]["text"], rows[i]["positive"], *rows[i]["negatives"]))
        for i in places
    ]


@pytest.mark.parametrize("split", [{}, {"folds": 3, "fold": 2}])
def test_some_are_held_out_and_labels_of_training_are_not_learned(
    folder: Path, tmp_path: Path, split: Mapping[str, int]
) -> None:
    path = write(tmp_path / "all.jsonl", graded(60, 3))
    task = make_task(folder, train=path, validation=None, negatives=None, **split)
    assert task.best_metric == "spearman"
    assert task.sources["validation"].count == (20 if split else 6)
    assert task.sources["train"].labels is None
    assert any("its column 'label' is not learned" in line for line in task.describe_data())
    unread = write(tmp_path / "unread.jsonl", [{**row, "label": "entailment"} for row in graded(60, 3)])
    assert make_task(folder, train=unread, negatives=None).sources["train"].labels is None


def test_texts_alone_are_their_own_positives_and_pairs_score_them(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "texts.jsonl", [{"text": row["text"]} for row in triples(30, 5)])
    alone = {"train": path, "positives": "dropout", "negatives": None, "validation": str(folder / "graded.jsonl")}
    task = make_task(folder, dropout=0.1, **alone)
    model = task.build_model()
    assert train(task, model, 40)[-1] < 0.5
    assert 0.0 < evaluate(task, model).scalars["spearman"] < 1.0
    assert task.sources["train"].counts.tolist() == [2] * 30


def test_pooling_and_files_of_a_start_model_are_heeded(folder: Path, tmp_path: Path) -> None:
    task = make_task(folder, pooling="cls")
    for name, content in sentence_files(task.model_config).items():
        (folder / "bert" / name).parent.mkdir(exist_ok=True)
        (folder / "bert" / name).write_bytes(content)
    try:
        assert read_sentence_config(folder / "bert") == SentenceConfig("cls", True, 14)
        assert make_task(folder).model_config.sentence_embedding["pooling"] == "cls"
        assert make_task(folder, pooling="mean").model_config.sentence_embedding["pooling"] == "mean"
    finally:
        (folder / "bert" / "modules.json").unlink()


PLAIN = {"word_embedding_dimension": 16, **dict.fromkeys(FLAGS.values(), False)}
FILES: dict[str, tuple[str, object, str]] = {
    "dense": ("modules.json", ["Transformer", "Pooling", "Dense"], "modules Transformer, Pooling, Dense are not supp"),
    "no pooling": ("modules.json", ["Transformer"], "modules Transformer are not supported; give a model of"),
    "no list": ("modules.json", {"a": 1}, "modules.json: not a JSON list; copy the file again"),
    "max": ("1_Pooling/config.json", {**PLAIN, "pooling_mode_max_tokens": True}, "pooling 'max' is not supported"),
    "two": (
        "1_Pooling/config.json",
        {**PLAIN, "pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True},
        "pooling 'mean + max' is not supported; give a model that pools by mean or cls",
    ),
    "new form": ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "pooling 'lasttoken' is not supported"),
    "lower case": ("sentence_bert_config.json", {"do_lower_case": True}, "do_lower_case true is not supported; put"),
    "prompt": (
        "config_sentence_transformers.json",
        {"prompts": {"q": "query: "}, "default_prompt_name": "q"},
        "default_prompt_name 'q' is not supported; put null there",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_what_we_would_compute_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    config = BertConfig(hidden_size=16)
    SentenceConfig("mean", True, 14).put_into(config)
    for file, content in sentence_files(config).items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    assert read_sentence_config(tmp_path) == SentenceConfig("mean", True, 14)
    file, values, message = FILES[name]
    if file == "modules.json" and isinstance(values, list):
        values = [{"type": f"sentence_transformers.models.{kind}", "path": ""} for kind in values]
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(UserError) as caught:
        read_sentence_config(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


GOOD = {"text": "good film", "positive": "a good film", "negatives": ["bad film"]}
MORE = {"text": "the film was bad", "positive": "bad film", "negatives": []}
LABELLED = {**GOOD, "label": 1.0}
BAD: dict[str, tuple[Sequence[Mapping[str, Any]], dict[str, Any], str]] = {
    "empty text": ([GOOD, {**GOOD, "text": " "}], {}, "line 2: empty text in column 'text'"),
    "empty positive": ([GOOD, {**GOOD, "positive": ""}], {}, "line 2: empty text in column 'positive'"),
    "no column": ([{"text": "a"}], {}, "line 1: no column 'positive'; it has text; set labelled.text_pair to one of"),
    "no negatives": ([{"text": "a", "positive": "b"}], {}, "no column 'negatives'; it has text, positive; set"),
    "number for negatives": ([{**GOOD, "negatives": 3}], {}, "line 1: column 'negatives' holds 3, which is not text"),
    "number among them": ([{**GOOD, "negatives": ["a", 3]}], {}, "column 'negatives[1]' holds 3, which is not text"),
    "empty negative": ([{**GOOD, "negatives": [""]}], {}, "line 1: empty text in column 'negatives"),
    "null negatives": ([{**GOOD, "negatives": None}], {}, "line 1: empty text in column 'negatives'"),
    "itself as a negative": (
        [GOOD, {**GOOD, "negatives": ["good film"]}], {},
        "line 2: column 'negatives' holds the row's own text or positive; give another negative",
    ),
    "one pair": ([{**GOOD, "negatives": []}], {}, "train.jsonl: 1 row(s) of 2 different texts leave no negatives"),
    "the same pair": ([{"text": "a", "positive": "the"}] * 3, {"negatives": None}, "3 row(s) of 2 different texts"),
    "columns twice": ([GOOD], {"negatives": "text"}, "labelled.negatives: 'text' is labelled.text already; name anot"),
    "no columns": ([GOOD], {"negatives": " , "}, "labelled.negatives: ' , ' is not allowed; give a column of texts or"),
    "temperature of 0": ([GOOD, MORE], {"temperature": 0.0}, "labelled.temperature: 0.0 is not allowed; give a number"),
    "negative temperature": ([GOOD, MORE], {"temperature": -1.0}, "labelled.temperature: -1.0 is not allowed; give a"),
    "pooling": ([GOOD, MORE], {"pooling": "max"}, "labelled.pooling: 'max' is not allowed; choose mean or cls"),
    "positives": ([GOOD, MORE], {"positives": "self"}, "labelled.positives: 'self' is not allowed; choose pairs or"),
    "no positives": ([GOOD, MORE], {"text_pair": None}, "labelled.text_pair: None is not allowed; name the column of"),
    "nothing drops out": ([GOOD, MORE], {"positives": "dropout"}, "model.hidden_dropout: 0.0 is not allowed; a text"),
    "nothing to score": (
        [GOOD, MORE], {"positives": "dropout", "validation": None},
        "labelled.validation: None is not allowed; labelled.positives dropout trains on texts without pairs",
    ),
    "score of labels": (
        [GOOD, MORE], {"metric": "spearman"},
        "pairs.jsonl has no column 'label' (labelled.label); give one of mrr_at_10, ndcg_at_10, recall_at_1, recall",
    ),
    "another task's score": ([GOOD, MORE], {"metric": "f1"}, "labelled.metric: 'f1' is not allowed; choose one of"),
    "label of the first row": (
        [LABELLED, GOOD], {}, "line 2: no column 'label', which the first row has; give it in all rows or in none",
    ),
    "label of another row": ([GOOD, LABELLED], {}, "line 2: a column 'label', which the first row lacks; give it in"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_line_that_names_file_and_row_or_field_and_value(
    folder: Path, tmp_path: Path, name: str
) -> None:
    rows, options, message = BAD[name]
    path = write(tmp_path / "train.jsonl", [dict(row) for row in rows])
    with pytest.raises(UserError) as caught:
        make_task(folder, train=path, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("much", "line 2: label 'much' is no finite number"),
        (None, "line 2: no label in column 'label'"),
        (float("inf"), "line 2: label 'inf' is no finite number"),
    ],
)
def test_a_label_that_is_no_number_is_named(folder: Path, tmp_path: Path, label: object, message: str) -> None:
    path = write(tmp_path / "validation.jsonl", [LABELLED, {**LABELLED, "label": label}])
    with pytest.raises(UserError) as caught:
        make_task(folder, validation=path)
    assert message in str(caught.value)


def test_a_global_batch_of_one_pair_is_refused() -> None:
    labelled = LabelledConfig(train="a", text_pair="b")
    config = RunConfig(task="embeddings", labelled=labelled)
    config.model.init_from, config.train.global_batch = "m", 1
    with pytest.raises(UserError, match=r"^train\.global_batch: 1 is not allowed; the other pairs of a global batch"):
        config.validate()
    labelled.negatives = "c"
    config.validate()


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", 0.1), ("negatives", "n"), ("symmetric", True), ("pooling", "cls"), ("positives", "dropout")],
)
def test_a_resume_keeps_what_the_loss_depends_on(tmp_path: Path, field: str, value: Any) -> None:
    before, after = (
        RunConfig(task="embeddings", labelled=LabelledConfig(**more)).to_dict() for more in ({}, {field: value})
    )
    state = RunState(step=1, cursor=Cursor(), world_size=1, config=before, facts={})
    check_resumable(state, tmp_path, before)
    with pytest.raises(UserError, match=rf"^labelled\.{field}: "):
        check_resumable(state, tmp_path, after)
