"""Cloze questions against a plain count of the store's words."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.config import ARCHITECTURES, ModelConfig
from engine.data.store.prepare import PrepareConfig, prepare
from engine.data.store.store import TokenStore, open_store
from engine.errors import UserError
from engine.model.build import initialise
from engine.model.folder import described, export_huggingface, tokenizer_files
from engine.scaling.probes.cloze import BANDS, PER_WORD, _questions, cloze
from engine.scaling.probes.masked import MaskedModel, Question
from engine.scaling.probes.request import Request

CPU = torch.device("cpu")
CONTEXT = 24


def export(store: Path, out: Path, kind: str = "bert", **options: int) -> Path:
    """A tiny random model of a store's tokenizer."""
    size = ModelConfig(hidden_size=32, heads=2, layers=2, intermediate_size=48, **{"max_positions": 48, **options})
    architecture = ARCHITECTURES.get(kind)
    config = architecture.fresh_config(size, open_store(store).tokenizer.vocab_size, 0)
    model = architecture.build("masked_lm", described(config, architecture.export_classes["masked_lm"]), False)
    initialise(model, 4)
    files = tokenizer_files(open_store(store).tokenizer_path)
    export_huggingface(model.state_dict(), model.config, files, out, check=False)
    return out


@pytest.fixture(scope="module")
def bpe_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe") / "store"
    prepare(PrepareConfig(source=["embedded"], output=str(folder), vocab_size=1000, vocabulary="bpe", workers=0))
    return folder


def documents(store: TokenStore, name: str) -> list[list[list[int]]]:
    """The ids of each sentence of each document of a split."""
    split = store.split(name)
    sentences, start = [], 0
    for length in split.sentence_lengths.tolist():
        sentences.append(split.tokens(start, length).tolist())
        start += length
    bounds = split.document_starts.tolist()
    return [sentences[first:stop] for first, stop in pairwise(bounds)]


def words_of(store: TokenStore, name: str) -> Counter[tuple[int, ...]]:
    """How often a split has each word of letters, as pieces."""
    vocabulary, counts = store.tokenizer, Counter[tuple[int, ...]]()
    letters = [vocabulary.text_of(token).removeprefix("##").isalpha() for token in range(vocabulary.vocab_size)]
    continues = vocabulary.continues_word.tolist()
    for sentence in (each for text in documents(store, name) for each in text):
        found: list[list[int]] = []
        for token in sentence:
            if found and continues[token] and letters[token] and letters[found[-1][-1]]:
                found[-1].append(token)
            else:
                found.append([token])
        counts.update(tuple(word) for word in found if letters[word[0]] and not continues[word[0]])
    return counts


def filled(question: Question) -> list[int]:
    """Its ids without masks."""
    ids = question.ids.copy()
    ids[question.places] = question.answers
    return ids.tolist()


@pytest.mark.parametrize("kind", ["store", "bpe_store"])
def test_words_are_masked_whole_and_of_their_band(kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    store = open_store(path)
    words = store.tokenizer
    counts, held = (words_of(store, name) for name in ("train", "validation"))
    texts = [" ".join(map(str, [token for each in text for token in each])) for text in documents(store, "validation")]
    questions = _questions(path, store.manifest.fingerprint, 60, CONTEXT, 3)
    for band, (least, most) in BANDS.items():
        asked = Counter(tuple(question.answers.tolist()) for question in questions[band])
        assert asked.keys() <= held.keys()
        assert all(least <= counts[word] * 1e6 / counts.total() <= most and counts[word] for word in asked)
        assert max(asked.values()) <= PER_WORD
        for question in questions[band]:
            assert set(question.ids[question.places].tolist()) == {words.mask_id}
            assert np.diff(question.places).tolist() == [1] * (len(question.places) - 1)
            assert len(question.ids) <= CONTEXT
            first, *inside, last = filled(question)
            assert (first, last) == (words.cls_id, words.sep_id)
            context = f" {' '.join(map(str, inside))} "
            assert any(context in f" {text} " for text in texts)
    assert len(questions["frequent"]) == 60
    assert any(len(question.places) > 1 for band in questions.values() for question in band)


def test_the_seed_draws_the_questions(store: Path) -> None:
    fingerprint = open_store(store).manifest.fingerprint

    def drawn(seed: int) -> list[list[int]]:
        _questions.cache_clear()
        return [question.ids.tolist() for question in _questions(store, fingerprint, 40, CONTEXT, seed)["frequent"]]

    assert drawn(0) == drawn(0) != drawn(1)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_scores_are_means_over_words(kind: str, store: Path, tmp_path: Path) -> None:
    model = MaskedModel(export(store, tmp_path / "model", kind), CPU)
    request = Request(store=store, items=50, context=CONTEXT)
    scores = cloze(model, request)
    questions = _questions(store, open_store(store).manifest.fingerprint, 50, CONTEXT, 0)
    for band, own in questions.items():
        answers = [model.answer([question]) for question in own]
        logs = [answer.log_probabilities for answer in answers]
        assert scores.columns[f"acc_cloze_{band}"] == np.mean([answer.right.all() for answer in answers])
        assert scores.columns[f"prob_cloze_{band}"] == pytest.approx(np.mean([np.exp(log.sum()) for log in logs]))
        assert scores.columns[f"logp_cloze_{band}"] == pytest.approx(np.mean([log.mean() for log in logs]), abs=1e-5)
        assert scores.columns[f"items_cloze_{band}"] == len(own)
    small = cloze(MaskedModel(model.folder, CPU, tokens=1), request)
    assert small.columns == pytest.approx(scores.columns, abs=1e-5)


def test_a_right_answer_is_the_most_probable_piece(store: Path, tmp_path: Path) -> None:
    model = MaskedModel(export(store, tmp_path / "model"), CPU)
    mask, ids = model.vocabulary.mask_id, model.vocabulary.regular_ids
    asked = np.array([model.vocabulary.cls_id, mask, ids[7], mask, model.vocabulary.sep_id], dtype=np.int32)
    every = [Question(asked, np.array([3]), np.array([token], dtype=np.int32)) for token in range(1000)]
    answers = model.answer(every)
    assert answers.right.sum() == 1
    assert answers.right.argmax() == answers.log_probabilities.argmax()
    assert np.exp(answers.log_probabilities).sum() == pytest.approx(1.0, abs=1e-5)


def test_what_can_t_be_asked_is_refused(store: Path, bpe_store: Path, tmp_path: Path) -> None:
    model = MaskedModel(export(store, tmp_path / "model"), CPU)
    for request, what in (
        (Request(store=bpe_store), "^store: .* its tokenizer is not that of"),
        (Request(store=store, context=49), "^context: 49 is not allowed; .* has 48 positions: give at most that"),
        (Request(store=tmp_path / "none"), "does not exist; make it with"),
    ):
        with pytest.raises(UserError, match=what):
            cloze(model, request)
    whole = tmp_path / "whole"
    prepare(PrepareConfig(source=["embedded"], output=str(whole), vocab_size=1000, workers=0, validation_fraction=0.0))
    with pytest.raises(UserError, match="holds out no word that occurs 100 to inf times among a million"):
        cloze(MaskedModel(export(whole, tmp_path / "other"), CPU), Request(store=whole, context=CONTEXT))
