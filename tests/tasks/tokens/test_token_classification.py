"""Facts about fine-tuning a token classifier, on a tiny BERT in a real Hugging Face folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForTokenClassification, AutoTokenizer, BertForTokenClassification, pipeline

from engine.config import LabelledConfig, ModelConfig, RunConfig
from engine.data.loading.loader import BatchLayout, evaluation_batches, training_batches
from engine.data.loading.source import Cursor
from engine.data.tokenizer.folder import load_tokenizer
from engine.errors import UserError
from engine.model.build import build_config
from engine.model.folder import described, export_huggingface, saved_files
from engine.tasks.finetune import model_inputs
from engine.tasks.task import Task
from engine.tasks.tokens.classification import TokenClassification
from tests.data.tokenizer.folders import modernbert, roberta, xlm_roberta
from tests.tasks import tiny
from tests.tasks.tiny import evaluate
from tests.tasks.tokens.folders import POSITIONS, save_model, sentences, write_conll, write_spans

NAMES = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")

MakeTask = Callable[..., TokenClassification]

train = partial(tiny.train, rate=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def make_task(tmp_path: Path, folder: Path) -> MakeTask:
    train = write_conll(tmp_path / "train.conll", 61, seed=1)
    validation = write_conll(tmp_path / "validation.conll", 23, seed=2)

    def make(seed: int = 1, **changes: Any) -> TokenClassification:
        start = changes.pop("init_from", str(folder))
        values: dict[str, Any] = {"train": train, "validation": validation, "max_length": POSITIONS} | changes
        model = ModelConfig(init_from=start, hidden_dropout=0.0, attention_dropout=0.0)
        config = RunConfig(task="token_classification", seed=seed, model=model, labelled=LabelledConfig(**values))
        config.validate()
        return TokenClassification(config)

    return make


def test_it_is_a_task(make_task: MakeTask) -> None:
    task: Task = make_task()
    assert (task.best_metric, task.higher_is_better, task.evaluation_samples) == ("f1", True, 0)
    assert make_task(metric="loss").higher_is_better is False
    assert task.export_class(task.model_config) == "BertForTokenClassification"
    assert task.model_config.id2label == dict(enumerate(NAMES))


def test_training_learns_the_entities(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task(test=write_conll(tmp_path / "test.conll", 9, seed=3))
    model = task.build_model()
    losses = train(task, model, steps=40)
    assert losses[0] == pytest.approx(np.log(len(NAMES)), abs=0.2)
    assert losses[-1] < 0.05
    evaluation = evaluate(task, model)
    assert evaluation.scalars.keys() == {"loss", "f1", "precision", "recall", "accuracy"}
    assert evaluation.scalars["f1"] == evaluation.scalars["accuracy"] == 1.0
    source = task.evaluation_source("test")
    assert source is not None
    found = task.evaluate(model, evaluation_batches(source, 0, 1, 4, 0)).records["predictions"]
    assert len(found.texts) == 9
    assert found.predicted.tolist() == [NAMES.index(tag) for _, tags in sentences(9, 3) for tag in tags]


@pytest.mark.parametrize("pieces", ["first", "all"])
def test_weights_and_smoothing_are_those_of_torch_over_the_whole_batch(make_task: MakeTask, pieces: str) -> None:
    task = make_task(class_weights="balanced", label_smoothing=0.2, label_pieces=pieces)
    plain, model = make_task(label_pieces=pieces), task.build_model()
    batch = next(training_batches(task.train_source(), BatchLayout(16, 16), Cursor(), workers=0))
    learned = torch.from_numpy(task.sources["train"].windows.labels)
    weights = (len(learned) / (len(NAMES) * learned.bincount(minlength=len(NAMES)))).float()
    logits = model(**model_inputs(batch))
    expected = torch.nn.functional.cross_entropy(logits, batch.inputs["labels"], weights, label_smoothing=0.2)
    assert task.step(model, batch).loss.item() == pytest.approx(expected.item(), rel=1e-6)
    parts = islice(training_batches(task.train_source(), BatchLayout(16, 4), Cursor(), workers=0), 4)
    assert sum(task.step(model, part).loss.item() for part in parts) == pytest.approx(expected.item(), rel=1e-6)
    assert evaluate(task, model).scalars == evaluate(plain, model).scalars


def test_a_types_weight_is_that_of_both_its_tags(make_task: MakeTask) -> None:
    given = make_task(class_weights="PER=2, O=0.5, B-LOC=3").class_weights
    assert given is not None
    assert given.tolist() == [0.5, 3.0, 1.0, 2.0, 2.0]
    for weights, why in {
        "PER=2,I-PER=3": "'I-PER' has two weights; give one",
        "ORG=2": "'ORG' is not among the classes of labelled.train (LOC, PER, O, B-LOC, I-LOC, B-PER, I-PER)",
    }.items():
        with pytest.raises(UserError, match=re.escape(f"labelled.class_weights: {weights!r} is not allowed; {why}")):
            make_task(class_weights=weights)


@pytest.mark.parametrize("pieces", ["first", "all"])
def test_loss_and_gradients_are_those_of_transformers(make_task: MakeTask, pieces: str) -> None:
    """transformers' labels are -100 of what isn't learned."""
    task = make_task(label_pieces=pieces, max_length=POSITIONS)
    ours = task.build_model().train()
    theirs = BertForTokenClassification(task.model_config).train()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    batch = next(training_batches(task.train_source(), BatchLayout(16, 16), Cursor(), workers=0))
    loss = task.step(ours, batch).loss
    loss.backward()

    lengths = batch.inputs["lengths"].tolist()
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    labels[batch.inputs["read"]] = batch.inputs["labels"]
    padded = [
        torch.nn.utils.rnn.pad_sequence(values.split(lengths), batch_first=True, padding_value=fill)
        for values, fill in ((batch.inputs["input_ids"], 0), (labels, -100), (torch.ones_like(labels), 0))
    ]
    expected = theirs(input_ids=padded[0], labels=padded[1], attention_mask=padded[2]).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6 * scale)
    learned = sum(len(tokens) for tokens, _ in sentences(61, 1))
    assert (task.train_source().totals(0, np.arange(task.train_source().epoch_size(0)))["tokens"] > learned) == (
        pieces == "all"
    )


def test_shares_of_micro_batches_add_up_to_the_global_batch(make_task: MakeTask) -> None:
    task = make_task()
    model = task.build_model()
    sums = []
    for micro_batch in (16, 4):
        batches = training_batches(task.train_source(), BatchLayout(16, micro_batch), Cursor(), workers=0)
        outputs = [task.step(model, next(batches)) for _ in range(16 // micro_batch)]
        sums.append([sum(float(o.loss) for o in outputs), sum(float(o.metrics["accuracy"]) for o in outputs)])
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


def test_flops_count_the_tokens_that_are_read(make_task: MakeTask) -> None:
    """Of a token that isn't read the last layer's query, output and feed-forward, and the classifier, aren't needed."""
    task = make_task()
    batch = next(training_batches(task.train_source(), BatchLayout(16, 16), Cursor(), workers=0))
    fewer = replace(batch, inputs={**batch.inputs, "read": batch.inputs["read"][1:]})
    hidden, intermediate = task.model_config.hidden_size, task.model_config.intermediate_size
    forward = 2 * (2 * hidden * hidden + 2 * hidden * intermediate + len(NAMES) * hidden)
    assert task.flops(batch) - task.flops(fewer) == 3 * forward


def test_windows_score_every_word_once(make_task: MakeTask) -> None:
    whole, cut = make_task(), make_task(max_length=12, stride=4)
    assert cut.evaluation_source("validation").count > whole.evaluation_source("validation").count == 23  # type: ignore[union-attr]
    model = whole.build_model()
    train(whole, model, 40)
    one, other = evaluate(whole, model), evaluate(cut, model, 3)
    assert one.records["predictions"].truth.tolist() == other.records["predictions"].truth.tolist()
    assert other.scalars["f1"] == 1.0
    assert "exceed labelled.max_length 12: " in "\n".join(cut.describe_data())
    assert "none is cut" in "\n".join(whole.describe_data())


def test_scores_do_not_depend_on_batches(make_task: MakeTask) -> None:
    task = make_task(max_length=12)
    model = task.build_model()
    train(task, model, 4)
    one, other = evaluate(task, model, 1), evaluate(task, model, 64)
    assert one.records["predictions"].predicted.tolist() == other.records["predictions"].predicted.tolist()
    assert one.scalars == pytest.approx(other.scalars, rel=1e-6)


def test_words_without_a_piece_are_outside_and_shared_pieces_go_on(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task(validation=write_conll(tmp_path / "v.conll", 3, seed=5))
    windows = task.sources["validation"].windows
    truth = np.concatenate(task.truth["validation"])
    rows = {"index": np.arange(len(windows.words)), "split": np.ones(len(windows.words), np.int64)}
    logits = np.eye(len(NAMES), dtype=np.float32)[truth]
    assert task.score({**rows, "truth": truth, "logits": logits}).scalars["f1"] == 1.0
    person = int(np.flatnonzero(truth == NAMES.index("B-PER"))[0])
    kept = np.flatnonzero((windows.words != person) & (windows.words != person + 1))
    fewer = {name: values[kept] for name, values in rows.items()}
    bare = task.score({**fewer, "truth": truth[kept], "logits": logits[kept]}).records["predictions"]
    assert bare.predicted[person : person + 2].tolist() == [0, 0]
    task.sources["validation"].windows = replace(windows, joined=np.array([person + 1]))
    shared = task.score({**rows, "truth": truth, "logits": logits}).records["predictions"]
    assert shared.predicted[person : person + 2].tolist() == [NAMES.index("B-PER"), NAMES.index("I-PER")]


def test_the_report_tells_types_and_predictions(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    model = task.build_model()
    train(task, model, 40)
    text = task.report(evaluate(task, model), tmp_path / "report")
    assert text.startswith("f1 1.0000 (95 % interval 1.0000 to 1.0000) precision 1.0000 recall 1.0000 of ")
    summary = json.loads((tmp_path / "report" / "report.json").read_text())
    tags = [tag for _, tags in sentences(23, 2) for tag in tags]
    assert summary["types"]["PER"]["support"] == tags.count("B-PER")
    assert summary["entities"]["support"] == tags.count("B-PER") + tags.count("B-LOC")
    assert (summary["texts"], summary["tokens"]) == (23, len(tags))
    assert summary["scores"]["f1"] == 1.0
    blocks = (tmp_path / "report" / "predictions.conll").read_text().split("\n\n")
    assert blocks.pop() == ""
    assert [[line.split("\t") for line in block.split("\n")] for block in blocks] == [
        [[word, tag, tag] for word, tag in zip(*each, strict=True)] for each in sentences(23, 2)
    ]
    first = json.loads((tmp_path / "report" / "predictions.jsonl").read_text().split("\n")[0])
    tokens, own = sentences(23, 2)[0]
    assert (first["tokens"], first["line"]) == (tokens, 1)
    assert first["true"] == first["predicted"]
    assert next(tokens[start:stop] for start, stop, kind in first["true"] if kind == "PER")[0] == tokens[0]
    assert sum(stop - start for start, stop, _ in first["true"]) == sum(tag != "O" for tag in own)


def test_a_run_without_texts_reports_none(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    task.config.monitor.texts = False
    task.report(evaluate(task, task.build_model()), tmp_path / "report")
    written = "".join(path.read_text() for path in (tmp_path / "report").iterdir())
    assert not any(word in written for word in ("anna", "oslo", "lives"))
    assert written.count("_\tB-PER\t") == sum(tags.count("B-PER") for _, tags in sentences(23, 2))


def export(task: TokenClassification, model: Any, out: Path) -> Path:
    config = described(task.model_config, task.export_class(task.model_config))
    export_huggingface(model.state_dict(), config, saved_files(task.vocabulary), out)
    return out


def test_transformers_pipeline_finds_the_same_entities(make_task: MakeTask, tmp_path: Path) -> None:
    train_file = write_spans(tmp_path / "train.jsonl", 61, seed=1)
    validation = write_spans(tmp_path / "validation.jsonl", 23, seed=2)
    task = make_task(train=train_file, validation=validation)
    model = task.build_model()
    train(task, model, 12)
    task.report(evaluate(task, model), tmp_path / "report")
    rows = [json.loads(line) for line in (tmp_path / "report" / "predictions.jsonl").read_text().splitlines()]
    out = export(task, model, tmp_path / "export")
    find = pipeline("token-classification", model=str(out), aggregation_strategy="first", device="cpu")
    assert sum(len(row["predicted"]) for row in rows) > 23
    for row in rows:
        theirs = [[found["start"], found["end"], found["entity_group"]] for found in find(row["text"])]
        assert theirs == row["predicted"], row["text"]
    assert AutoTokenizer.from_pretrained(out).model_max_length == POSITIONS
    loaded = task.load_export(out)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


KINDS = [("roberta", roberta), ("xlm-roberta", xlm_roberta), ("modernbert", modernbert)]


@pytest.mark.parametrize(("kind", "make"), KINDS)
def test_every_architecture_and_tokenizer_finds_what_transformers_finds(
    make_task: MakeTask, tmp_path: Path, kind: str, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "model")
    vocabulary = load_tokenizer(tmp_path / "model")
    model = ModelConfig("tiny", architecture=kind, hidden_size=32, heads=2, layers=2, max_positions=160)
    torch.manual_seed(0)
    config = build_config(model, vocabulary.vocab_size, vocabulary.pad_id)
    AutoModel.from_config(config).save_pretrained(tmp_path / "model")
    files = (write_spans(tmp_path / f"{seed}.jsonl", 40, seed) for seed in (1, 2))
    changes = dict(zip(("train", "validation"), files, strict=True))
    task = make_task(init_from=str(tmp_path / "model"), max_length=150, max_unknown_share=1.0, **changes)
    trained = task.build_model()
    assert train(task, trained, 15)[-1] < 1.2
    task.report(evaluate(task, trained), tmp_path / "report")
    rows = [json.loads(line) for line in (tmp_path / "report" / "predictions.jsonl").read_text().splitlines()]
    assert sum(len(row["predicted"]) for row in rows) > 20
    out = export(task, trained, tmp_path / "export")
    tokenizer, theirs = AutoTokenizer.from_pretrained(out), AutoModelForTokenClassification.from_pretrained(out).eval()
    blocks = (tmp_path / "report" / "predictions.conll").read_text().split("\n\n")
    for row, block in zip(rows, blocks, strict=False):
        given = tokenizer(row["text"], return_tensors="pt", return_offsets_mapping=True)
        offsets = given.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            tags = [theirs.config.id2label[index] for index in theirs(**given).logits[0].argmax(-1).tolist()]
        place = 0
        for line in block.split("\n"):
            word, _, predicted = line.split("\t")
            place = row["text"].index(word, place)
            first = next(i for i, (start, stop) in enumerate(offsets) if start < place + len(word) and stop > place)
            assert predicted == tags[first], (row["text"], word)
            place += len(word)


def test_raw_texts_and_tokens_teach_the_same(make_task: MakeTask, tmp_path: Path) -> None:
    raw = make_task(train=write_spans(tmp_path / "train.jsonl", 61, seed=1))
    listed = make_task()
    assert raw.sources["train"].fingerprint == listed.sources["train"].fingerprint
    assert raw.facts()[0].value == list(NAMES)


def test_a_held_out_share_and_all_its_types_are_kept(make_task: MakeTask) -> None:
    task = make_task(validation=None)
    validation = task.evaluation_source("validation")
    assert validation is not None
    assert task.train_source().epoch_size(0) + validation.epoch_size(0) == 61
    assert task.evaluation_source("test") is None


def test_mistakes_in_options_are_one_line(make_task: MakeTask, tmp_path: Path) -> None:
    (tmp_path / "test.conll").write_text("anna B-DOG\n")
    (tmp_path / "deleted.conll").write_text("\u200b O\n")
    for options, message in (
        ({"stride": 38}, r"^labelled\.stride: 38 is not allowed; give 0 or more, and less than the 38 pieces"),
        ({"stride": -1}, r"^labelled\.stride: -1 is not allowed"),
        ({"label_pieces": "last"}, r"^labelled\.label_pieces: 'last' is not allowed; choose first or all"),
        ({"metric": "macro_f1"}, r"^labelled\.metric: 'macro_f1' is not allowed; choose one of f1, precision, "),
        ({"max_length": POSITIONS + 1}, r"^labelled\.max_length: 41 is not allowed"),
        ({"test": str(tmp_path / "test.conll")}, r"test\.conll, line 1: type 'DOG' of 'anna' is not among"),
        ({"validation": str(tmp_path / "deleted.conll")}, r"deleted\.conll: the tokenizer leaves nothing of its texts"),
    ):
        with pytest.raises(UserError, match=message):
            make_task(**options)
