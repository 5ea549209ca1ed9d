"""Schemes of tags: recognised, checked, and converted to BIO (IOB2), in which B- begins every entity."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

from engine.errors import UserError

OUTSIDE = "O"
#: the type of entities whose tags are B and I alone
UNNAMED = "ENTITY"
#: by scheme, what its letters mean: B begins an entity of several words, I is inside, E ends it, S is one of one word
SCHEMES = {
    "BIO": {"B": "B", "I": "I"},
    "BIOES": {"B": "B", "I": "I", "E": "E", "S": "S"},
    "BILOU": {"B": "B", "I": "I", "L": "E", "U": "S"},
    "BMES": {"B": "B", "M": "I", "E": "E", "S": "S"},
}
_TAG = re.compile(r"([BIESLUM])(?:-([^\x00-\x1f\x7f]*[^\x00-\x20\x7f]))?")

#: a tag's letter and the type of its entity; both are empty of O
Tag = tuple[str, str]
#: where a word of a text stands in its file, for a message
Where = Callable[[int, int], str]


def is_tag(tag: str) -> bool:
    """Whether a tag is one of some scheme."""
    return tag == OUTSIDE or _TAG.fullmatch(tag) is not None


def type_of(tag: str) -> str:
    """The type of a BIO tag's entity; empty of O."""
    return "" if tag == OUTSIDE else tag[2:]


def to_bio(texts: Sequence[Sequence[str]], where: Where) -> tuple[str, list[list[str]]]:
    """The scheme of the tags of all texts of a file, and the tags in BIO.

    A file in which I- begins entities, and B- only those that follow another of their type, is IOB1 (Ramshaw and Marcus
    1995). Bare letters stand for entities of one type, `UNNAMED`.

    >>> to_bio([["I-PER", "O", "I-LOC", "B-LOC"]], lambda text, word: "")
    ('IOB1', [['B-PER', 'O', 'B-LOC', 'B-LOC']])
    >>> to_bio([["B-PER", "E-PER", "O", "S-LOC"]], lambda text, word: "")
    ('BIOES', [['B-PER', 'I-PER', 'O', 'B-LOC']])

    Raises:
        UserError: a tag of no scheme, tags of several schemes, an entity without its beginning or its end.
    """
    known: dict[str, Tag] = {}
    for index, tags in enumerate(texts):
        for word, tag in enumerate(tags):
            if tag not in known:
                known[tag] = _parsed(tag, where(index, word))
    parsed = [[known[tag] for tag in tags] for tags in texts]
    name = _scheme(parsed, where)
    if name == "BIO":
        return _with_beginnings(parsed, where)
    roles = SCHEMES[name]
    return name, [_joined(tags, roles, index, where) for index, tags in enumerate(parsed)]


def _parsed(tag: str, place: str) -> Tag:
    if tag == OUTSIDE:
        return "", ""
    found = _TAG.fullmatch(tag)
    if found is None:
        raise UserError(f"{place}: {tag!r:.60} is no tag; write O, or B- and I- (BIO, IOB1, BIOES) before a type")
    return found[1], found[2] or UNNAMED


def _scheme(texts: Sequence[Sequence[Tag]], where: Where) -> str:
    """The first scheme that has all letters."""
    seen: set[str] = set()
    fitting = list(SCHEMES)
    for index, tags in enumerate(texts):
        for word, (letter, kind) in enumerate(tags):
            if not letter or letter in seen:
                continue
            fitting = [name for name in fitting if letter in SCHEMES[name]]
            if not fitting:
                others = " and ".join(sorted(seen))
                raise UserError(
                    f"{where(index, word)}: tag {letter}-{kind} is of another scheme than tags with {others} before "
                    "it; write all tags of the file in one scheme: BIO, IOB1 or BIOES"
                )
            seen.add(letter)
    return fitting[0]


def _with_beginnings(texts: Sequence[Sequence[Tag]], where: Where) -> tuple[str, list[list[str]]]:
    """Tags of BIO or IOB1 in BIO."""
    #: the first I- that begins an entity, and the first B- that IOB1 would write as I-
    bare: tuple[int, int] | None = None
    needless: tuple[int, int] | None = None
    converted = []
    for index, tags in enumerate(texts):
        row = []
        for word, ((_, before), (letter, kind)) in enumerate(pairwise([("", ""), *tags])):
            begins = kind != "" and kind != before
            if letter == "I" and begins:
                bare = bare or (index, word)
            if letter == "B" and begins:
                needless = needless or (index, word)
            row.append(_tag("B" if begins else letter, kind))
        converted.append(row)
    if bare and needless:
        letter, kind = texts[bare[0]][bare[1]]
        raise UserError(
            f"{where(*bare)}: {letter}-{kind} begins an entity, as in IOB1, while B- does in {where(*needless)}, as in "
            f"BIO; write B-{kind} here, or all tags of the file in one scheme"
        )
    return "IOB1" if bare else "BIO", converted


def _joined(tags: Sequence[Tag], roles: dict[str, str], index: int, where: Where) -> list[str]:
    """Tags of a scheme with ends in BIO."""
    row = []
    opened = ""
    for word, (letter, kind) in enumerate([*tags, ("", "")]):
        role = roles.get(letter, "")
        goes_on = role in ("I", "E")
        if opened and not (goes_on and kind == opened):
            raise UserError(f"{where(index, word - 1)}: the {opened} that ends here has no tag of an end; correct it")
        if goes_on and not opened:
            raise UserError(f"{where(index, word)}: {letter}-{kind} goes on with no entity; begin it with a B-{kind}")
        opened = kind if role in ("B", "I") else ""
        row.append(_tag("I" if goes_on else "B", kind))
    return row[:-1]


def _tag(letter: str, kind: str) -> str:
    return f"{letter}-{kind}" if kind else OUTSIDE
