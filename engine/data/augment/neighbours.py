"""Words near each other in a model's word embeddings, which stand in for synonyms where there is no WordNet.

Shapes: K words of a vocabulary that are one piece each, H width of the embeddings, Q words that are asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.data.tokenizer.vocabulary import Vocabulary
from engine.data.tokenizer.wordpiece import load_tokenizer
from engine.errors import UserError
from engine.hub import local_folder
from engine.model.pretrained import word_embeddings

#: neighbours of a word, and their least cosine
NEAREST, LEAST = 5, 0.45
#: numbers of unit vectors are rounded to multiples of 1 / _SCALE: sums of products of these are exact in fp32
_SCALE = 2.0**11
#: words whose neighbours are looked for in one product
_AT_ONCE = 256


class Neighbours:
    """The nearest words of each word; every process finds the same, whatever it is asked for at once."""

    def __init__(self, model: str) -> None:
        """
        Args:
            model: folder of an encoder, or its name on the hub.

        Raises:
            UserError: no weights or no tokenizer of an encoder there.
        """
        folder = local_folder(model)
        embeddings = word_embeddings(Path(folder))
        ids, self._words = whole_words(load_tokenizer(Path(folder)), len(embeddings), Path(folder))
        vectors = embeddings[ids].numpy().astype(np.float64)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        self._vectors: NDArray[np.float32] = np.rint(vectors * _SCALE).astype(np.float32)
        self._places = {word: index for index, word in reversed(list(enumerate(self._words)))}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of words and vectors."""
        digest = hashlib.sha256("\n".join(self._words).encode())
        digest.update(self._vectors.data)
        return digest.hexdigest()

    def __call__(self, lemmas: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The neighbours of words in small letters, nearest first; perhaps none."""
        known = [lemma for lemma in lemmas if lemma in self._places]
        found: dict[str, tuple[str, ...]] = dict.fromkeys(lemmas, ())
        for start in range(0, len(known), _AT_ONCE):
            part = known[start : start + _AT_ONCE]
            cosines = self._vectors[[self._places[lemma] for lemma in part]] @ self._vectors.T
            found |= zip(part, map(self._near, part, cosines), strict=True)
        return found

    def _near(self, lemma: str, cosines: NDArray[np.float32]) -> tuple[str, ...]:
        """Args: cosines are those of a word with all words [K], times `_SCALE` squared."""
        # a cased vocabulary has a word in several forms, which are no neighbours of one another
        few = np.sort(np.argpartition(-cosines, min(4 * NEAREST, len(cosines) - 1))[: 4 * NEAREST])
        order = few[np.argsort(-cosines[few], kind="stable")]
        near = [self._words[place] for place in order if cosines[place] >= LEAST * _SCALE**2]
        others = dict.fromkeys(word.lower() for word in near if word.lower() != lemma)
        return tuple(others)[:NEAREST]


def whole_words(vocabulary: Vocabulary, rows: int, folder: Path) -> tuple[NDArray[np.int64], list[str]]:
    """Ids of the pieces that are a whole word of letters, ascending, and the words, [K].

    Args:
        rows, folder: of the word embeddings that have these ids.

    Raises:
        UserError: the embeddings are of another vocabulary.
    """
    if vocabulary.vocab_size > rows:
        raise UserError(
            f"model: {folder} has a tokenizer of {vocabulary.vocab_size} tokens and word embeddings of {rows}; copy "
            "the tokenizer's files that came with the weights there"
        )
    whole = vocabulary.regular_ids[~vocabulary.continues_word[vocabulary.regular_ids]]
    texts = {int(index): vocabulary.text_of(int(index)) for index in whole}
    chosen = [index for index, text in texts.items() if text.isalpha() and len(text) > 1]
    return np.array(chosen, dtype=np.int64), [texts[index] for index in chosen]
