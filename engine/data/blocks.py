"""Blocks of documents: cut from the stream, tokenized anywhere, written as shards.

What a block holds depends on the text and the options alone, never on who tokenizes it, so a store has the
same bytes for every number of workers.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from engine.data.manifest import Shard
from engine.data.sentences import split_sentences
from engine.data.store import SPLITS, Sentences, token_dtype, write_shard
from engine.data.tokenizer import Vocabulary, load_tokenizer
from engine.data.wordcache import WordCache
from engine.data.workspace import Workspace, record_block

log = logging.getLogger(__name__)

MEGABYTE = 1_000_000
#: sentences in a call of the tokenizer: enough to amortise the call, few enough to bound memory
BATCH_SENTENCES = 1024
#: two of this many first documents are always held out, so that a small corpus has a validation split
FIRST_DOCUMENTS = 4
HELD_OUT_OF_FIRST = 2
LOG_SECONDS = 30.0


@dataclass(frozen=True)
class Block:
    """Consecutive documents that become one shard a split."""

    index: int
    documents: list[str]
    splits: list[str]
    """split of each document"""

    @property
    def text_sha256(self) -> str:
        """sha256 of the documents and their splits."""
        digest = hashlib.sha256()
        for split, text in zip(self.splits, self.documents, strict=True):
            content = text.encode("utf-8", "surrogatepass")
            digest.update(f"{split} {len(content)} ".encode() + content)
        return digest.hexdigest()


@dataclass(frozen=True)
class Tokenization:
    """How a block is tokenized and where its shards go; small, for it travels with every block."""

    folder: Path
    """the workspace's folder, the same on every node"""
    tokenizer: Path
    tokenizer_fingerprint: str
    language: str


def read_blocks(documents: Iterable[str], megabytes: float, fraction: float, seed: int) -> Iterator[Block]:
    """Cut a stream of documents into blocks of at least `megabytes` of text (the last may be smaller)."""
    texts: list[str] = []
    splits: list[str] = []
    index = size = 0
    for ordinal, text in enumerate(documents):
        texts.append(text)
        splits.append(split_of(ordinal, fraction, seed))
        size += len(text)
        if size >= megabytes * MEGABYTE:
            yield Block(index, texts, splits)
            texts, splits, index, size = [], [], index + 1, 0
    if texts:
        yield Block(index, texts, splits)


def split_of(ordinal: int, fraction: float, seed: int) -> str:
    """The split of a document: held out if a hash of its ordinal falls below `fraction`.

    Two of the first four documents are always held out (unless `fraction` is 0): a stream doesn't tell how
    many will follow, and validation needs two for pairs from different documents.
    """
    if fraction == 0.0:
        return "train"
    if ordinal < FIRST_DOCUMENTS:
        ranked = sorted(range(FIRST_DOCUMENTS), key=lambda i: _uniform(i, seed))
        return "validation" if ordinal in ranked[:HELD_OUT_OF_FIRST] else "train"
    return "validation" if _uniform(ordinal, seed) < fraction else "train"


def _uniform(ordinal: int, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed}:{ordinal}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64


def run_blocks(
    blocks: Iterable[Block], work: Workspace, how: Tokenization, executor: Executor, workers: int
) -> dict[str, list[Shard]]:
    """Tokenize all blocks, at most two a worker in memory; the shards of each split in block order.

    Blocks that an earlier run finished are not tokenized again.
    """
    shards: dict[int, dict[str, Shard]] = {}
    running: dict[Future[dict[str, Shard]], int] = {}
    try:
        for block in blocks:
            digest = block.text_sha256
            if (finished := work.finished(block.index, digest)) is not None:
                shards[block.index] = finished
                continue
            running[executor.submit(tokenize_block, block, digest, how)] = block.index
            if len(running) >= 2 * workers:
                _collect(running, shards)
        while running:
            _collect(running, shards)
    except BaseException:
        # the caller may remove the folder that they write to
        unstarted = [future for future in running if future.cancel()]
        wait(set(running).difference(unstarted))
        raise
    return {split: [shards[i][split] for i in sorted(shards) if split in shards[i]] for split in SPLITS}


def _collect(running: dict[Future[dict[str, Shard]], int], shards: dict[int, dict[str, Shard]]) -> None:
    """Wait for a block and move its result from `running` to `shards`."""
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        shards[running.pop(future)] = future.result()


def tokenize_block(block: Block, text_sha256: str, how: Tokenization) -> dict[str, Shard]:
    """Write a block's shards and their record; runs in any process. A split without documents has no shard."""
    vocabulary, cache = _open_tokenizer(how.tokenizer, how.tokenizer_fingerprint)
    parts: dict[str, list[Sentences]] = {split: [] for split in SPLITS}
    encoded = _encode(block.documents, how.language, cache, vocabulary.vocab_size)
    for split, sentences in zip(block.splits, encoded, strict=True):
        if sentences:
            parts[split].append(sentences)
    shards = {
        split: write_shard(how.folder / f"{split}-{block.index:05d}.arrow", documents, vocabulary.vocab_size)
        for split, documents in parts.items()
        if documents
    }
    record_block(how.folder, block.index, text_sha256, shards)
    return shards


@lru_cache(maxsize=1)
def _open_tokenizer(folder: Path, fingerprint: str) -> tuple[Vocabulary, WordCache]:
    vocabulary = load_tokenizer(folder)
    assert vocabulary.fingerprint == fingerprint, "the workspace's tokenizer changed while it was in use"
    return vocabulary, WordCache(vocabulary)


def _encode(documents: list[str], language: str, cache: WordCache, vocab_size: int) -> list[Sentences]:
    """Ids of each sentence of each document; sentences without any id are left out."""
    sentences = [split_sentences(text, language) for text in documents]
    flat = [sentence for document in sentences for sentence in document]
    dtype = token_dtype(vocab_size)
    starts = range(0, len(flat), BATCH_SENTENCES)
    batches = (cache.encode_batch(flat[start : start + BATCH_SENTENCES]) for start in starts)
    ids = (np.array(row, dtype=dtype) for batch in batches for row in batch)
    return [[row for row in islice(ids, len(document)) if len(row)] for document in sentences]


class Progress:
    """A bar on a terminal, else a line in the log now and then.

    Args:
        total: bytes of all sources; 0 where unknown.
    """

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        self._total, self._logged = total, time.monotonic()
        self._bar = tqdm(total=total or None, unit="B", unit_scale=True, desc="tokenize", disable=not terminal)

    def update(self, done: int) -> None:
        """Show that `done` bytes were read."""
        self._bar.update(done - self._bar.n)
        if self._bar.disable and self._total and time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            log.info("read %.0f%% of %.0f MB", 100 * done / self._total, self._total / MEGABYTE)

    def close(self) -> None:
        self._bar.close()
