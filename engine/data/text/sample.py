"""The text that a vocabulary is learned from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from engine.data.text.corpus import CorpusConfig, Source, read_documents, stored_bytes
from engine.data.text.progress import LearningProgress
from engine.data.text.readers import Position
from engine.errors import UserError

MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Sample:
    """The first megabytes of a corpus; each iteration reads anew."""

    config: CorpusConfig
    sources: Sequence[Source]
    megabytes: int
    progress: LearningProgress

    def __iter__(self) -> Iterator[str]:
        limit, total = self.megabytes * MEGABYTE, stored_bytes(self.sources)
        seen, position = 0, Position()
        self.progress.begin_pass()
        for text in read_documents(self.config, self.sources, position):
            yield text
            seen += len(text)
            self.progress.update(max(seen / limit, position.bytes / total if total else 0.0))
            if seen >= limit:
                break
        if not seen:
            named = ", ".join(self.config.source)
            raise UserError(f"source: {named} holds no text; give a file or folder of text")
        self.progress.end_pass()
