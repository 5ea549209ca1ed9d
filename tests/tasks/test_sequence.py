"""Facts about fine-tuning a classifier, on a tiny BERT in a real Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, log_loss, matthews_corrcoef
from tokenizers import pre_tokenizers
from torch.multiprocessing.spawn import start_processes
from transformers import BertConfig, BertForSequenceClassification, BertModel

from engine.config import LabelledConfig, ModelConfig, RunConfig
from engine.data.loading.loader import BatchLayout, evaluation_batches, training_batches
from engine.data.loading.source import Cursor, MicroBatch
from engine.data.tokenizer.wordpiece import Vocabulary, load_tokenizer
from engine.errors import UserError
from engine.tasks.finetune import model_inputs
from engine.tasks.sequence import SequenceClassification
from engine.tasks.task import Task
from tests.tasks.tiny import POSITIONS, TINY, WORDS, evaluate, tiny_bert, train

MakeTask = Callable[..., SequenceClassification]


def write_examples(path: Path, count: int, seed: int) -> str:
    """Texts of random length whose label is told by one word."""
    generator = np.random.default_rng(seed)
    with path.open("w") as file:
        for index in range(count):
            label = ("bad", "good")[index % 2]
            words = [*generator.choice(WORDS[7:], size=generator.integers(0, 8)), label]
            generator.shuffle(words)
            file.write(json.dumps({"sentence": " ".join(words), "label": label}) + "\n")
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_bert(tmp_path / "bert")


@pytest.fixture
def make_task(tmp_path: Path, folder: Path) -> MakeTask:
    train = write_examples(tmp_path / "train.jsonl", 61, seed=1)
    validation = write_examples(tmp_path / "validation.jsonl", 23, seed=2)

    def make(seed: int = 1, **changes: Any) -> SequenceClassification:
        values: dict[str, Any] = {"train": train, "validation": validation, "max_length": 12} | changes
        return SequenceClassification(run_config(folder, values, seed))

    return make


def run_config(folder: Path, labelled: dict[str, Any], seed: int = 1) -> RunConfig:
    model = ModelConfig(init_from=str(folder), hidden_dropout=0.0, attention_dropout=0.0)
    return RunConfig(task="sequence_classification", seed=seed, model=model, labelled=LabelledConfig(**labelled))


def test_it_is_a_task(make_task: MakeTask) -> None:
    task: Task = make_task(metric="loss")
    assert (task.best_metric, task.higher_is_better, task.evaluation_samples) == ("loss", False, 0)
    assert make_task(metric="macro_f1").higher_is_better


def test_training_learns_the_telling_word(make_task: MakeTask) -> None:
    task = make_task()
    model = task.build_model()
    losses = train(task, model, steps=60)
    assert losses[0] == pytest.approx(np.log(2), abs=0.05)
    assert losses[-1] < 0.1
    assert evaluate(task, model).scalars["accuracy"] == 1.0


def test_the_model_names_its_classes_and_starts_from_the_folder(make_task: MakeTask, folder: Path) -> None:
    model = make_task().build_model()
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.label2id == {"bad": 0, "good": 1}
    expected = BertModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.bert.state_dict().items())


def test_the_fresh_classifier_depends_on_the_seed_alone(make_task: MakeTask) -> None:
    weights = []
    for torch_seed, seed in ((0, 1), (5, 1), (0, 2)):
        torch.manual_seed(torch_seed)
        weights.append(make_task(seed).build_model().classifier.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_classifier_in_the_folder_is_not_taken_over(make_task: MakeTask, folder: Path) -> None:
    fresh = make_task().build_model().classifier.weight
    other = BertForSequenceClassification(TINY)
    other.save_pretrained(folder)
    model = make_task().build_model()
    assert torch.equal(model.classifier.weight, fresh)
    assert torch.equal(model.bert.pooler.dense.weight, other.bert.pooler.dense.weight)


def test_shares_of_micro_batches_add_up_to_the_global_batch(make_task: MakeTask) -> None:
    task = make_task()
    model = task.build_model()
    sums = []
    for micro_batch in (16, 4):
        batches = training_batches(task.train_source(), BatchLayout(16, micro_batch), Cursor(), workers=0)
        outputs = [task.step(model, next(batches)) for _ in range(16 // micro_batch)]
        sums.append([sum(float(o.loss) for o in outputs), sum(float(o.metrics["accuracy"]) for o in outputs)])
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    assert sums[0][1] * 16 == pytest.approx(round(sums[0][1] * 16))


def test_grouping_by_length_is_for_training_and_takes_the_global_batch(make_task: MakeTask) -> None:
    task = make_task(group_by_length=True)
    assert task.train_source().group == task.config.train.global_batch
    validation = task.evaluation_source("validation")
    assert validation is not None
    assert validation.group is None
    assert make_task(group_by_length=False).train_source().group is None


def test_the_scores_are_scikit_learns(make_task: MakeTask) -> None:
    task = make_task()
    model = task.build_model()
    train(task, model, steps=8)
    evaluation = evaluate(task, model)
    predictions = evaluation.records["predictions"]
    assert evaluation.scalars == pytest.approx(
        {
            "loss": log_loss(predictions.truth, predictions.probabilities),
            "accuracy": (predictions.truth == predictions.predicted).mean(),
            "macro_f1": f1_score(predictions.truth, predictions.predicted, average="macro"),
            "matthews": matthews_corrcoef(predictions.truth, predictions.predicted),
        }
    )
    assert evaluation.images["confusion_matrix"].dtype == np.uint8


def test_no_picture_is_drawn_without_tensorboard(make_task: MakeTask) -> None:
    task = make_task()
    task.config.monitor.tensorboard = False
    assert evaluate(task, task.build_model()).images == {}


def test_an_evaluation_keeps_the_order_of_the_file_for_any_batch(make_task: MakeTask) -> None:
    task = make_task()
    model = task.build_model()
    one, other = evaluate(task, model, 1), evaluate(task, model, 23)
    assert one.records["predictions"].truth.tolist() == [index % 2 for index in range(23)]
    assert one.scalars == pytest.approx(other.scalars, rel=1e-5)


def test_dummy_batches_run_and_do_not_count(make_task: MakeTask) -> None:
    task = make_task()
    model = task.build_model()
    source = task.evaluation_source("validation")
    assert source is not None
    first = source.collate(np.array([1, 3]))
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    real = MicroBatch(source.collate(np.array([5, 7, 9])), {"sequences": 3.0}, Cursor())
    evaluation = task.evaluate(model, [real, MicroBatch(first, {"sequences": 3.0}, Cursor(), dummy=True)])
    assert len(calls) == 2
    assert evaluation.records["predictions"].truth.tolist() == [1, 1, 1]


def test_an_evaluation_leaves_the_mode_and_makes_no_gradients(make_task: MakeTask) -> None:
    task = make_task()
    model = task.build_model()
    grad_modes: list[tuple[bool, bool]] = []
    model.register_forward_hook(lambda module, *_: grad_modes.append((module.training, torch.is_grad_enabled())))
    evaluate(task, model.train(), 23)
    assert grad_modes == [(False, False)]
    assert model.training


def evaluate_on_rank(rank: int, task: SequenceClassification, model: torch.nn.Module, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    source = task.evaluation_source("validation")
    assert source is not None
    # 23 examples in chunks of 8 are three: rank 1 takes a dummy
    evaluation = task.evaluate(model, evaluation_batches(source, rank, 2, 8, 0))
    np.save(folder / f"{rank}.npy", evaluation.records["predictions"].probabilities)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_score_what_one_scores(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    model = task.build_model()
    start_processes(evaluate_on_rank, (task, model, tmp_path), nprocs=2, start_method="fork")
    alone = evaluate(task, model).records["predictions"].probabilities
    for rank in range(2):
        assert np.allclose(np.load(tmp_path / f"{rank}.npy"), alone, atol=1e-6)


def test_validation_is_held_out_and_test_is_optional(make_task: MakeTask) -> None:
    task = make_task(validation=None)
    validation = task.evaluation_source("validation")
    assert validation is not None
    assert (task.train_source().epoch_size(0), validation.epoch_size(0)) == (55, 6)
    assert task.evaluation_source("test") is None


def test_the_report_is_written_from_an_evaluation(make_task: MakeTask, tmp_path: Path) -> None:
    task = make_task()
    text = task.report(evaluate(task, task.build_model()), tmp_path / "report")
    assert text.startswith("accuracy ")
    assert (tmp_path / "report" / "confusion_matrix.png").stat().st_size > 1000


def test_labels_and_index_are_no_arguments_of_the_model(make_task: MakeTask) -> None:
    source = make_task().evaluation_source("validation")
    assert source is not None
    batch = MicroBatch(source.collate(np.array([0])), {"sequences": 1.0}, Cursor())
    expected = {"input_ids", "token_type_ids", "position_ids", "lengths", "max_length"}
    assert set(model_inputs(batch)) == expected


def test_examples_longer_than_the_positions_are_refused(make_task: MakeTask) -> None:
    with pytest.raises(UserError, match=r"labelled\.max_length: 17 .* has 16 positions: give at most 16"):
        make_task(max_length=POSITIONS + 1)


def test_a_test_label_that_training_lacks_is_refused(make_task: MakeTask, tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("sentence,label\nfilm,good\nfilm,neutral\n")
    with pytest.raises(UserError, match=r"test\.csv, line 3: label 'neutral' is not among"):
        make_task(test=str(tmp_path / "test.csv"))


def test_a_tokenizer_of_another_vocabulary_is_refused(make_task: MakeTask, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with (folder / "vocab.txt").open("a") as file:
        file.write("more\n")
    with pytest.raises(UserError, match="vocabulary"):
        make_task()


def test_embeddings_grow_by_the_folders_added_tokens(make_task: MakeTask, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "added_tokens.json").write_text(json.dumps({"[DEID]": len(WORDS)}))
    task = make_task()
    assert "1 new row of word embeddings, from the seed, for [DEID]" in task.describe_data()[0]
    state = task.build_model().state_dict()["bert.embeddings.word_embeddings.weight"]
    given = BertModel.from_pretrained(folder).embeddings.word_embeddings.weight
    assert state.shape == (len(WORDS) + 1, 16)
    assert torch.equal(state[:-1], given)
    assert state[-1].any()
    assert task.model_config.vocab_size == len(WORDS) + 1


def test_rows_that_belong_to_no_token_are_told(make_task: MakeTask, folder: Path) -> None:
    config = BertConfig.from_dict(TINY.to_dict() | {"vocab_size": len(WORDS) + 6})
    BertModel(config).save_pretrained(folder)
    task = make_task()
    assert task.model_config.vocab_size == len(WORDS) + 6
    assert f"6 of its {len(WORDS) + 6} rows of word embeddings belong to no token" in task.describe_data()[0]


def test_unknown_pieces_are_told_and_bounded(
    make_task: MakeTask, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"sentence": "good film " + word, "label": label} for word, label in (("xyz", "a"), ("was", "b"))] * 10
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_task(train=str(tmp_path / "some.jsonl"), validation=str(tmp_path / "some.jsonl"))
    assert "[UNK] among word pieces: train 16.67%, validation 16.67%" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^labelled\.max_unknown_share: 16\.7% of the 54 word pieces of the training"):
        make_task(train=str(tmp_path / "some.jsonl"), validation=None, max_unknown_share=0.1)


def test_a_length_beyond_the_tokenizers_is_refused(make_task: MakeTask, folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 10}))
    with pytest.raises(UserError, match=r"^labelled\.max_length: 12 is not allowed; model_max_length is 10 in "):
        make_task()
    make_task(max_length=10)


def test_ids_that_transformers_would_not_give_are_refused(make_task: MakeTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the folder wrongly, as an earlier version did with accents, shows on the examples themselves."""

    def wrong(path: Path) -> Vocabulary:
        backend = load_tokenizer(path).backend
        backend.pre_tokenizer = pre_tokenizers.CharDelimiterSplit("a")
        return Vocabulary(backend)

    monkeypatch.setattr("engine.tasks.finetune.load_tokenizer", wrong)
    with pytest.raises(UserError, match=r"^tokenizer: .*: the text '.*' is '\[CLS\] .*' for transformers"):
        make_task(max_unknown_share=1.0)
