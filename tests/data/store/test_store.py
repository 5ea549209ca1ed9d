"""The token store: what is written is read back as views, and damage is found when it is opened."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets.arrow_writer import ArrowWriter

from engine.data.store.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, StoreShard
from engine.data.store.store import Split, TokenDocuments, open_store, write_shard
from engine.data.tokenizer.wordpiece import SPECIAL_TOKENS, load_tokenizer
from engine.errors import UserError

SHARDS = [[[[5, 6, 7], [8]], [[9, 10]]], [[[11], [12, 13], [14]]]]
LENGTHS = [3, 1, 2, 1, 2, 1]


def flat(documents: list[list[list[int]]], dtype: type = np.uint16) -> TokenDocuments:
    sentences = [sentence for document in documents for sentence in document]
    lengths = np.array([len(sentence) for sentence in sentences], np.int32)
    return TokenDocuments(np.concatenate(sentences).astype(dtype), lengths, np.array([len(one) for one in documents]))


def make_store(folder: Path) -> Path:
    folder.mkdir()
    tokens = [*SPECIAL_TOKENS, *"abcdefghij"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    words = load_tokenizer(folder / "vocab.txt")
    (folder / "vocab.txt").unlink()
    words.save(folder / "tokenizer")
    train = [write_shard(folder / f"train-{i:05d}.arrow", flat(rows)) for i, rows in enumerate(SHARDS)]
    manifest = Manifest(
        FORMAT_VERSION, {"train": train, "validation": []}, [], {}, words.fingerprint, words.vocab_size, {}
    )
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "store")


def read_all(split: Split) -> list[list[int]]:
    starts = np.cumsum([0, *split.sentence_lengths])
    return [split.tokens(int(s), int(n)).tolist() for s, n in zip(starts, split.sentence_lengths, strict=False)]


def test_sentences_come_back_across_shards(store: Path) -> None:
    split = open_store(store, verify=True).split("train")
    assert split.sentence_lengths.tolist() == LENGTHS
    assert split.sentence_lengths.dtype == np.int32
    assert split.document_starts.tolist() == [0, 2, 3, 6]
    assert read_all(split) == [sentence for rows in SHARDS for document in rows for sentence in document]
    assert split.tokens(6, 4).tolist() == [11, 12, 13, 14]


def test_tokens_are_read_only_views_of_the_file(store: Path) -> None:
    split = open_store(store).split("train")
    view = split.tokens(0, 4)
    assert view.dtype == np.uint16
    assert not view.flags.writeable
    assert np.shares_memory(view, split.tokens(2, 2))


def test_a_slice_across_documents_of_two_shards_is_refused(store: Path) -> None:
    with pytest.raises(AssertionError, match="crosses a document"):
        open_store(store).split("train").tokens(4, 4)


def test_an_empty_split_has_no_sentences(store: Path) -> None:
    split = open_store(store).split("validation")
    assert split.sentence_lengths.shape == (0,)
    assert split.document_starts.tolist() == [0]


def test_large_vocabularies_are_stored_in_32_bits(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.arrow", flat([[[70_000, 1]]], np.uint32))
    assert shard == StoreShard("a.arrow", shard.sha256, shard.bytes, documents=1, sentences=1, tokens=2)
    row = datasets.Dataset.from_file(str(tmp_path / "a.arrow"))
    assert row[0] == {"tokens": [70_000, 1], "sentence_lengths": [2]}
    assert row.features["tokens"].feature.dtype == "uint32"


def test_equal_documents_make_equal_bytes(tmp_path: Path) -> None:
    first, second = (write_shard(tmp_path / name, flat(SHARDS[0])).sha256 for name in ("a.arrow", "b.arrow"))
    assert first == second


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_shard_has_the_bytes_that_datasets_would_write(tmp_path: Path, dtype: type) -> None:
    write_shard(tmp_path / "ours.arrow", flat(SHARDS[0], dtype))
    ours = datasets.Dataset.from_file(str(tmp_path / "ours.arrow"))
    numbers = {"tokens": np.dtype(dtype).name, "sentence_lengths": "int32"}
    features = datasets.Features({name: datasets.List(datasets.Value(number)) for name, number in numbers.items()})
    assert ours.features == features
    assert ours.to_list() == [
        {"tokens": [5, 6, 7, 8], "sentence_lengths": [3, 1]},
        {"tokens": [9, 10], "sentence_lengths": [2]},
    ]
    with ArrowWriter(features=features, path=str(tmp_path / "theirs.arrow")) as writer:
        writer.write_table(pa.table(ours.data.table))
        writer.finalize()
    assert (tmp_path / "ours.arrow").read_bytes() == (tmp_path / "theirs.arrow").read_bytes()


def test_segments_are_gathered_across_shards(store: Path) -> None:
    split = open_store(store).split("train")
    found = split.gather(np.array([6, 0, 8]), np.array([3, 4, 2]))
    assert found.tolist() == [11, 12, 13, 5, 6, 7, 8, 13, 14]
    assert found.dtype == np.uint16
    with pytest.raises(AssertionError, match="crosses a document"):
        split.gather(np.array([0, 4]), np.array([2, 4]))


def test_a_split_passes_to_spawned_processes(store: Path) -> None:
    split = open_store(store).split("train")
    assert len(pickle.dumps(split)) < 1000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_all, (split,)) == read_all(split)


def test_the_fingerprint_survives_a_copy_and_tells_content(store: Path, tmp_path: Path) -> None:
    manifest = open_store(store).manifest
    assert manifest.fingerprint == open_store(make_store(tmp_path / "again")).manifest.fingerprint
    assert json.loads((store / MANIFEST_NAME).read_text())["totals"]["train"] == {
        "documents": 3,
        "sentences": 6,
        "tokens": 10,
        "unknown": None,
    }


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(bytes(content))


def edit(store: Path, **changes: object) -> None:
    path = store / MANIFEST_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def swap_tokenizer(store: Path) -> None:
    for name, old, new in (("tokenizer.json", '"j"', '"z"'), ("vocab.txt", "\nj\n", "\nz\n")):
        path = store / "tokenizer" / name
        path.write_text(path.read_text().replace(old, new))


FIRST = "train-00000.arrow"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (lambda s: (s / FIRST).unlink(), rf"shard .*{FIRST} is missing"),
    "cut shard": (lambda s: (s / FIRST).write_bytes((s / FIRST).read_bytes()[:-8]), rf"shard .*{FIRST} has \d+ bytes"),
    "flipped schema": (lambda s: flip(s / FIRST, 4), rf"shard .*{FIRST} is corrupt"),
    "other shard": (lambda s: (s / FIRST).write_bytes(bytes((s / FIRST).stat().st_size)), f"{FIRST} is corrupt"),
    "no manifest": (lambda s: (s / MANIFEST_NAME).unlink(), "is no complete store"),
    "cut manifest": (lambda s: (s / MANIFEST_NAME).write_text("{"), r"manifest\.json is damaged"),
    "manifest without shards": (lambda s: edit(s, splits=None), r"manifest\.json is damaged"),
    "a part of its tokenizer": (
        lambda s: (s / "tokenizer" / "vocab.txt").write_text("[PAD]\n[MASK]\n"),
        r"id 1 is '\[MASK\]' in vocab\.txt and '\[UNK\]' in tokenizer\.json; remove the file that is out of date",
    ),
    "newer format": (lambda s: edit(s, format_version=99), "has store format 99, this zerobert reads"),
    "other tokenizer": (swap_tokenizer, "is not the tokenizer that made"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_a_user_error_with_a_remedy(store: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    damage(store)
    with pytest.raises(UserError, match=message) as caught:
        open_store(store)
    assert "; " in str(caught.value)


def test_a_sentence_length_that_does_not_add_up_is_found(store: Path) -> None:
    manifest = open_store(store).manifest
    wrong = write_shard(store / FIRST, flat([[[5, 6, 7], [8, 9]], [[10]]]))
    assert (wrong.tokens, wrong.bytes) == (manifest.splits["train"][0].tokens, manifest.splits["train"][0].bytes)
    content = (store / FIRST).read_bytes()
    at = content.index(np.array([3, 2, 1], np.int32).tobytes())
    (store / FIRST).write_bytes(content[:at] + np.array([3, 1, 2], np.int32).tobytes() + content[at + 12 :])
    with pytest.raises(UserError, match="counts don't match"):
        open_store(store)


def test_flipped_tokens_are_found_by_verify(store: Path) -> None:
    content = (store / FIRST).read_bytes()
    flip(store / FIRST, content.index(np.array([5, 6, 7, 8, 9, 10], np.uint16).tobytes()))
    open_store(store)
    with pytest.raises(UserError, match="sha256 changed"):
        open_store(store, verify=True)


def test_a_missing_store_and_split_are_user_errors(store: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist; make it with `zerobert prepare`"):
        open_store(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no split 'test'; it has train, validation"):
        open_store(store).split("test")
