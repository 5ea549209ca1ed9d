"""Words of English that an operation leaves alone."""

from __future__ import annotations

_FUNCTION = """
a about above after again against all almost alone along already also although always am among an and another any
anybody anyone anything are around as at away back be became because become been before behind being below between
both but by can cannot could de despite did do does doing done down dr during each eight either el else enough even
ever every everybody everyone everything few first five for four from further get gets got had has have having he
hence her here hers herself him himself his how however i if in indeed instead into is it its itself just la le least
less lest let lets like likely many may maybe me might mine more most mr mrs ms much must my myself neither never nine
no nobody none nor not nothing now nowhere of off often on once one only or other others otherwise ought our ours
ourselves out over own per perhaps please pm quite rather really same second seven shall she should since six so some
somebody someone something somewhere still such ten than that the their theirs them themselves then there therefore
these they third this those though three through throughout thus till to together too toward towards two under unless
until up upon us very was we well were what whatever when whenever where whereas wherever whether which while who
whoever whole whom whose why will with within without would yes yet you your yours yourself yourselves
"""
_NEGATION = """
barely but cannot few hardly lack lacking lacks least less little n't neither never no nobody none nor not nothing
nowhere scarcely too without
"""
#: words of grammar: their synonyms in WordNet are of other meanings
FUNCTION_WORDS = frozenset(_FUNCTION.split())
#: words without which a sentence says the opposite
NEGATIONS = frozenset(_NEGATION.split())
#: shorter words are abbreviations, or parts of others
SHORTEST = 3


def is_negation(word: str) -> bool:
    """Whether a sentence may say the opposite without this word, in small letters."""
    return word in NEGATIONS or word.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").endswith("n't")


def has_synonyms(word: str) -> bool:
    """Whether another word may stand in the place of this one, in small letters."""
    return len(word) >= SHORTEST and word not in FUNCTION_WORDS and not is_negation(word)
