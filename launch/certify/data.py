"""The text of a certificate's runs, and the stream of samples as it must come out of it."""

from __future__ import annotations

import itertools
from pathlib import Path

from launch.certify.verdict import Sample

#: examples of runs with adapters, as few for the same reason
EXAMPLES = 300
#: characters of text: so few that a run goes through more than one epoch, and meets their ends within global batches
CHARACTERS = 45_000


def prepare_text(folder: Path, store: Path, seed: int) -> None:
    """Prepare the beginning of the embedded corpus."""
    from engine.data.store.prepare import PrepareConfig, prepare
    from engine.data.text.embedded import embedded_documents

    folder.mkdir(parents=True, exist_ok=True)
    taken = 0
    for number, document in enumerate(embedded_documents()):
        if taken >= CHARACTERS:
            break
        (folder / f"{number:03d}.txt").write_text(document)
        taken += len(document)
    prepare(
        PrepareConfig(
            source=[str(folder)], documents="file", output=str(store), vocab_size=1000, workers=0, seed=seed,
            validation_fraction=0.05,
        )
    )  # fmt: skip


def prepare_labelled(path: Path) -> None:
    """Write labelled paragraphs, evenly out of all of them."""
    from launch.demo.topics import labelled_paragraphs, write_jsonl

    pairs = labelled_paragraphs()
    write_jsonl(path, pairs[:: max(1, len(pairs) // EXAMPLES)][:EXAMPLES])


def stream(options: list[str], steps: int, batch: int) -> list[list[Sample]]:
    """What the model must see in each step of a run, each sample made by itself: no loader, no ranks, no batches.

    Args:
        batch: samples of a step.
    """
    import numpy as np

    from engine.train.audit import sample_hashes
    from launch.configure.options import parse
    from launch.train import build_task

    source = build_task(parse(options)).train_source()
    wanted: list[list[Sample]] = [[] for _ in range(steps)]
    places = ((epoch, index) for epoch in itertools.count() for index in range(source.epoch_size(epoch)))
    for number, (epoch, index) in enumerate(itertools.islice(places, steps * batch)):
        made = source.collate(source.describe(epoch, np.array([index])))
        digests = sample_hashes(made["input_ids"], made["lengths"])
        wanted[number // batch] += [Sample(digest, epoch, index) for digest in digests]
    return wanted
