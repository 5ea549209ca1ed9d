"""Texts with tagged words as users have them, sound and not."""

from __future__ import annotations

import doctest
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from engine.config import LabelledConfig
from engine.data.labelled.tagged import spans
from engine.data.labelled.tagged.files import (
    TaggedTexts,
    read_tagged,
    split_validation,
    tag_ids,
    tag_names,
)
from engine.errors import UserError
from tests.conftest import ROOT

DATA = ROOT.parent / "shared" / "data"
SENTENCE = "EU NNP B-ORG\nrejects VBZ O\nGerman JJ B-MISC\ncall NN O\n"
OTHER = "Peter NNP B-PER\nBlackburn NNP I-PER\n"


def read(path: Path, content: str | bytes, text: str = "sentence", label: str = "label") -> TaggedTexts:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_tagged(str(path), text, label)


def lines(*records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def words(texts: TaggedTexts) -> list[list[str]]:
    return [[texts.word(index, word) for word in range(len(own))] for index, own in enumerate(texts.words)]


def told(texts: TaggedTexts) -> list[list[tuple[str, str]]]:
    return [list(zip(own, tags, strict=True)) for own, tags in zip(words(texts), texts.tags, strict=True)]


EXPECTED = [
    [("EU", "B-ORG"), ("rejects", "O"), ("German", "B-MISC"), ("call", "O")],
    [("Peter", "B-PER"), ("Blackburn", "I-PER")],
]
LISTS = [{"tokens": [word for word, _ in row], "tags": [tag for _, tag in row]} for row in EXPECTED]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.conll", f"{SENTENCE}\n{OTHER}"),
        ("eng.train", f"-DOCSTART- -X- O\n\n{SENTENCE}\n\n\n{OTHER}\n-DOCSTART- -X- O\n\n"),
        ("documents.txt", f"{SENTENCE}-DOCSTART-\n{OTHER}"),
        ("crlf.conll", f"{SENTENCE}\n{OTHER}".replace("\n", "\r\n")),
        ("mac.conll", f"{SENTENCE}\n{OTHER}".replace("\n", "\r")),
        ("bom.conll", f"\ufeff{SENTENCE}\n{OTHER}"),
        ("tabs.tsv", f"{SENTENCE}\n{OTHER}".replace(" ", "\t")),
        ("wide.conll", f"{SENTENCE}   \n{OTHER}".replace(" ", "  \t ").replace("\t", " ")),
        ("comments.conll", f"# newdoc id = 1\n# text = EU rejects\n{SENTENCE}\n#\n{OTHER}"),
        ("no_end.conll", f"{SENTENCE}\n{OTHER}".rstrip()),
    ],
)
def test_columns_are_read(tmp_path: Path, name: str, content: str) -> None:
    assert told(read(tmp_path / name, content)) == EXPECTED


def test_other_schemes_compression_and_columns(tmp_path: Path) -> None:
    iob1 = "I-ORG 1 EU\nO 2 rejects\nI-MISC 3 German\nO 4 call\n\nI-PER 1 Peter\nI-PER 2 Blackburn\n"
    found = read(tmp_path / "iob1.conll.gz", gzip.compress(iob1.encode()), text="-1", label="1")
    assert (told(found), found.scheme) == (EXPECTED, "IOB1")
    assert told(read(tmp_path / "three", iob1, text="3", label="1")) == EXPECTED
    bioes = "EU S-ORG\nrejects O\nGerman S-MISC\ncall O\n\nPeter B-PER\nBlackburn E-PER\n"
    assert read(tmp_path / "x.bioes", bioes).scheme == "BIOES"


def test_a_token_may_be_a_hash_or_odd_white_space(tmp_path: Path) -> None:
    found = read(tmp_path / "tweets.conll", "# a comment\n#\tO\n#tag\tB-X\n\u00a0\tO\nNew York\tB-LOC\n# B-12\n")
    assert words(found) == [["#", "#tag", "\u00a0", "New York"]]


def test_places_are_lines_of_tokens(tmp_path: Path) -> None:
    found = read(tmp_path / "a.conll", f"# x\n{SENTENCE}\n{OTHER}")
    assert found.place(0, 1).endswith("a.conll, line 3")
    assert found.place(1, 1).endswith("a.conll, line 8")


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json", "jsonl.gz"])
def test_lists_are_read(tmp_path: Path, suffix: str) -> None:
    content = lines(*LISTS).encode()
    found = read(tmp_path / f"a.{suffix}", gzip.compress(content) if suffix.endswith("gz") else content)
    assert (told(found), found.raw) == (EXPECTED, False)
    assert found.texts == ["EU rejects German call", "Peter Blackburn"]


def test_columns_of_lists_may_have_other_names(tmp_path: Path) -> None:
    for text, label in (("words", "ner_tags"), ("sentence", "label"), ("tokens", "labels")):
        renamed = [{text: row["tokens"], label: row["tags"]} for row in LISTS]
        assert told(read(tmp_path / "a.jsonl", lines(*renamed))) == EXPECTED
    renamed = [{"tokens": ["x"], "tags": ["O"], "w": row["tokens"], "t": row["tags"]} for row in LISTS]
    assert told(read(tmp_path / "a.jsonl", lines(*renamed), "w", "t")) == EXPECTED


def test_parquet_and_datasets_name_tags_that_are_numbers(tmp_path: Path) -> None:
    names = ["O", "B-ORG", "B-MISC", "B-PER", "I-PER"]
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=names)),
        }
    )
    rows = {
        "tokens": [row["tokens"] for row in LISTS],
        "ner_tags": [[names.index(tag) for tag in row["tags"]] for row in LISTS],
    }
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        assert told(read_tagged(str(path), "sentence", "label")) == EXPECTED
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "bare.parquet")
    with pytest.raises(
        UserError, match=r"bare\.parquet, row 1: tag 1 in column 'ner_tags' is no name; write the tags'"
    ):
        read_tagged(str(tmp_path / "bare.parquet"), "sentence", "label")


def test_spans_tag_the_words_of_a_raw_text(tmp_path: Path) -> None:
    text = "Ms Smith-Jones flew to New York."
    record = {"text": text, "spans": [[23, 31, "LOC"], {"start": 3, "end": 14, "label": "PER", "id": 7}], "id": 1}
    found = read(tmp_path / "a.jsonl", lines(record, {"text": "東京 \ud800 x", "spans": [[0, 2, "LOC"]]}))
    assert (found.raw, found.widened) == (True, 0)
    person = [("Smith", "B-PER"), ("-", "I-PER"), ("Jones", "I-PER")]
    place = [("New", "B-LOC"), ("York", "I-LOC"), (".", "O")]
    assert told(found)[0] == [("Ms", "O"), *person, ("flew", "O"), ("to", "O"), *place]
    assert told(found)[1] == [("東", "B-LOC"), ("京", "I-LOC"), ("\ufffd", "O"), ("x", "O")]


def test_an_annotation_tools_rows_are_texts_with_spans(tmp_path: Path) -> None:
    """As Prodigy and doccano write them."""
    span = {"start": 3, "end": 7, "label": "LOC", "token_start": 1, "token_end": 1}
    prodigy = {"text": "in Rome", "tokens": [{"text": "in", "start": 0, "end": 2, "id": 0}], "spans": [span]}
    for row in (prodigy, {"id": 1, "text": "in Rome", "label": [[3, 7, "LOC"]]}):
        assert told(read(tmp_path / "a.jsonl", lines(row))) == [[("in", "O"), ("Rome", "B-LOC")]]


def test_a_span_within_a_word_is_widened_and_counted(tmp_path: Path) -> None:
    found = read(tmp_path / "a.jsonl", lines({"text": "Covid19 is 5kg", "spans": [[0, 5, "X"], [11, 14, "Y"]]}))
    assert (told(found)[0][0], found.widened) == (("Covid19", "B-X"), 1)


def tokens(**values: Any) -> str:
    return lines({"tokens": ["a", "b"], "tags": ["O", "B-X"]}, values)


def raw(*found: Any, text: Any = "a word") -> str:
    return lines({"text": text, "spans": found})


BAD: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("x.conll", "", "x.conll: no texts in it"),
    "blank lines alone": ("x.conll", "\n \n\t\n", "x.conll: no texts in it"),
    "comments alone": ("x.conll", "# a\n# b\n", "x.conll: no texts in it"),
    "no JSON line": ("x.jsonl", "\n", "x.jsonl: no texts in it"),
    "one column": ("x.conll", "a\nb\n", "x.conll: its first row has 1 column"),
    "a row with one column": ("x.conll", "a O\nb\n", "x.conll, line 2: 1 column, and the first row has 2"),
    "a row without its tag": ("x.conll", "a\tO\nb\t\n", "x.conll, line 2: 1 column, and the first row has 2"),
    "a row without its token": ("x.conll", "a\tO\n\tO\n", "x.conll, line 2: no token in column 1"),
    "a row too wide": ("x.conll", "a O\n\nb c O\n", "x.conll, line 3: 3 columns, and the first row has 2"),
    "prose": ("x.txt", "One sentence here.\nAnother one.\n", "x.txt, line 2: 2 columns, and the first row has 3"),
    "parts of speech": ("x.conll", "a DT\nb NN\n", "x.conll, line 1: 'DT' is no tag"),
    "mixed schemes": ("x.conll", "a B-X\nb E-X\n\nc U-X\n", "x.conll, line 4: tag U-X is of another scheme"),
    "BIO and IOB1": (
        "x.conll",
        "a B-X\n\nb I-X\n",
        "x.conll, line 3: I-X begins an entity, as in IOB1, while B- does in",
    ),
    "an end without a beginning": ("x.conll", "a S-X\nb E-X\n", "x.conll, line 2: E-X goes on with no entity"),
    "NUL": ("x.conll", "a O\nb\0 O\n" + "c O\n" * 9, "x.conll, line 2: it holds a character NUL"),
    "UTF-16": ("x.conll", "a O\n".encode("utf-16"), "x.conll: UTF-16, not UTF-8"),
    "Latin-1": ("x.conll", "a O\ncafé O\n".encode("latin-1"), "x.conll, line 2: not UTF-8 text (byte 0xe9"),
    "damaged gzip": ("x.conll.gz", gzip.compress(b"a O\n" * 99)[:-9], "x.conll.gz: damaged or not of the format"),
    "csv": ("x.csv", "a,O\n", "x.csv: a csv table has no sentences"),
    "Git LFS": (
        "x.conll",
        "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n",
        "x.conll is a Git LFS pointer",
    ),
    "no JSON": ("x.jsonl", tokens(tokens=["a"], tags=["O"]) + "{\n", "x.jsonl, line 3: not JSON"),
    "a number a line": ("x.jsonl", "3\n", "x.jsonl, line 1: '3' is no object"),
    "no tags": (
        "x.jsonl",
        tokens(tokens=["a"]),
        "x.jsonl, line 2: no column 'tags'; it has tokens; set labelled.label",
    ),
    "lists of two lengths": ("x.jsonl", tokens(tokens=["a", "b"], tags=["O"]), "x.jsonl, line 2: 2 tokens and 1 tags"),
    "no tokens": ("x.jsonl", tokens(tokens=[], tags=[]), "x.jsonl, line 2: no tokens in column 'tokens'"),
    "null tokens": ("x.jsonl", tokens(tokens=None, tags=[]), "x.jsonl, line 2: column 'tokens' holds None"),
    "tags as text": (
        "x.jsonl",
        tokens(tokens=["a"], tags="O"),
        "x.jsonl, line 2: column 'tags' holds 'O'; give tokens",
    ),
    "a number for a token": ("x.jsonl", tokens(tokens=[3], tags=["O"]), "x.jsonl, line 2: token 3 in column 'tokens'"),
    "a number for a tag": ("x.jsonl", tokens(tokens=["a"], tags=[1]), "x.jsonl, line 2: tag 1 in column 'tags' is no"),
    "null for a tag": ("x.jsonl", tokens(tokens=["a"], tags=[None]), "x.jsonl, line 2: tag None in column 'tags'"),
    "NUL in a token": ("x.jsonl", tokens(tokens=["\0"], tags=["O"]), "x.jsonl, line 2: a text holds a character NUL"),
    "line break in a tag": ("x.jsonl", tokens(tokens=["a"], tags=["B-X\ny"]), "x.jsonl, line 2: 'B-X\\ny' is no tag"),
    "two kinds of rows": (
        "x.jsonl",
        lines({"text": "a", "spans": []}, {"text": ["a"], "spans": ["O"]}),
        "x.jsonl, line 2: a list of tokens, and the first row has a raw text",
    ),
    "span behind the text": (
        "x.jsonl",
        raw([2, 7, "X"]),
        "x.jsonl, line 1: span [2, 7, 'X'] is not within the text of 6",
    ),
    "span before the text": ("x.jsonl", raw([-1, 2, "X"]), "x.jsonl, line 1: span [-1, 2, 'X'] is not within"),
    "empty span": ("x.jsonl", raw([2, 2, "X"]), "x.jsonl, line 1: span [2, 2, 'X'] is not within"),
    "backward span": ("x.jsonl", raw([3, 1, "X"]), "x.jsonl, line 1: span [3, 1, 'X'] is not within"),
    "span of white space": ("x.jsonl", raw([1, 2, "X"]), "x.jsonl, line 1: span [1, 2, 'X'] holds white space alone"),
    "overlapping spans": (
        "x.jsonl",
        raw([2, 6, "X"], [0, 3, "Y"]),
        "x.jsonl, line 1: spans [0, 3, 'Y'] and [2, 6, 'X'] overlap",
    ),
    "two spans of a word": (
        "x.jsonl",
        raw([2, 4, "X"], [4, 6, "Y"]),
        "x.jsonl, line 1: span [4, 6, 'Y'] begins in the word that the one before ends in",
    ),
    "places in text": (
        "x.jsonl",
        raw(["0", "1", "X"]),
        "x.jsonl, line 1: span ['0', '1', 'X']: start and end are whole",
    ),
    "places as floats": ("x.jsonl", raw([0.0, 1.0, "X"]), "x.jsonl, line 1: span [0.0, 1.0, 'X']: start and end"),
    "true for a place": ("x.jsonl", raw([False, True, "X"]), "x.jsonl, line 1: span [False, True, 'X']: start and end"),
    "span of two parts": ("x.jsonl", raw([0, 1]), "x.jsonl, line 1: span [0, 1]; write [start, end, label]"),
    "span without a label": (
        "x.jsonl",
        raw({"start": 0, "end": 1}),
        "x.jsonl, line 1: span {'start': 0, 'end': 1}; wri",
    ),
    "number for a label": ("x.jsonl", raw([0, 1, 5]), "x.jsonl, line 1: span [0, 1, 5]: its label is no name"),
    "null for spans": ("x.jsonl", lines({"text": "a", "spans": None}), "x.jsonl, line 1: column 'spans' holds None"),
    "empty text": ("x.jsonl", raw(text=" "), "x.jsonl, line 1: empty text in column 'text'"),
    "number for a text": (
        "x.jsonl",
        raw(text=7),
        "x.jsonl, line 1: column 'text' holds 7; give tokens and tags as lists",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    file, content, message = BAD[name]
    with pytest.raises(UserError) as caught:
        read(tmp_path / file, content)
    assert message in str(caught.value).replace(f"{tmp_path}/", "")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "label", "message"),
    [
        ("4", "label", r"^labelled\.text: '4' is not allowed; .*x\.conll has columns 1 to 3, or -1 for the last"),
        ("word", "label", r"^labelled\.text: 'word' is not allowed"),
        ("sentence", "0", r"^labelled\.label: '0' is not allowed"),
        ("sentence", "-3", r"^labelled\.label: column 1 of .* is that of the tokens; give another"),
    ],
)
def test_a_wrong_column_is_refused(tmp_path: Path, text: str, label: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path / "x.conll", SENTENCE, text, label)


def test_a_missing_file_and_one_column_twice_are_refused(tmp_path: Path) -> None:
    for name in ("none.conll", "none.jsonl", "none.parquet"):
        with pytest.raises(UserError, match=r"no such file or folder; check the path"):
            read_tagged(str(tmp_path / name), "sentence", "label")
    with pytest.raises(UserError, match=r"^labelled\.label: 'tokens' is labelled\.text already"):
        read(tmp_path / "x.jsonl", lines(*LISTS), label="tokens")


def test_the_tags_are_those_of_training_and_others_are_refused(tmp_path: Path) -> None:
    training = read(tmp_path / "train.conll", f"{SENTENCE}\n{OTHER}")
    names = tag_names(training)
    assert names == ("O", "B-MISC", "I-MISC", "B-ORG", "I-ORG", "B-PER", "I-PER")
    assert [ids.tolist() for ids in tag_ids(training, names)] == [[3, 0, 1, 0], [5, 6]]
    test = read(tmp_path / "test.conll", f"{OTHER}lives x O\n\nin x O\nRome x B-LOC\n")
    with pytest.raises(
        UserError, match=r"test\.conll, line 6: type 'LOC' of 'Rome' is not among .* \(MISC, ORG, PER\);"
    ):
        tag_ids(test, names)
    with pytest.raises(UserError, match=r"o\.conll: every tag is O; give texts with entities"):
        tag_names(read(tmp_path / "o.conll", "a O\n"))


def test_a_tenth_is_held_out_with_and_without_entities(tmp_path: Path) -> None:
    content = "".join(f"word{i} {'B-X' if i % 2 else 'O'}\n\n" for i in range(40))
    kept, held = split_validation(read(tmp_path / "x.conll", content), LabelledConfig(), seed=1)
    assert (len(kept), len(held)) == (36, 4)
    assert sorted(word for row in words(kept) + words(held) for word in row) == sorted(f"word{i}" for i in range(40))
    assert sum(tags == ["B-X"] for tags in held.tags) == 2
    fold = LabelledConfig(folds=4, fold=2)
    kept, held = split_validation(read(tmp_path / "x.conll", content), fold, seed=1)
    assert (len(kept), sorted(held.tags)) == (30, [["B-X"]] * 5 + [["O"]] * 5)
    with pytest.raises(UserError, match=r"1 texts are too few to hold some out; set labelled\.validation"):
        split_validation(read(tmp_path / "x.conll", "a B-X\n"), LabelledConfig(), seed=1)


def test_the_examples_of_words_hold() -> None:
    assert doctest.testmod(spans).failed == 0


@pytest.mark.parametrize(
    ("name", "texts", "entities"),
    [("wnut17/train", 3394, 1975), ("wnut17/test", 1287, 1079), ("wikigold/all", 1696, 3558)],
)
def test_published_files_are_read(name: str, texts: int, entities: int) -> None:
    path = DATA / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no {path}")
    found = read_tagged(str(path), "sentence", "label")
    assert (len(found), sum(tag.startswith("B-") for tags in found.tags for tag in tags)) == (texts, entities)
