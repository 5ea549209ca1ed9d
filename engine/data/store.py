"""The token store: memory-mapped Arrow shards, a manifest and the tokenizer they were made with.

A row is a document: `tokens`, the ids of all its sentences one after the other (uint16 where the vocabulary
allows), and `sentence_lengths`. Sentences, not sequences, are stored, so that one store serves every sequence
length and every epoch's own pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.data.manifest import Manifest, Shard, read_manifest
from engine.data.tokenizer import Vocabulary, load_tokenizer
from engine.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

TOKENIZER_FOLDER = "tokenizer"
SPLITS = ("train", "validation")

#: sentences of a document, each the ids of its tokens
Sentences = Sequence[Sequence[int] | NDArray[Any]]


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """The narrowest type that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def write_shard(path: Path, documents: Sequence[Sentences], vocab_size: int) -> Shard:
    """Write one Arrow shard; equal documents make equal bytes.

    Args:
        path: final name; the file is written aside first.
        documents: each with at least one sentence, each sentence with at least one id.
    """
    import pyarrow as pa
    from datasets import Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    dtype = token_dtype(vocab_size)
    lengths = [np.array([len(sentence) for sentence in document], dtype=np.int32) for document in documents]
    tokens = [np.concatenate(list(document)).astype(dtype, copy=False) for document in documents]
    table = pa.table({"tokens": _list_array(tokens, dtype), "sentence_lengths": _list_array(lengths, np.int32)})
    features = Features({"tokens": List(Value(np.dtype(dtype).name)), "sentence_lengths": List(Value("int32"))})
    aside = path.with_name(path.name + ".tmp")
    with ArrowWriter(features=features, path=str(aside)) as writer:
        writer.write_table(table, writer_batch_size=len(documents))
        writer.finalize()
    aside.replace(path)
    sizes = (len(documents), sum(map(len, lengths)), sum(map(len, tokens)))
    return Shard(path.name, hash_file(path), path.stat().st_size, *sizes)


def _list_array(rows: Sequence[NDArray[Any]], dtype: Any) -> pa.ListArray:
    import pyarrow as pa

    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    values = np.concatenate(rows) if rows else np.empty(0, dtype)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def hash_file(path: Path) -> str:
    """sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Split:
    """One split of a store, flat over all its documents.

    Pickles as (store, name) and opens its files anew, so it passes to loader processes of any start method.
    """

    sentence_lengths: NDArray[np.int32]
    """[sentences] tokens in each sentence"""
    document_starts: NDArray[np.int64]
    """[documents + 1] index of each document's first sentence"""

    def __init__(self, folder: Path, name: str, shards: Sequence[Shard]) -> None:
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
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        offset = start - int(self._starts[shard])
        view = self._tokens[shard][offset : offset + length]
        assert len(view) == length, "a slice crosses a document"
        return view

    def __reduce__(self) -> tuple[Callable[[Path, str], Split], tuple[Path, str]]:
        return _reopen, (self._folder, self.name)


def _reopen(folder: Path, name: str) -> Split:
    return Split(folder, name, read_manifest(folder).splits[name])


def _open_shard(path: Path, shard: Shard) -> tuple[NDArray[Any], NDArray[np.int32], NDArray[np.int64]]:
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
    found = (len(token_counts), len(lengths), len(tokens))
    if found != (shard.documents, shard.sentences, shard.tokens) or not _adds_up(
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
            if verify and hash_file(folder / shard.name) != shard.sha256:
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
