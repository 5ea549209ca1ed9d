"""Pre-training: shares add up to the global batch's means, and contradictions are refused."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertForMaskedLM

from engine.config import RunConfig, Shape
from engine.data.loading.loader import evaluation_batches, resolve_layout, training_batches
from engine.data.loading.source import Cursor, MicroBatch
from engine.data.store.prepare import PrepareConfig, prepare
from engine.data.tokenizer.wordpiece import load_tokenizer
from engine.errors import UserError
from engine.model.flops import training_flops
from engine.model.folder import described, export_huggingface, tokenizer_files
from engine.tasks.pretrain import NOTATION, Pretraining, escape, loss_shares
from tests.data.tokenizer.folders import roberta


def config(store: Path, **model: object) -> RunConfig:
    run = RunConfig()
    run.model = replace(run.model, hidden_size=32, heads=2, layers=1, max_positions=64, **model)  # type: ignore[arg-type]
    run.data = replace(run.data, path=str(store), sequence_length=64)
    return run


@pytest.fixture(scope="module")
def task(store: Path) -> Pretraining:
    return Pretraining(config(store))


def test_shares_of_any_split_add_up_to_the_mean_over_the_global_batch(task: Pretraining) -> None:
    model = task.build_model().eval()
    sums = []
    for micro_batch in (8, 2):
        layout = resolve_layout(8, micro_batch, 1)
        batches = training_batches(task.train_source(), layout, Cursor(), 0)
        outputs = [task.step(model, next(batches)) for _ in range(layout.accumulation)]
        sums.append({name: sum(float(o.metrics[name]) for o in outputs) for name in outputs[0].metrics})
        sums[-1]["loss"] = sum(float(output.loss) for output in outputs)
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    assert sums[0]["loss"] == pytest.approx(sums[0]["mlm_loss"] + sums[0]["nsp_loss"])


def test_an_untrained_model_knows_nothing(task: Pretraining, tmp_path: Path) -> None:
    batches = evaluation_batches(task.evaluation_source("validation"), 0, 1, 8, 32)  # type: ignore[arg-type]
    with torch.no_grad():
        result = task.evaluate(task.build_model().eval(), batches)
    assert result.scalars["mlm_loss"] == pytest.approx(math.log(task.vocabulary.vocab_size), rel=0.02)
    assert result.scalars["nsp_loss"] == pytest.approx(math.log(2), rel=0.05)
    assert result.scalars["perplexity"] == pytest.approx(math.exp(result.scalars["mlm_loss"]))
    assert "perplexity" in task.report(result, tmp_path)


def test_an_evaluation_is_the_same_twice_and_over_any_number_of_ranks(task: Pretraining) -> None:
    source = task.evaluation_source("validation")
    assert source is not None
    model = task.build_model().eval()
    with torch.no_grad():
        whole = task.evaluate(model, evaluation_batches(source, 0, 1, 8, 20)).scalars
        parts = [task.evaluate(model, evaluation_batches(source, rank, 2, 8, 20)).scalars for rank in range(2)]
    for name in ("mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy"):
        assert whole[name] == pytest.approx(parts[0][name] + parts[1][name], rel=1e-5)


def guessed(task: Pretraining, guesses: list[str]) -> str:
    """What is shown of "[CLS] the of the ##ing" where all but the first two are masked and guessed."""
    tokens, words = task.vocabulary.tokens, task.vocabulary
    truth = [tokens.index(token) for token in ("of", "the", "##ing")]
    inputs = {
        "input_ids": torch.tensor([words.cls_id, tokens.index("the"), *[words.mask_id] * 3]),
        "lengths": torch.tensor([5]),
        "mlm_positions": torch.tensor([2, 3, 4]),
        "mlm_labels": torch.tensor(truth),
    }
    return task.show_guesses(inputs, torch.tensor([tokens.index(guess) for guess in guesses]))


def test_right_guesses_are_bold_and_wrong_ones_stand_before_the_truth(task: Pretraining) -> None:
    notation, _, sentence = guessed(task, ["of", "of", "*"]).split("\n")
    assert notation == NOTATION
    assert sentence == "- \\[CLS\\] the **of** *of → the* *\\* → \\#\\#ing*"


def test_tensorboard_shows_the_notation_and_explains_it(task: Pretraining) -> None:
    from tensorboard.plugin_util import markdown_to_safe_html

    html = markdown_to_safe_html(guessed(task, ["of", "of", "*"]))
    assert "<li>[CLS] the <strong>of</strong> <em>of → the</em> <em>* → ##ing</em></li>" in html
    assert "<strong>word</strong>: masked, and the model guessed it." in html
    assert "<em>guess → word</em>: masked, and the model guessed otherwise." in html


def test_markdown_signs_are_shown_as_they_are() -> None:
    assert escape("a_b*c~[d]#") == r"a\_b\*c\~\[d\]\#"


def test_losses_divide_by_the_totals_of_the_global_batch() -> None:
    outputs = {"mlm_loss_sum": 6.0, "nsp_loss_sum": 4.0, "mlm_correct": 3, "nsp_correct": 2}
    shares = loss_shares(outputs, {"mlm": 12.0, "sequences": 8.0})
    assert shares == {"mlm_loss": 0.5, "nsp_loss": 0.5, "mlm_accuracy": 0.25, "nsp_accuracy": 0.25}


@pytest.fixture(scope="module")
def alone(store: Path) -> Pretraining:
    """The task with MLM alone."""
    return Pretraining(mlm(store))


def mlm(store: Path, **model: object) -> RunConfig:
    run = config(store, **model)
    run.data = replace(run.data, objective="mlm")
    return run


def test_mlm_alone_has_no_number_of_nsp(alone: Pretraining, tmp_path: Path) -> None:
    model = alone.build_model().eval()
    batch = next(training_batches(alone.train_source(), resolve_layout(8, 8, 1), Cursor(), 0))
    assert len(batch.inputs["input_ids"]) == 8 * 64
    output = alone.step(model, batch)
    assert set(output.metrics) == {"mlm_loss", "mlm_accuracy"}
    assert float(output.loss) == float(output.metrics["mlm_loss"])
    batches = evaluation_batches(alone.evaluation_source("validation"), 0, 1, 8, 32)  # type: ignore[arg-type]
    with torch.no_grad():
        result = alone.evaluate(model, batches)
    assert list(result.scalars) == ["mlm_loss", "mlm_accuracy", "loss", "perplexity"]
    assert result.scalars["loss"] == result.scalars["mlm_loss"]
    assert result.scalars["mlm_loss"] == pytest.approx(math.log(alone.vocabulary.vocab_size), rel=0.02)
    assert "NSP" not in alone.report(result, tmp_path)
    assert "NSP" not in result.texts["masked_sentences"]


def test_pieces_of_a_sequence_attend_to_themselves_alone(alone: Pretraining) -> None:
    """The loss of a batch is the sum of its pieces' own losses."""
    model = alone.build_model().eval()
    batches = training_batches(alone.train_source(), resolve_layout(32, 32, 1), Cursor(), 0)
    batch = next(each.inputs for each in batches if len(each.inputs["lengths"]) > 32)
    whole = float(model(**batch)["mlm_loss_sum"])
    ends = batch["lengths"].cumsum(0).tolist()
    parts = 0.0
    for start, end in zip([0, *ends], ends, strict=False):
        own = (batch["mlm_positions"] >= start) & (batch["mlm_positions"] < end)
        piece = {name: batch[name][start:end] for name in ("input_ids", "token_type_ids", "position_ids")}
        labels = {"mlm_positions": batch["mlm_positions"][own] - start, "mlm_labels": batch["mlm_labels"][own]}
        if own.any():
            parts += float(model(**piece, **labels, lengths=torch.tensor([end - start]))["mlm_loss_sum"])
    assert parts == pytest.approx(whole, rel=1e-5)


def test_its_shares_add_up_and_its_flops_have_no_pooler(alone: Pretraining) -> None:
    model = alone.build_model().eval()
    sums = []
    for micro_batch in (8, 2):
        layout = resolve_layout(8, micro_batch, 1)
        batches = training_batches(alone.train_source(), layout, Cursor(), 0)
        sums.append(sum(float(alone.step(model, next(batches)).loss) for _ in range(layout.accumulation)))
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    batch = next(training_batches(alone.train_source(), resolve_layout(8, 8, 1), Cursor(), 0))
    shape = Shape(32, 1, 2, 128, alone.model_config.vocab_size, 64, pooler=False)
    masked = batch.inputs["mlm_positions"].numel()
    assert alone.flops(batch) == training_flops(shape, batch.inputs["lengths"].tolist(), masked)


def test_its_export_is_transformers_class_for_mlm_and_either_objective_goes_on_from_the_other(
    task: Pretraining, alone: Pretraining, store: Path, tmp_path: Path
) -> None:
    folder = exported(alone, store / "tokenizer", tmp_path / "alone")
    theirs, report = BertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours = alone.load_export(folder).state_dict()
    assert all(torch.equal(ours[name], value) for name, value in theirs.state_dict().items() if name in ours)
    pairs = Pretraining(config(store, init_from=str(folder)))
    pairs.build_model()
    assert pairs.loaded is not None
    assert sorted(pairs.loaded.initialised) == sorted(
        f"{name}.{kind}" for name in ("bert.pooler.dense", "cls.seq_relationship") for kind in ("weight", "bias")
    )
    back = Pretraining(mlm(store, init_from=str(exported(task, store / "tokenizer", tmp_path / "pairs"))))
    back.build_model()
    assert back.loaded is not None
    assert not back.loaded.initialised
    assert len(back.loaded.unused) == 4


@pytest.mark.parametrize("objective", ["mlm", "mlm_nsp"])
def test_evaluations_mask_at_a_fixed_rate_whatever_the_run_does(store: Path, objective: str) -> None:
    run = config(store)
    rates = {"mask_probability": 0.3, "mask_probability_end": 0.1, "eval_mask_probability": 0.2}
    run.data = replace(run.data, objective=objective, **rates)  # type: ignore[arg-type]
    run.train = replace(run.train, steps=3)
    task = Pretraining(run)
    assert task.describe_data()[-1] == "masked tokens: 30.0% at the start, 10.0% at the end, 20.0% held out"
    assert held_out_share(task) == pytest.approx(0.2, abs=0.01)
    batches = training_batches(task.train_source(), resolve_layout(64, 64, 1), Cursor(), 0)
    shares = [share_masked(next(batches)) for _ in range(5)]
    # the middle of each of three steps, then the end
    assert shares == pytest.approx([0.3 - 0.2 / 6, 0.2, 0.1 + 0.2 / 6, 0.1, 0.1], abs=0.01)
    unset = replace(run, data=replace(run.data, eval_mask_probability=None))
    assert held_out_share(Pretraining(unset)) == pytest.approx(0.3, abs=0.01)


def held_out_share(task: Pretraining) -> float:
    source = task.evaluation_source("validation")
    assert source is not None
    return share_masked(next(evaluation_batches(source, 0, 1, 32, 32)))


def share_masked(batch: MicroBatch) -> float:
    """Of a batch's tokens without [CLS] and [SEP]."""
    special = sum(int((batch.inputs["input_ids"] == token).sum()) for token in (2, 3))
    return len(batch.inputs["mlm_positions"]) / (len(batch.inputs["input_ids"]) - special)


def test_pairs_of_a_single_document_are_refused_with_the_other_objective(store: Path, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("It was a dark night. The rain fell on the roofs of the town and nobody was out. " * 40)
    options = {"tokenizer": str(store / "tokenizer"), "validation_fraction": 0.0, "objective": "mlm", "workers": 0}
    prepare(PrepareConfig(source=[str(text)], output=str(tmp_path / "one"), documents="file", **options))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^data\.objective: 'mlm_nsp' .* has 1; give --data\.objective mlm"):
        Pretraining(config(tmp_path / "one"))
    task = Pretraining(mlm(tmp_path / "one"))
    assert task.evaluation_source("validation") is None
    assert "shows each of the text's" in task.describe_data()[-1]
    model = task.build_model()
    batch = next(training_batches(task.train_source(), resolve_layout(4, 4, 1), Cursor(), 0))
    assert math.isfinite(float(task.step(model, batch).loss))


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt"])
def test_weights_of_another_vocabulary_of_the_same_size_are_refused(
    task: Pretraining, store: Path, tmp_path: Path, name: str
) -> None:
    """The ids fit, the words don't: only the fingerprint can tell."""
    shutil.copytree(store / "tokenizer", tmp_path / "tokenizer")
    if name == "tokenizer.json":
        (tmp_path / "tokenizer" / "vocab.txt").unlink()
        tokenizer = tmp_path / "tokenizer" / "tokenizer.json"
        state = json.loads(tokenizer.read_text())
        vocab = state["model"]["vocab"]
        vocab["the"], vocab["of"] = vocab["of"], vocab["the"]
        tokenizer.write_text(json.dumps(state))
    else:
        (tmp_path / "tokenizer" / "tokenizer.json").unlink()
        words = (tmp_path / "tokenizer" / "vocab.txt").read_text()
        swapped = words.replace("\nthe\n", "\n?\n").replace("\nof\n", "\nthe\n").replace("\n?\n", "\nof\n", 1)
        (tmp_path / "tokenizer" / "vocab.txt").write_text(swapped)
    exported(task, tmp_path / "tokenizer", tmp_path / "model")
    with pytest.raises(UserError, match=r"model\.init_from: the vocabulary of .* is not the one"):
        Pretraining(config(store, init_from=str(tmp_path / "model")))


def test_a_sequence_longer_than_the_loaded_models_positions_is_refused(
    task: Pretraining, store: Path, tmp_path: Path
) -> None:
    exported(task, store / "tokenizer", tmp_path / "model")
    run = config(store, init_from=str(tmp_path / "model"))
    run.data = replace(run.data, sequence_length=128)
    with pytest.raises(UserError, match=r"data\.sequence_length: 128 exceeds the 64 positions"):
        Pretraining(run)


def exported(task: Pretraining, tokenizer: Path, out: Path) -> Path:
    weights, named = task.build_model().state_dict(), described(task.model_config, task.export_class(task.model_config))
    export_huggingface(weights, named, tokenizer_files(tokenizer), out)
    return out


def test_weights_without_a_tokenizer_are_refused(task: Pretraining, store: Path, tmp_path: Path) -> None:
    """Nothing would tell whether their ids mean the same words; a copied word list does."""
    folder = exported(task, store / "tokenizer", tmp_path / "model")
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"^model\.init_from: .* holds no tokenizer, .*; copy the model's vocab\.txt"):
        Pretraining(config(store, init_from=str(folder)))
    shutil.copy(store / "tokenizer" / "vocab.txt", folder)
    Pretraining(config(store, init_from=str(folder)))


def test_a_word_list_alone_suffices(task: Pretraining, store: Path, tmp_path: Path) -> None:
    folder = exported(task, store / "tokenizer", tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    assert Pretraining(config(store, init_from=str(folder))).model_config.vocab_size == task.vocabulary.vocab_size


def test_a_sequence_longer_than_the_tokenizer_says_is_refused(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "store")
    path = tmp_path / "store" / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": 48}))
    with pytest.raises(UserError, match=r"^data\.sequence_length: 64 exceeds model_max_length 48 of .*; lower it"):
        Pretraining(config(tmp_path / "store"))


@pytest.fixture(scope="module")
def deidentified(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the same tokenizer with two tokens more."""
    folder = tmp_path_factory.mktemp("deidentified") / "store"
    options = {"tokenizer": str(store / "tokenizer"), "special_tokens": ["[DEID]", "[NAME]"], "workers": 0}
    prepare(PrepareConfig(source=["embedded"], output=str(folder), **options))  # type: ignore[arg-type]
    return folder


def test_embeddings_grow_by_the_tokens_that_were_added(
    task: Pretraining, store: Path, deidentified: Path, tmp_path: Path
) -> None:
    """The old rows are the folder's, the new ones BERT's initial values, drawn from the seed."""
    folder = exported(task, store / "tokenizer", tmp_path / "model")
    old = task.build_model().state_dict()
    grown = Pretraining(config(deidentified, init_from=str(folder)))
    assert "2 new rows of word embeddings, from the seed, for [DEID] [NAME]" in grown.describe_data()[0]
    models = [grown.build_model().state_dict() for _ in range(2)]
    rows = task.vocabulary.vocab_size
    embeddings = models[0]["bert.embeddings.word_embeddings.weight"]
    assert embeddings.shape == (rows + 2, 32)
    torch.testing.assert_close(embeddings[:rows], old["bert.embeddings.word_embeddings.weight"], rtol=0, atol=0)
    assert 0.005 < float(embeddings[rows:].std()) < 0.05
    assert torch.equal(models[0]["cls.predictions.bias"], torch.zeros(rows + 2))
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert all(torch.equal(models[0][name], old[name]) for name in old if models[0][name].shape == old[name].shape)

    again = exported(grown, deidentified / "tokenizer", tmp_path / "again")
    assert load_tokenizer(again).tokens[rows:] == ["[DEID]", "[NAME]"]
    assert Pretraining(config(deidentified, init_from=str(again))).model_config.vocab_size == rows + 2
    with pytest.raises(UserError, match=r"the vocabulary of .* is not the one"):
        Pretraining(config(store, init_from=str(again)))


def test_pairs_are_not_written_for_a_tokenizer_that_frames_them_otherwise(store: Path, tmp_path: Path) -> None:
    """RoBERTa's own puts </s></s> between two texts."""
    roberta(tmp_path / "theirs")
    options = {"tokenizer": str(tmp_path / "theirs"), "workers": 0}
    prepare(PrepareConfig(source=["embedded"], output=str(tmp_path / "store"), **options))  # type: ignore[arg-type]
    said = (
        r"^data\.objective: 'mlm_nsp' writes one </s> between .*/store/tokenizer does not; give --data\.objective mlm"
    )
    with pytest.raises(UserError, match=said) as raised:
        Pretraining(config(tmp_path / "store"))
    assert "\n" not in str(raised.value)
    Pretraining(mlm(tmp_path / "store"))
