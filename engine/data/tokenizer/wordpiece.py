"""WordPiece: train a vocabulary, or load one; the names that the rest of the pipeline imports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engine.data.tokenizer.folder import load_tokenizer
from engine.data.tokenizer.vocabulary import (
    CONTINUES,
    SPECIAL_TOKENS,
    Vocabulary,
    bert_backend,
    check_special_tokens,
    unquote,
)
from engine.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["MIN_VOCAB_SIZE", "SPECIAL_TOKENS", "Vocabulary", "load_tokenizer", "train_wordpiece", "unquote"]

MAX_ALPHABET = 1000
MIN_VOCAB_SIZE = 64
MIN_FREQUENCY = 2


def train_wordpiece(
    documents: Iterable[str],
    out_dir: Path,
    vocab_size: int,
    lowercase: bool = True,
    special_tokens: Sequence[str] = (),
) -> Vocabulary:
    """Learn a WordPiece vocabulary with BERT's normaliser and splitter, and save it to `out_dir`.

    `documents` is read twice (characters, then words), so it must be re-iterable, not a generator.

    Ids: the five special tokens, `special_tokens`, single characters, ##characters, then pieces in the order
    in which they were learned. Equal documents give an equal vocabulary. It is smaller than `vocab_size` when
    too few word pieces occur twice in the text.

    Raises:
        UserError: the documents hold no text, or a special token that no text could hold.
    """
    from tokenizers import trainers

    assert iter(documents) is not documents, "documents are read twice"
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size: {vocab_size} is too small; give at least {MIN_VOCAB_SIZE}")
    check_special_tokens(special_tokens)
    special_tokens = [token for token in dict.fromkeys(special_tokens) if token not in SPECIAL_TOKENS]
    backend = _assemble([*SPECIAL_TOKENS, *special_tokens], lowercase, special_tokens).backend
    initial, continuing = _alphabet(documents, backend, min(MAX_ALPHABET, vocab_size // 4))
    # The trainer numbers characters in the order of a hash map with random seeds. Ids break ties between merges,
    # so they are fixed first: tokens given as special get theirs in the order given.
    fixed = [*SPECIAL_TOKENS, *special_tokens, *initial, *(CONTINUES + character for character in continuing)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=fixed,
        initial_alphabet=initial,
        limit_alphabet=len(initial),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    ids = backend.get_vocab(with_added_tokens=False)
    vocabulary = _assemble(sorted(ids, key=ids.__getitem__), lowercase, special_tokens)
    vocabulary.save(out_dir)
    return vocabulary


def _alphabet(documents: Iterable[str], backend: Tokenizer, limit: int) -> tuple[list[str], list[str]]:
    """The `limit` most frequent characters, and those of them that occur inside a word; both sorted."""
    characters: Counter[str] = Counter()
    chunks: set[str] = set()
    for document in documents:
        text = backend.normalizer.normalize_str(document)
        characters.update(text)
        chunks.update(text.split())
    ranked = sorted((-count, character) for character, count in characters.items() if not character.isspace())
    if not ranked:
        raise UserError("source: holds no text to learn a vocabulary from; give more text")
    initial = sorted(character for _, character in ranked[:limit])
    words = (word for chunk in chunks for word, _ in backend.pre_tokenizer.pre_tokenize_str(chunk))
    return initial, sorted({character for word in words for character in word[1:]}.intersection(initial))


def _assemble(tokens: Sequence[str], lowercase: bool, special_tokens: Sequence[str]) -> Vocabulary:
    """A BERT tokenizer of these tokens (id = position)."""
    backend = bert_backend({token: index for index, token in enumerate(tokens)}, lowercase)
    return Vocabulary(backend).with_special_tokens([*SPECIAL_TOKENS, *special_tokens])
