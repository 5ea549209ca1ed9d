"""A summary of a token classifier's data, in a few lines: entities, lengths, words that nothing is learned of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from engine.data.labelled.summary import NAMED_CLASSES
from engine.data.labelled.tagged.encoded import FRAME, TaggedSource
from engine.data.labelled.tagged.files import TaggedTexts
from engine.data.labelled.tagged.schemes import type_of


def describe(splits: Mapping[str, TaggedTexts], sources: Mapping[str, TaggedSource], max_length: int) -> list[str]:
    """Lines about the texts of each split, and about what is unusual in them.

    Args:
        max_length: `labelled.max_length`, the tokens of a window.
    """
    lines = [f"{split}: {_entities(texts)}; {_lengths(sources[split], max_length)}" for split, texts in splits.items()]
    for split, texts in splits.items():
        words = sum(map(len, texts.words))
        bare = words - int((sources[split].windows.words >= 0).sum())
        if bare:
            lines.append(f"note: {bare:,} of {words:,} words of {split} have no piece of their own to tell their tag")
        if texts.widened:
            lines.append(
                f"note: {texts.widened:,} spans of {texts.path} begin or end inside of a word and are widened to it"
            )
    return lines


def _entities(texts: TaggedTexts) -> str:
    counts = Counter(type_of(tag) for tags in texts.tags for tag in tags if tag.startswith("B-"))
    total = sum(counts.values())
    named = [f"{name} {count:,}" for name, count in counts.most_common(NAMED_CLASSES)]
    if len(counts) > NAMED_CLASSES:
        named.append(f"{len(counts) - NAMED_CLASSES:,} other types")
    written = "spans" if texts.raw else f"tags in {texts.scheme}"
    listed = f" ({', '.join(named)})" if named else ""
    return f"{len(texts):,} texts, {sum(map(len, texts.words)):,} words, {total:,} entities{listed}, {written}"


def _lengths(source: TaggedSource, max_length: int) -> str:
    lengths = source.windows.pieces + FRAME
    median, most = np.percentile(lengths, [50, 95], method="higher")
    long = int((lengths > max_length).sum())
    cut = f"{long:,} exceed labelled.max_length {max_length}: {source.count:,} windows" if long else "none is cut"
    return f"tokens: median {median:,}, 95 % up to {most:,}, longest {lengths.max():,}; {cut}"
