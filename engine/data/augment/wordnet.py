"""Synonyms from the files of WordNet, as Debian's wordnet-base installs them; see wndb(5WN) and cntlist(5WN).

Miller, "WordNet: a lexical database for English", CACM 38(11), 1995.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from engine.errors import UserError

FOLDER = Path("/usr/share/wordnet")
#: suffixes of the files, and what a sense's key has for each part of speech (5 are satellites, which are adjectives)
_PARTS = {"noun": "1", "verb": "2", "adj": "35", "adv": "4"}
#: where an adjective can stand, written behind it in data.adj
_SYNTAX = re.compile(r"\((?:a|p|ip)\)$")
#: share of a word's occurrences that its part of speech must have, for nothing here tags the words of a text
CLEAR = 0.75
REMEDY = "apt-get install wordnet-base, or take eda_neighbours, which needs no WordNet"


class WordNet:
    """Synonyms of English words: other words of the sense that a word has most often, as far as they are used in it.

    A word that is often of another part of speech, such as "force" or "cast", has none.

    EDA takes those of all senses, "hebdomad" for "week" and "political party" for "party" among them. What is used is
    told by cntlist.rev, the counts of a tagged corpus. A word must be in the index as it is written: of another form,
    such as a plural, the synonyms would be in the wrong one.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        """
        Raises:
            UserError: the files aren't there, or aren't WordNet's.
        """
        self.folder = folder
        try:
            self._data = {part: (folder / f"data.{part}").read_bytes() for part in _PARTS}
            index = {part: (folder / f"index.{part}").read_text(encoding="utf-8") for part in _PARTS}
            counts = (folder / "cntlist.rev").read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"wordnet: {error.filename} is not there ({error.strerror}); {REMEDY}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"wordnet: {folder} holds no text of WordNet's; {REMEDY}") from error
        # lines of the licence begin with a space
        self._index = {
            part: dict(line.split(" ", 1) for line in text.splitlines() if line and line[0] != " ")
            for part, text in index.items()
        }
        self._counts = _counts(counts)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that is read."""
        digest = hashlib.sha256(repr(sorted(self._counts.items())).encode())
        for part, data in self._data.items():
            digest.update(data)
            digest.update("".join(self._index[part].values()).encode())
        return digest.hexdigest()

    def __call__(self, lemmas: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The synonyms of words in small letters; perhaps none."""
        return {lemma: self._synonyms(lemma) for lemma in lemmas}

    def _synonyms(self, lemma: str) -> tuple[str, ...]:
        senses = [
            (self._counts.get((lemma, part, number), 0), part, offset)
            for part in _PARTS
            for number, offset in enumerate(self._offsets(lemma, part), 1)
        ]
        most, part, offset = max(senses, key=lambda sense: sense[0], default=(0, "", 0))
        own = sum(count for count, other, _ in senses if other == part)
        clear = most > 0 and own >= CLEAR * sum(count for count, *_ in senses)
        words = self._words(part, offset) if clear else []
        return tuple(word for word in words if word != lemma and self._is_used(word, part, offset))

    def _is_used(self, word: str, part: str, offset: int) -> bool:
        """Whether it is one word, no name, and was found in the corpus in the sense of a synonym set."""
        offsets = self._offsets(word, part)
        number = offsets.index(offset) + 1 if offset in offsets else 0
        return word.islower() and "_" not in word and self._counts.get((word, part, number), 0) > 0

    def _offsets(self, lemma: str, part: str) -> list[int]:
        """Of the synonym sets of a lemma, in the order of its sense numbers."""
        line = self._index[part].get(lemma)
        if line is None:
            return []
        _, sets, *_ = fields = line.split()
        return [int(offset) for offset in fields[-int(sets) :]]

    def _words(self, part: str, offset: int) -> list[str]:
        """The words of a synonym set."""
        data = self._data[part]
        fields = data[offset : data.index(b"\n", offset)].decode().split()
        count = int(fields[3], 16)
        return [_SYNTAX.sub("", word) for word in fields[4 : 4 + 2 * count : 2]]


def _counts(text: str) -> dict[tuple[str, str, int], int]:
    """How often each (lemma, part of speech, sense number) was tagged."""
    parts = {digit: part for part, digits in _PARTS.items() for digit in digits}
    found = {}
    for line in text.splitlines():
        key, number, count = line.split()
        lemma, _, sense = key.partition("%")
        found[lemma, parts[sense[0]], int(number)] = int(count)
    return found
