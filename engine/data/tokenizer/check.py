"""Compares our token ids with those of transformers' AutoTokenizer, on a sample of the user's own text.

transformers takes seconds to import, so only a folder that a user gave is compared, once, before it is used; that
transformers opens a vocabulary learned here with the same ids is covered by tests.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engine.data.tokenizer.vocabulary import Vocabulary
from engine.errors import UserError, first_line

log = logging.getLogger(__name__)

#: size of the sample: so many texts, or so many characters of them
SAMPLE_TEXTS = 300
SAMPLE_CHARACTERS = 200_000
#: what a message shows of a text and of its tokens
SHOWN_CHARACTERS = 60
SHOWN_TOKENS = 12


def sample(texts: Iterable[str]) -> list[str]:
    """The first texts of a stream, as many as are compared."""
    chosen: list[str] = []
    seen = 0
    for text in texts:
        if len(chosen) == SAMPLE_TEXTS or seen >= SAMPLE_CHARACTERS:
            break
        chosen.append(text[: SAMPLE_CHARACTERS - seen])
        seen += len(text)
    return chosen


def open_with_transformers(folder: Path, **options: Any) -> Any | None:
    """The folder as AutoTokenizer opens it, offline and without code of its own; None where it can't."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # whatever its classes raise
        log.warning("%s: transformers can't open this tokenizer (%.100s): ids not compared", folder, first_line(error))
        return None


def check_vocabulary(vocabulary: Vocabulary, theirs: Any, folder: Path) -> None:
    """Raise a `UserError` unless transformers has the same tokens under the same ids, and the same special ones."""
    ours = {token: index for index, token in enumerate(vocabulary.tokens) if token}
    vocab: dict[str, int] = theirs.get_vocab()
    for token in sorted({*ours, *vocab}, key=lambda token: (ours.get(token, len(ours)), token)):
        if ours.get(token) != vocab.get(token):
            raise _difference(folder, f"token {token!r}", vocab.get(token), ours.get(token))
    for role, token in vocabulary.names.items():
        name = getattr(theirs, role, None)
        if name not in (None, token):
            raise _difference(folder, role, name, token)


def check_texts(vocabulary: Vocabulary, theirs: Any, folder: Path, texts: Sequence[str]) -> None:
    """Raise a `UserError` unless transformers splits the texts into the same word pieces.

    A special token that a text quotes is plain text here (`unquote`), so both get it in that form.
    """
    plain = vocabulary.unquote(texts)
    rows = theirs(plain, add_special_tokens=False, truncation=False, padding=False)["input_ids"] if plain else []
    compare_rows(vocabulary, theirs, folder, plain, vocabulary.encode_batch(texts), rows)


def check_examples(
    vocabulary: Vocabulary,
    theirs: Any,
    folder: Path,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    rows: Sequence[Sequence[int]],
    max_length: int,
) -> None:
    """Raise a `UserError` unless transformers gives labelled examples the ids `rows`, special tokens included."""
    options = {"truncation": "longest_first", "max_length": max_length, "padding": False}
    expected = theirs(list(texts), None if pairs is None else list(pairs), **options)["input_ids"] if texts else []
    shown = texts if pairs is None else [f"{first} | {second}" for first, second in zip(texts, pairs, strict=True)]
    compare_rows(vocabulary, theirs, folder, shown, rows, expected)


def compare_rows(
    vocabulary: Vocabulary,
    theirs: Any,
    folder: Path,
    texts: Sequence[str],
    ours: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
) -> None:
    """Raise a `UserError` for the first text that has other ids, with the word pieces of both."""
    for text, own, other in zip(texts, ours, expected, strict=True):
        if list(own) == list(other):
            continue
        place = next((i for i, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), min(len(own), len(other)))
        start = max(0, place - SHOWN_TOKENS // 2)
        shown = slice(start, start + SHOWN_TOKENS)
        their_tokens = " ".join(theirs.convert_ids_to_tokens(list(other)[shown]))
        our_tokens = " ".join(vocabulary.tokens[index] for index in list(own)[shown])
        raise _difference(folder, f"the text {snippet(text, start)!r}", their_tokens, our_tokens)


def snippet(text: str, start: int) -> str:
    """Some words of a text from about its token `start` on, short enough for a message."""
    words = text.split()
    return " ".join(words[min(start, max(0, len(words) - 4)) :])[:SHOWN_CHARACTERS]


def _difference(folder: Path, what: str, theirs: object, ours: object) -> UserError:
    return UserError(
        f"tokenizer: {folder}: {what} is {theirs!r} for transformers' AutoTokenizer and {ours!r} here, so a model of "
        "ours would be wrong there; give a plain BERT tokenizer, such as the folder that AutoTokenizer's "
        "save_pretrained writes of it"
    )
