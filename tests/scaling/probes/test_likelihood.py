"""Pseudo-log-likelihoods are those of a plain loop over transformers' own model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from engine.errors import UserError
from engine.scaling.probes.likelihood import pairs_scores, pseudo_log_likelihoods
from engine.scaling.probes.masked import MaskedModel
from engine.scaling.probes.templates import Pair
from tests.predict.models import POSITIONS, write_model, write_tokenizer

CPU = torch.device("cpu")
#: words of the vocabulary, others that are cut into many pieces, a quoted mask and a character that it lacks
SENTENCES = ["The quick brown fox jumps", "London wrote cafes, lazily.", "fox", "a [MASK] dog ☃", "the nearest den"]


def modernbert(folder: Path) -> Path:
    write_tokenizer(folder)
    tokens = len((folder / "vocab.txt").read_text(encoding="utf-8").splitlines())
    config = transformers.ModernBertConfig(
        vocab_size=tokens, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=POSITIONS, initializer_range=0.4, local_attention=8, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(8)
    transformers.ModernBertForMaskedLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["MaskedLM", "PreTraining", "ModernBert"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("likelihood")
    return modernbert(path) if request.param == "ModernBert" else write_model(path, request.param, ("a", "b"))


def looped(folder: Path, sentence: str) -> list[float]:
    """The log-probability of each piece, one forward pass of transformers each."""
    kind = transformers.AutoConfig.from_pretrained(folder).architectures[0]
    model = getattr(transformers, kind).from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(sentence.replace("[MASK]", "[ MASK ]"), return_tensors="pt")
    words, found = inputs.word_ids(), []
    for place, word in enumerate(words):
        if word is None:
            continue
        masked = inputs["input_ids"].clone()
        for other in range(place, len(words)):
            if words[other] == word:
                masked[0, other] = tokenizer.mask_token_id
        with torch.no_grad():
            output = model(input_ids=masked, attention_mask=inputs["attention_mask"])
        logits = output.prediction_logits if kind == "BertForPreTraining" else output.logits
        found.append(float(logits[0, place].double().log_softmax(-1)[inputs["input_ids"][0, place]]))
    return found


def test_they_are_those_of_a_loop_over_transformers(folder: Path) -> None:
    sums, counts = pseudo_log_likelihoods(MaskedModel(folder, CPU), SENTENCES)
    expected = [looped(folder, sentence) for sentence in SENTENCES]
    assert counts.tolist() == [len(own) for own in expected]
    assert max(counts) > 9
    assert sums == pytest.approx([sum(own) for own in expected], abs=2e-4)
    assert np.ptp(sums / counts) > 1


def test_batches_change_nothing(folder: Path) -> None:
    together, _ = pseudo_log_likelihoods(MaskedModel(folder, CPU), SENTENCES)
    apart, _ = pseudo_log_likelihoods(MaskedModel(folder, CPU, tokens=1), SENTENCES)
    assert together == pytest.approx(apart, abs=1e-5)


def test_scores_of_pairs_are_what_they_are_said_to_be(folder: Path) -> None:
    model = MaskedModel(folder, CPU)
    pairs = [Pair(SENTENCES[0], SENTENCES[2]), Pair(SENTENCES[2], SENTENCES[1]), Pair("a fox", "a dog")]
    scores = pairs_scores(model, "x", pairs)
    good, bad = ([looped(folder, getattr(pair, side)) for pair in pairs] for side in ("good", "bad"))
    apart = np.array([sum(one) - sum(other) for one, other in zip(good, bad, strict=True)])
    shares = 1 / (1 + np.exp(-apart))
    each = np.mean([np.mean(one) - np.mean(other) for one, other in zip(good, bad, strict=True)])
    assert scores.columns == {
        "acc_x": pytest.approx((apart > 0).mean()),
        "prob_x": pytest.approx(shares.mean(), abs=1e-4),
        "logp_x": pytest.approx(each, abs=1e-4),
        "brier_x": pytest.approx((2 * (1 - shares) ** 2).mean(), abs=1e-4),
        "items_x": 3.0,
    }
    (told,) = scores.abilities
    assert (told.name, told.items, told.chance, told.discontinuous) == ("x", 3, 0.5, "acc_x")
    assert told.continuous == ("prob_x", "logp_x", "brier_x")


def test_sentences_that_can_t_be_asked_are_refused(folder: Path) -> None:
    model = MaskedModel(folder, CPU)
    for sentence, what in (("fox " * 39, "more tokens than the 40 positions"), ("\u200b", "no token")):
        with pytest.raises(UserError, match=f"^pairs: .*{what}.*leave that pair out$"):
            pseudo_log_likelihoods(model, ["fox", sentence])


def test_a_model_without_the_head_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "SequenceClassification", ("a", "b"))
    with pytest.raises(UserError, match="predicts no masked words; give the folder of a model that was pre-trained"):
        MaskedModel(tmp_path, CPU)
