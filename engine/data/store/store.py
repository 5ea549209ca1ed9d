"""The token store: memory-mapped Arrow shards, a manifest and the tokenizer they were made with.

A row is a document: `tokens`, the ids of all its sentences one after the other (uint16 where the vocabulary
allows), and `sentence_lengths`. Sentences, not sequences, are stored, so that one store serves every sequence
length and every epoch's own pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.data.store.manifest import Manifest, StoreShard, read_manifest
from engine.data.tokenizer.wordpiece import Vocabulary, load_tokenizer
from engine.durable import sha256_of, written_aside
from engine.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

TOKENIZER_FOLDER = "tokenizer"
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class TokenDocuments:
    """Token ids of D documents of S sentences, T ids in all; none is empty."""

    tokens: NDArray[Any]
    """[T] ids of all sentences one after the other: uint16, or uint32 where the vocabulary needs it"""
    sentence_lengths: NDArray[np.int32]
    """[S] ids of each sentence"""
    sentence_counts: NDArray[np.int64]
    """[D] sentences of each document"""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """[D] ids of each document."""
        return np.add.reduceat(self.sentence_lengths, np.cumsum(self.sentence_counts) - self.sentence_counts)


def write_shard(path: Path, documents: TokenDocuments) -> StoreShard:
    """Write one Arrow shard; equal documents make equal bytes.

    The file is what `datasets` itself would write; its import takes a second, and it would copy the documents.

    Args:
        path: final name; the file is written aside first.
        documents: at least one.
    """
    import pyarrow as pa

    tokens = _list_array(documents.tokens, documents.lengths)
    table = pa.table(
        {"tokens": tokens, "sentence_lengths": _list_array(documents.sentence_lengths, documents.sentence_counts)}
    )
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": _features(table.schema)}})})
    with written_aside(path) as aside, pa.ipc.new_stream(str(aside), table.schema) as writer:
        writer.write_table(table)
    sizes = (len(documents.sentence_counts), len(documents.sentence_lengths), len(documents.tokens))
    return StoreShard(path.name, sha256_of(path), path.stat().st_size, *sizes)


def _list_array(values: NDArray[Any], lengths: NDArray[np.integer]) -> pa.ListArray:
    import pyarrow as pa

    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return pa.ListArray.from_arrays(_array(offsets), _array(values))


def _array(values: NDArray[Any]) -> pa.Array:
    """The values as an Arrow array over the same memory, without the pandas that `pa.array` imports."""
    import pyarrow as pa

    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(getattr(pa, values.dtype.name)(), len(values), [None, buffer])


def _features(schema: pa.Schema) -> dict[str, Any]:
    """The features of a data set of lists of numbers, as `datasets` notes them."""
    return {
        column.name: {"feature": {"dtype": str(column.type.value_type), "_type": "Value"}, "_type": "List"}
        for column in schema
    }


class Split:
    """One split of a store, flat over all its documents.

    Pickles as (store, name) and opens its files anew, so it passes to loader processes of any start method.
    """

    sentence_lengths: NDArray[np.int32]
    """[sentences] tokens in each sentence"""
    document_starts: NDArray[np.int64]
    """[documents + 1] index of each document's first sentence"""

    def __init__(self, folder: Path, name: str, shards: Sequence[StoreShard]) -> None:
        self._folder, self.name = folder, name
        parts = [_open_shard(folder / shard.name, shard) for shard in shards]
        self._tokens = [tokens for tokens, _, _ in parts]
        self._starts = np.cumsum([0, *map(len, self._tokens)], dtype=np.int64)
        self.sentence_lengths = np.concatenate([np.empty(0, np.int32), *(lengths for _, lengths, _ in parts)])
        counts = np.concatenate([np.zeros(1, np.int64), *(sentences for _, _, sentences in parts)])
        self.document_starts = np.cumsum(counts, dtype=np.int64)

    def tokens(self, start: int, length: int) -> NDArray[Any]:
        """A read-only view of `length` ids from token `start` of the split (an exclusive sum of
        `sentence_lengths`); it must not cross a document."""
        (view,) = self._views(np.array([start]), np.array([length]))
        assert len(view) == length, "a slice crosses a document"
        return view

    def gather(self, starts: NDArray[np.integer], lengths: NDArray[np.integer]) -> NDArray[Any]:
        """Token ids of N >= 1 segments one after the other; `starts` and `lengths` [N] as for `tokens`."""
        tokens: NDArray[Any] = np.concatenate(self._views(starts, lengths))
        assert len(tokens) == lengths.sum(), "a slice crosses a document"
        return tokens

    def _views(self, starts: NDArray[np.integer], lengths: NDArray[np.integer]) -> list[NDArray[Any]]:
        shards = np.searchsorted(self._starts, starts, side="right") - 1
        first = starts - self._starts[shards]
        places = zip(shards.tolist(), first.tolist(), (first + lengths).tolist(), strict=True)
        return [self._tokens[shard][start:stop] for shard, start, stop in places]

    def __reduce__(self) -> tuple[Callable[[Path, str], Split], tuple[Path, str]]:
        return _reopen, (self._folder, self.name)


def _reopen(folder: Path, name: str) -> Split:
    return Split(folder, name, read_manifest(folder).splits[name])


def _open_shard(path: Path, shard: StoreShard) -> tuple[NDArray[Any], NDArray[np.int32], NDArray[np.int64]]:
    """Mapped token ids, sentence lengths, and sentences of each document."""
    remedy = "restore the file or prepare the store again with --overwrite"
    if not path.is_file():
        raise UserError(f"data: shard {path} is missing; {remedy}")
    if path.stat().st_size != shard.bytes:
        raise UserError(f"data: shard {path} has {path.stat().st_size} bytes instead of {shard.bytes}; {remedy}")
    try:
        tokens, token_counts = _flat(path, "tokens")
        lengths, sentence_counts = _flat(path, "sentence_lengths")
    except Exception as error:  # pyarrow reports damage as any of a dozen types
        raise UserError(f"data: shard {path} is corrupt ({error}); {remedy}") from error
    counts = (len(token_counts), len(lengths), len(tokens))
    if counts != (shard.documents, shard.sentences, shard.tokens) or not _adds_up(
        token_counts, lengths, sentence_counts
    ):
        raise UserError(f"data: shard {path} is corrupt (its counts don't match the manifest); {remedy}")
    return tokens, lengths, sentence_counts


def _flat(path: Path, column: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """All values of a list column as one mapped array, and the length of each row."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        chunks = reader.read_all().column(column).chunks
    assert len(chunks) == 1, "a shard is written as one record batch"
    lists = chunks[0]
    offsets = np.from_dlpack(lists.offsets)  # pyarrow's own to_numpy imports pandas
    return np.from_dlpack(lists.values)[offsets[0] : offsets[-1]], np.diff(offsets).astype(np.int64)


def _adds_up(tokens: NDArray[np.int64], lengths: NDArray[np.int32], sentences: NDArray[np.int64]) -> bool:
    """True if every document's tokens are the sum of its sentences' and no sentence is empty."""
    if sentences.sum() != len(lengths) or (sentences < 1).any() or (lengths < 1).any():
        return False
    ends = np.cumsum(sentences)
    totals = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return bool((totals[ends] - totals[ends - sentences] == tokens).all())


@dataclass(frozen=True)
class TokenStore:
    """A prepared corpus, open for reading."""

    path: Path
    manifest: Manifest

    @cached_property
    def tokenizer(self) -> Vocabulary:
        """The tokenizer that made the ids."""
        return load_tokenizer(self.tokenizer_path)

    @property
    def tokenizer_path(self) -> Path:
        """Its Hugging Face folder."""
        return self.path / TOKENIZER_FOLDER

    def split(self, name: str) -> Split:
        """Open split "train" or "validation".

        Raises:
            UserError: no such split, or a missing or corrupt shard.
        """
        if name not in self.manifest.splits:
            raise UserError(f"data: {self.path} has no split {name!r}; it has {', '.join(self.manifest.splits)}")
        return Split(self.path, name, self.manifest.splits[name])


def open_store(path: str | Path, verify: bool = False) -> TokenStore:
    """Open a store and check it: manifest, existence, size and counts of each shard, tokenizer.

    Args:
        verify: also hash every shard (reads the whole store).

    Raises:
        UserError: names what is missing, damaged or too new, and the remedy.
    """
    folder = Path(path).absolute()
    store = TokenStore(folder, read_manifest(folder))
    for shards in store.manifest.splits.values():
        for shard in shards:
            _open_shard(folder / shard.name, shard)
            if verify and sha256_of(folder / shard.name) != shard.sha256:
                raise UserError(
                    f"data: shard {folder / shard.name} is corrupt (its sha256 changed); "
                    "restore the file or prepare the store again with --overwrite"
                )
    if store.tokenizer.fingerprint != store.manifest.tokenizer_fingerprint:
        raise UserError(
            f"data: {store.tokenizer_path} is not the tokenizer that made {folder}; "
            "restore it or prepare the store again with --overwrite"
        )
    return store
