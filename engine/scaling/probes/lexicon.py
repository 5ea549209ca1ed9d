"""Common English words, by what sentences need of them. Nouns are (singular, plural), verbs (he ..., they ...)."""

from __future__ import annotations

Forms = tuple[tuple[str, str], ...]


def _nouns(regular: str, **irregular: str) -> Forms:
    return (*((word, f"{word}s") for word in regular.split()), *irregular.items())


def _verbs(regular: str, **irregular: str) -> Forms:
    return (*((f"{word}s", word) for word in regular.split()), *((s, base) for base, s in irregular.items()))


#: people of any sex
PEOPLE = _nouns(
    "farmer teacher doctor soldier student writer singer driver friend guest artist captain lawyer officer leader "
    "player worker owner sailor painter hunter stranger visitor reader",
    child="children",
)
MEN = _nouns("king father brother son uncle boy prince husband grandfather lord", man="men")
WOMEN = _nouns(
    "queen mother sister daughter aunt girl grandmother",
    woman="women",
    wife="wives",
    princess="princesses",
    actress="actresses",
)
THINGS = _nouns(
    "tree house river road garden bridge wall table window door boat car tower village school field gate shop lake "
    "hill chair picture letter horse dog bird ship train hotel station",
    church="churches",
    box="boxes",
)
#: without an object; none whose past is like its plural, as that of "read"
ACTIONS = _verbs(
    "sing work sleep smile laugh walk run write speak dance swim listen wait eat talk play sit travel learn",
    cry="cries",
    teach="teaches",
)
#: with one
RELATIONS = _verbs("like know see help hear follow love meet call visit trust remember fear admire", watch="watches")
ENDINGS = (
    "every day", "at night", "in the morning", "at home", "alone", "again", "here", "there", "all the time",
    "with a friend", "in the evening", "after dinner",
)  # fmt: skip
PLACES = ("near", "behind", "beside", "next to", "close to", "in front of")
#: what people do to themselves or to others, in the past
DEEDS = (
    "saw", "hurt", "helped", "washed", "described", "watched", "defended", "trusted", "praised", "taught", "asked",
    "dressed", "introduced", "loved", "hated", "saved", "killed", "blamed",
)  # fmt: skip
TIMES = ("yesterday", "again", "last night", "last year", "that day", "one morning", "at last", "in the end")
#: what people do with things, in the past, and as it follows "has ever"
HANDLED = (
    ("bought", "bought"), ("left", "left"), ("painted", "painted"), ("sold", "sold"), ("passed", "passed"),
    ("visited", "visited"), ("loved", "loved"), ("saw", "seen"), ("used", "used"), ("lost", "lost"), ("drew", "drawn"),
)  # fmt: skip
