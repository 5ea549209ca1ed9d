"""Synonyms are those of WordNet's files, and near words those of a model's embeddings."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.data.augment.neighbours import Neighbours
from engine.data.augment.wordnet import FOLDER, WordNet
from engine.errors import UserError
from tests.data.augment.synonyms import write_wordnet
from tests.predict.models import write_model

INSTALLED = pytest.mark.skipif(not FOLDER.is_dir(), reason="WordNet isn't installed (Debian's wordnet-base)")


def test_synonyms_are_of_the_most_frequent_sense_and_in_use(tmp_path: Path) -> None:
    wordnet = WordNet(write_wordnet(tmp_path / "wordnet"))
    found = wordnet(["film", "big", "foil", "flick", "nothing"])
    assert found == {"film": ("movie",), "big": ("large",), "foil": ("film",), "flick": (), "nothing": ()}
    counts = tmp_path / "wordnet" / "cntlist.rev"
    counts.write_text(counts.read_text().replace("film%2:36:00:: 1 4", "film%2:36:00:: 1 5"))
    assert WordNet(tmp_path / "wordnet")(["film"]) == {"film": ()}  # 5 of 17 times it is a verb
    assert WordNet(tmp_path / "wordnet").fingerprint != wordnet.fingerprint


def test_other_files_have_another_fingerprint(tmp_path: Path) -> None:
    one, other = (WordNet(write_wordnet(tmp_path / name)) for name in ("one", "other"))
    assert one.fingerprint == other.fingerprint
    counts = tmp_path / "other" / "cntlist.rev"
    counts.write_text(counts.read_text().replace(" 9\n", " 8\n"))
    assert WordNet(tmp_path / "other").fingerprint != one.fingerprint


def test_a_missing_file_tells_what_to_install(tmp_path: Path) -> None:
    folder = write_wordnet(tmp_path / "wordnet")
    (folder / "data.adj").unlink()
    with pytest.raises(UserError, match=r"data.adj is not there .*apt-get install wordnet-base, or take eda_neig"):
        WordNet(folder)


@INSTALLED
def test_the_installed_files_are_read() -> None:
    found = WordNet()(["film", "movie", "week", "good", "party", "its"])
    assert found["film"] == ("movie", "picture")
    assert "film" in found["movie"]
    assert found["week"] == ()  # its only synonym is hebdomad
    assert all(" " not in word and "_" not in word for words in found.values() for word in words)


def test_neighbours_are_those_of_float64(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "MaskedLM", ("a", "b"))
    weights = load_file(folder / "model.safetensors")
    name = "bert.embeddings.word_embeddings.weight"
    torch.manual_seed(1)
    weights[name] = weights[name] + 2 * torch.randn(1, 32)  # so that words are near one another
    save_file(weights, folder / "model.safetensors")
    neighbours = Neighbours(str(folder))
    vectors = weights[name].double().numpy()
    words = (folder / "vocab.txt").read_text().splitlines()
    whole = [index for index, word in enumerate(words) if word.isalpha() and len(word) > 1]
    unit = vectors[whole] / np.linalg.norm(vectors[whole], axis=1, keepdims=True)
    cosines = unit @ unit.T
    place = [words[index] for index in whole].index("fox")
    order = [other for other in np.argsort(-cosines[place]) if other != place and cosines[place, other] > 0.45]
    nearest = [words[whole[other]] for other in order]
    assert nearest
    assert list(neighbours(["fox"])["fox"]) == nearest[:5]
    together = neighbours(["fox", "dog", "unheard", "lazy"])
    assert together == {word: neighbours([word])[word] for word in together}
    assert together["unheard"] == ()


def test_a_folder_without_embeddings_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", "MaskedLM", ("a", "b"))
    weights = load_file(folder / "model.safetensors")
    save_file({"bert.pooler.dense.bias": weights["cls.predictions.bias"]}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"its weights lack word_embeddings.weight"):
        Neighbours(str(folder))
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no such folder"):
        Neighbours(str(folder))
