"""The text of a certificate's runs, and the stream of samples as it must come out of it."""

from __future__ import annotations

from pathlib import Path

from launch.certify.verdict import Sample

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


def stream(options: list[str], count: int) -> list[Sample]:
    """The first samples of a run in order, each made by itself: no loader, no ranks, no batches."""
    import numpy as np

    from engine.train.audit import sample_hashes
    from launch.configure.options import parse
    from launch.train import build_task

    source = build_task(parse(options)).train_source()
    samples: list[Sample] = []
    epoch = 0
    while len(samples) < count:
        for index in range(min(source.epoch_size(epoch), count - len(samples))):
            made = source.collate(source.describe(epoch, np.array([index])))
            (digest,) = sample_hashes(made["input_ids"], made["lengths"])
            samples.append(Sample(digest, epoch, index))
        epoch += 1
    return samples
