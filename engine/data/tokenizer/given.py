"""The user's own tokenizer for a preparation: opened, checked against the other options, compared with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.data.tokenizer.check import check_texts, check_vocabulary, open_with_transformers
from engine.data.tokenizer.folder import load_tokenizer
from engine.data.tokenizer.vocabulary import Vocabulary
from engine.errors import UserError
from engine.hub import fetch, hub_model


class TokenizerOptions(Protocol):
    """The options of a preparation that are about its tokenizer; None where the user gives none."""

    tokenizer: str | None
    vocabulary: Any
    vocab_size: int | None
    lowercase: bool | None
    special_tokens: list[str]
    sample_mb: int | None


@dataclass(frozen=True)
class Given:
    """A tokenizer of the user's."""

    path: Path
    base: Vocabulary
    """as its files say"""
    vocabulary: Vocabulary
    """with the special tokens that the user adds"""
    lowercase: bool | None
    """the user's setting of casing; None where none is given"""

    def compare(self, texts: Sequence[str]) -> None:
        """Raise a `UserError` unless transformers, where it can open the folder, gives the texts the same ids."""
        if not self.path.is_dir():
            return
        options = {} if self.lowercase is None else {"do_lower_case": self.lowercase}
        theirs = open_with_transformers(self.path, **options)
        if theirs is not None:
            check_vocabulary(self.base, theirs, self.path)
            check_texts(self.base, theirs, self.path, texts)


def open_given(options: TokenizerOptions) -> Given | None:
    """The tokenizer that the options name; None where one is to be learned.

    Raises:
        UserError: a tokenizer that can't be used, or an option that contradicts it.
    """
    if options.tokenizer is None:
        return None
    named = hub_model(options.tokenizer, "tokenizer")
    path = Path(options.tokenizer) if named is None else fetch(named, "tokenizer", weights=False)
    base = load_tokenizer(path, options.lowercase is not False)
    vocabulary = base.with_special_tokens(options.special_tokens) if options.special_tokens else base
    if options.lowercase is not None and options.lowercase != base.lowercase:
        does = "lowercases" if base.lowercase else "keeps case"
        raise UserError(
            f"lowercase: {options.lowercase!r} is not allowed; the tokenizer {path} {does}: leave the option out, or "
            "give another tokenizer"
        )
    if options.vocab_size not in (None, vocabulary.vocab_size):
        raise UserError(
            f"vocab_size: {options.vocab_size} is not allowed; the tokenizer {path} has {vocabulary.vocab_size} "
            "tokens: leave the option out, or give another tokenizer"
        )
    for name in ("vocabulary", "sample_mb"):
        if (value := getattr(options, name)) is not None:
            raise UserError(
                f"{name}: {value!r} is not allowed beside tokenizer, where no vocabulary is learned; leave one "
                "of them out"
            )
    return Given(path, base, vocabulary, options.lowercase)
