"""Blocks of documents: cut from the stream, tokenized anywhere, written as shards.

What a block holds depends on the text and the options alone, never on who tokenizes it, so a store has the
same bytes for every number of workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.data.store.manifest import StoreShard
from engine.data.store.store import SPLITS, TokenDocuments, write_shard
from engine.data.store.wordcache import WordCache
from engine.data.store.workspace import Workspace, record_block
from engine.data.text.sentences import Lines, split_sentences
from engine.data.tokenizer.unknown import count_unknown
from engine.data.tokenizer.wordpiece import Vocabulary, load_tokenizer

MEGABYTE = 1_000_000
#: sentences encoded at a time: enough to amortise what a call costs, about a megabyte of text to bound memory
BATCH_SENTENCES = 8192
#: two of this many first documents are always held out, so that a small corpus has a validation split
FIRST_DOCUMENTS = 4
HELD_OUT_OF_FIRST = 2
#: blocks that wait for a worker, so that none waits for the reader
WAITING_BLOCKS = 2


class Document(NamedTuple):
    """A text as it was read."""

    text: str
    lines: Lines = "wrapped"


@dataclass(frozen=True)
class Block:
    """Consecutive documents with the same rule for line breaks, which become one shard per split."""

    index: int
    documents: list[bytes]
    """in UTF-8, the smallest to keep in a queue and the fastest to send"""
    splits: list[str]
    """split of each document"""
    lines: Lines = "wrapped"

    @property
    def text_sha256(self) -> str:
        """sha256 of the documents and their splits."""
        digest = hashlib.sha256()
        for split, content in zip(self.splits, self.documents, strict=True):
            digest.update(f"{split} {len(content)} ".encode() + content)
        return digest.hexdigest()

    def texts(self) -> Iterator[str]:
        """The documents one after the other."""
        return map(bytes.decode, self.documents)


@dataclass(frozen=True)
class Tokenization:
    """How a block is tokenized and where its shards go; small, because it is sent with every block."""

    folder: Path
    """the workspace's folder, the same on every node"""
    tokenizer: Path
    tokenizer_fingerprint: str
    language: str


def read_blocks(documents: Iterable[Document], megabytes: float, fraction: float, seed: int) -> Iterator[Block]:
    """Cut a stream of documents into blocks of at least `megabytes` of text.

    The last block, and the last before documents of another rule for line breaks, may be smaller.
    """
    contents: list[bytes] = []
    splits: list[str] = []
    index = size = 0
    rule: Lines = "wrapped"
    for ordinal, (text, lines) in enumerate(documents):
        if contents and (lines != rule or size >= megabytes * MEGABYTE):
            yield Block(index, contents, splits, rule)
            contents, splits, index, size = [], [], index + 1, 0
        rule = lines
        contents.append(text.encode())
        splits.append(split_of(ordinal, fraction, seed))
        size += len(text)
    if contents:
        yield Block(index, contents, splits, rule)


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
) -> dict[str, list[StoreShard]]:
    """Tokenize all blocks, with a few more in memory than there are workers.

    Blocks that an earlier run finished are not tokenized again.

    Returns:
        The shards of each split, in the order of the blocks.
    """
    shards: dict[int, dict[str, StoreShard]] = {}
    running: dict[Future[dict[str, StoreShard]], int] = {}
    try:
        for block in blocks:
            # hashing is left to the workers unless there is something to compare with
            if work.recorded(block.index) and (finished := work.finished(block.index, block.text_sha256)) is not None:
                shards[block.index] = finished
                continue
            running[executor.submit(tokenize_block, block, how)] = block.index
            if len(running) >= workers + WAITING_BLOCKS:
                _collect(running, shards)
        while running:
            _collect(running, shards)
    except BaseException:
        # the caller may remove the folder that they write to
        unstarted = [future for future in running if future.cancel()]
        wait(set(running).difference(unstarted))
        raise
    return {split: [shards[i][split] for i in sorted(shards) if split in shards[i]] for split in SPLITS}


def _collect(running: dict[Future[dict[str, StoreShard]], int], shards: dict[int, dict[str, StoreShard]]) -> None:
    """Wait for a block and move its result from `running` to `shards`."""
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        shards[running.pop(future)] = future.result()


def tokenize_block(block: Block, how: Tokenization) -> dict[str, StoreShard]:
    """Write a block's shards and their record; runs in any process. A split without documents has no shard."""
    cache = _open_cache(how.tokenizer, how.tokenizer_fingerprint)
    documents = _encode(block, how.language, cache)
    shards = {}
    for split in SPLITS:
        part = _select(documents, np.array([name == split for name in block.splits]))
        if len(part.sentence_counts):
            shard = write_shard(how.folder / f"{split}-{block.index:05d}.arrow", part)
            shards[split] = replace(shard, unknown=count_unknown(cache.vocabulary, part.tokens)[0])
    record_block(how.folder, block.index, block.text_sha256, shards)
    return shards


@lru_cache(maxsize=1)
def _open_cache(folder: Path, fingerprint: str) -> WordCache:
    vocabulary = load_tokenizer(folder)
    assert vocabulary.fingerprint == fingerprint, "the workspace's tokenizer changed while it was in use"
    return WordCache(vocabulary)


def _encode(block: Block, language: str, cache: WordCache) -> TokenDocuments:
    """Token ids of each document; sentences without a token are left out, which may empty a document."""
    counts: list[int] = []
    sentences = _sentences(block, language, counts, cache.vocabulary)
    batches = [cache.encode([])]
    while batch := list(islice(sentences, BATCH_SENTENCES)):
        batches.append(cache.encode(batch))
    ids, lengths = map(np.concatenate, zip(*batches, strict=True))
    kept = lengths > 0
    document = np.repeat(np.arange(len(counts)), counts)[kept]
    return TokenDocuments(ids, lengths[kept], np.bincount(document, minlength=len(counts)))


def _sentences(block: Block, language: str, counts: list[int], vocabulary: Vocabulary) -> Iterator[str]:
    """The sentences of all documents; how many each has is appended to `counts`."""
    for text in block.texts():
        sentences = split_sentences(text, language, block.lines)
        counts.append(len(sentences))
        yield from vocabulary.joined(sentences)


def _select(documents: TokenDocuments, chosen: NDArray[np.bool_]) -> TokenDocuments:
    """The chosen documents that have a sentence."""
    chosen = chosen & (documents.sentence_counts > 0)
    sentences = np.repeat(chosen, documents.sentence_counts)
    tokens = documents.tokens[np.repeat(sentences, documents.sentence_lengths)]
    return TokenDocuments(tokens, documents.sentence_lengths[sentences], documents.sentence_counts[chosen])
