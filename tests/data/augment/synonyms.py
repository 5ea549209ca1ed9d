"""A small thesaurus, tagged sentences, and WordNet's files of a few words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from engine.data.augment.words import Words, of_tokens

THESAURUS = {"film": ("movie",), "good": ("fine", "upright"), "boat": ("ark",), "sees": ("beholds",)}


class Thesaurus:
    fingerprint = "thesaurus"

    def __call__(self, lemmas: Sequence[str]) -> Mapping[str, Sequence[str]]:
        return {lemma: THESAURUS[lemma] for lemma in lemmas if lemma in THESAURUS}


def tagged(text: str) -> Words:
    """A sentence of word/tag."""
    pairs = [token.rsplit("/", 1) for token in text.split()]
    return of_tokens([word for word, _ in pairs], [tag for _, tag in pairs])


def write_wordnet(folder: Path) -> Path:
    """Files as wndb(5WN) and cntlist(5WN) describe them, of "film" (two senses as a noun, one as a verb) and "big"."""
    folder.mkdir(parents=True)
    header = "  1 a licence\n"
    sets = {
        "noun": [("film", "movie", "motion_picture", "Film_X", "flick"), ("film", "foil")],
        "verb": [("film", "shoot")],
        "adj": [("big(a)", "large", "big-ish")],
        "adv": [],
    }
    index: dict[str, dict[str, list[int]]] = {}
    for part, groups in sets.items():
        data = header
        for words in groups:
            offset, listed = len(data), " ".join(f"{word} 0" for word in words)
            data += f"{offset:08d} 06 {part[0]} {len(words):02x} {listed} 000 | a gloss\n"
            for word in words:
                index.setdefault(part, {}).setdefault(word.lower().removesuffix("(a)"), []).append(offset)
        lines = [
            f"{lemma} {part[0]} {len(places)} 1 @ {len(places)} 1 {' '.join(f'{place:08d}' for place in places)}  \n"
            for lemma, places in sorted(index.get(part, {}).items())
        ]
        (folder / f"data.{part}").write_text(data)
        (folder / f"index.{part}").write_text(header + "".join(lines))
    counts = {
        "film%1:10:00::": (1, 9), "film%1:06:00::": (2, 3), "film%2:36:00::": (1, 4), "movie%1:10:00::": (1, 5),
        "foil%1:06:00::": (1, 2), "shoot%2:36:00::": (1, 2), "motion_picture%1:10:00::": (1, 2),
        "big%3:00:00::": (1, 7), "large%3:00:00::": (1, 6),
    }  # fmt: skip
    (folder / "cntlist.rev").write_text("".join(f"{key} {number} {count}\n" for key, (number, count) in counts.items()))
    return folder
