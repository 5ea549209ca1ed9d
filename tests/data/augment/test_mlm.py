"""Words of a masked language model have their exact probabilities among whole words, whatever is beside them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from engine.data.augment.draws import draws_for
from engine.data.augment.mlm import MaskedWords, choose
from engine.data.augment.words import Words, split_text
from engine.errors import UserError
from tests.data.augment.synonyms import tagged
from tests.predict.models import some_texts, write_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("mlm"), "MaskedLM", ("a", "b"))


def method(model: Path, *operations: str, top: int = 0, share: float = 0.01) -> MaskedWords:
    return MaskedWords(str(model), share, operations or ("replace", "insert"), top, CPU)


def test_a_word_has_the_probability_that_transformers_computes(model: Path) -> None:
    masked = method(model, "replace")
    theirs = transformers.BertForMaskedLM.from_pretrained(model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    inputs = tokenizer("the quick [MASK] jumps", return_tensors="pt")
    with torch.no_grad():
        logits = theirs(**inputs).logits[0, 3].double()
    words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    whole = [index for index, word in enumerate(words) if word.isalpha() and len(word) > 1]
    (ours,) = masked.logits(["the quick [MASK] jumps"])
    assert ours is not None
    assert masked.words == [words[index] for index in whole]
    assert ours[0] == pytest.approx(logits[whole].numpy(), abs=1e-4)
    kept = [place for place, index in enumerate(whole) if words[index] != "fox"]
    text = split_text("fox")  # the one word that can be masked
    found = Counter(one.words[0] for one in masked([text] * 4000, draws_for(1, np.arange(4000))))
    (alone,) = masked.logits(["[MASK]"])
    assert alone is not None
    expected = np.exp(alone[0][kept] - alone[0][kept].max())
    expected /= expected.sum()
    apart = [abs(found[masked.words[place]] / 4000 - p) for place, p in zip(kept, expected, strict=True)]
    assert max(apart) < 0.04
    assert "fox" not in found


def test_the_most_probable_words_alone_are_drawn() -> None:
    logits = np.array([1.0, 3.0, -np.inf, 2.0, 0.0])
    draws = np.linspace(0, 1, 101)[:-1]
    assert {choose(logits, 2, float(draw)) for draw in draws} == {1, 3}
    assert {choose(logits, 0, float(draw)) for draw in draws} == {0, 1, 3, 4}
    share = np.mean([choose(logits, 2, float(draw)) == 1 for draw in draws])
    assert share == pytest.approx(np.e / (1 + np.e), abs=0.01)


def test_new_texts_don_t_depend_on_their_neighbours(model: Path) -> None:
    masked = method(model, top=10, share=0.2)
    texts = [split_text(text) for text in some_texts(30) if text.strip()]
    together = masked(texts, draws_for(2, np.arange(len(texts))))
    apart = [masked([text], draws_for(2, np.array([index])))[0] for index, text in enumerate(texts)]
    assert together == apart
    assert sum(one != text for one, text in zip(together, texts, strict=True)) > 0.8 * len(texts)


def test_what_is_too_long_for_the_model_stays(model: Path) -> None:
    text = split_text("fox " * 100)
    for one in method(model, "replace", share=0.5)([text] * 3, draws_for(1, np.arange(3))):
        assert len(one.words) == 100
        assert one.words[38:] == text.words[38:]
        assert one.words[:38] != text.words[:38]
    for one in method(model, "insert", share=0.5)([text] * 3, draws_for(1, np.arange(3))):
        assert 100 < len(one.words) <= 138
        assert "[MASK]" not in one.text


def test_tags_and_negations_stay(model: Path) -> None:
    words = tagged("Ada/B-P Lovelace/I-P writes/O not/O in/O London/B-L ./O")
    seen = set()
    for operation, longer in (("replace", 0), ("insert", 1)):
        for one in method(model, operation)([words] * 60, draws_for(1, np.arange(60))):
            assert len(one.words) == len(words.words) + longer
            assert [one.words[a:b] for a, b, _ in one.entities] == [("Ada", "Lovelace"), ("London",)]
            assert "not" in one.words
            assert one.words[-1] == "." or longer
            seen.add(one)
    assert len(seen) > 30


def test_a_text_that_quotes_the_mask_or_has_no_word_stays(model: Path) -> None:
    texts: list[Words] = [split_text("the [MASK] fox"), split_text("..."), split_text("not")]
    assert method(model)(texts, draws_for(1, np.arange(3))) == texts


def test_a_model_without_the_head_is_refused(model: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", "TokenClassification", ("a", "b"))
    with pytest.raises(UserError, match="names 'BertForTokenClassification', which predicts no masked words; give the"):
        method(other)
    fresh = write_model(tmp_path / "fresh", "MaskedLM", ("a", "b"))
    weights = load_file(fresh / "model.safetensors")
    save_file({name: each for name, each in weights.items() if "transform" not in name}, fresh / "model.safetensors")
    with pytest.raises(UserError, match=r"has no weights of cls\.predictions\.transform"):
        method(fresh)
    assert method(model).fingerprint != method(model, top=5).fingerprint
