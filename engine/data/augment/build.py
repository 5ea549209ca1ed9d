"""The methods that are cheap enough to be used while a model is trained, by name."""

from __future__ import annotations

from collections.abc import Sequence

from engine.data.augment.characters import Characters
from engine.data.augment.eda import Eda, Mentions
from engine.data.augment.method import Method

#: of a text's words that are changed while a model is trained
WORD_SHARE = 0.1


def cheap_method(
    name: str,
    share: float,
    model: str | None,
    operations: Sequence[str],
    mentions: Mentions | None = None,
) -> Method:
    """A method that `labelled.augment` takes.

    Args:
        share, operations, mentions: of `Eda`.
        model: the folder whose word embeddings `eda_neighbours` reads.

    Raises:
        UserError: no WordNet here, or no word embeddings there.
    """
    if name == "characters":
        return Characters(share)
    if name == "eda":
        from engine.data.augment.wordnet import WordNet

        return Eda(share, WordNet(), operations, mentions)
    from engine.data.augment.neighbours import Neighbours  # imports torch

    assert model is not None
    return Eda(share, Neighbours(model), operations, mentions)
