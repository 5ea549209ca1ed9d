"""A summary of a fine-tuning run's data, in a few lines: classes, lengths, truncated examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from engine.data.labelled.encoded import EncodedSource, LabelledSource

#: classes that are listed, the largest first
NAMED_CLASSES = 10


def describe(names: Sequence[str], sources: Mapping[str, LabelledSource], max_length: int) -> list[str]:
    """Lines about the examples of each split, and about classes with hardly any.

    Args:
        names: names of the classes, in the order of their ids.
        sources: the source of each split by its name, "train" and others.
        max_length: `labelled.max_length`, the tokens that are kept of an example.
    """
    lines = [
        f"{split}: {_classes(names, source)}; {told_lengths(source, max_length)}" for split, source in sources.items()
    ]
    single = int((np.bincount(sources["train"].labels) == 1).sum())
    if single:
        lines.append(
            f"note: {single:,} of {len(names):,} classes {'has' if single == 1 else 'have'} one training example"
        )
    return lines + _unscored(names, sources)


def _classes(names: Sequence[str], source: LabelledSource) -> str:
    counts = np.bincount(source.labels, minlength=len(names))
    order = np.argsort(-counts, kind="stable")
    total = len(source.labels)
    named = [
        f"{names[index]} {counts[index]:,} ({_share(int(counts[index]), total)})" for index in order[:NAMED_CLASSES]
    ]
    if len(names) > NAMED_CLASSES:
        others = order[NAMED_CLASSES:]
        named.append(f"{len(others):,} others from {counts[others].max():,} down to {counts[others].min():,}")
    return f"{total:,} examples: {', '.join(named)}"


def told_lengths(source: EncodedSource, max_length: int) -> str:
    """How long the texts of a source are, and how many are truncated."""
    lengths = source.encoded.full_lengths
    median, most = np.percentile(lengths, [50, 95], method="higher")
    cut = int((lengths > max_length).sum())
    truncated = f"{cut:,} ({_share(cut, len(lengths))}) are" if cut else "none is"
    return (
        f"tokens: median {median:,}, 95 % up to {most:,}, longest {lengths.max():,}; "
        f"{truncated} truncated at labelled.max_length {max_length}"
    )


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %"


def _unscored(names: Sequence[str], sources: Mapping[str, LabelledSource]) -> list[str]:
    lines = []
    trained = set(sources["train"].labels.tolist())
    for split, source in sources.items():
        absent = [names[index] for index in sorted(trained.difference(source.labels.tolist()))]
        if absent and split != "train":
            some = ", ".join(absent[:NAMED_CLASSES]) + (", ..." if len(absent) > NAMED_CLASSES else "")
            lines.append(f"note: {split} has no example of {len(absent)} of {len(names)} classes: {some}")
    return lines
