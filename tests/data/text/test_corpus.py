"""Readers: every format gives the same documents, and a bad file is named with its line."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.data.text.corpus import CorpusConfig, list_sources, read_documents, record_source
from engine.data.text.embedded import embedded_documents, prose
from engine.data.text.readers import Position
from engine.data.text.sentences import split_sentences
from engine.errors import UserError

TEXTS = ["First document. It is short.", "Zweites Dokument: schön.\nMit zwei Zeilen.", "Third."]


def documents(*sources: object, **options: str) -> list[str]:
    config = CorpusConfig(source=[str(source) for source in sources], **options)  # type: ignore[arg-type]
    return list(read_documents(config, list_sources(config)))


def jsonl(texts: list[str], field: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()


def write_parquet(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"text": texts}), path, row_group_size=2)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.txt": lambda path: path.write_text("\n\n".join(TEXTS), encoding="utf-8"),
    "a.md": lambda path: path.write_text("\n \n\n".join(TEXTS) + "\n\n", encoding="utf-8-sig"),
    "wiki_00": lambda path: path.write_text("\n\n".join(TEXTS), encoding="utf-8"),
    "a.txt.gz": lambda path: path.write_bytes(gzip.compress("\n\n".join(TEXTS).encode())),
    "a.jsonl": lambda path: path.write_bytes(jsonl([*TEXTS, " \n", ""])),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(TEXTS))),
    "a.jsonl.xz": lambda path: path.write_bytes(lzma.compress(jsonl(TEXTS))),
    "a.parquet": lambda path: write_parquet(path, TEXTS),
    "saved": lambda path: datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(path),
    "saved_dict": lambda path: datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": TEXTS}), test=datasets.Dataset.from_dict({"text": ["no"]})
    ).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert [text.strip() for text in documents(tmp_path / name)] == TEXTS


def test_a_named_dataset_is_read_by_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_bytes(jsonl(TEXTS))
    assert documents(f"datasets:{tmp_path / 'data'}", split="test") == TEXTS
    with pytest.raises(UserError, match=r"split: .* has no split 'train'; it has test"):
        documents(f"datasets:{tmp_path / 'data'}")


def test_a_whole_text_file_can_be_one_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    assert documents(tmp_path / "a.txt", documents="file") == ["One.\n\nTwo.\n"]


def test_a_folder_is_read_in_sorted_order_without_descriptions_and_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a.jsonl", "README.md", ".hidden.txt", "_SUCCESS", "image.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jsonl([name]) if name.endswith(".jsonl") else name.encode())
    assert documents(tmp_path) == ["a.jsonl", "b/1.txt", "b/2.txt"]


def test_sources_keep_the_order_given(tmp_path: Path) -> None:
    (tmp_path / "z.txt").write_text("z")
    (tmp_path / "a.txt").write_text("a")
    assert documents(tmp_path / "z.txt", tmp_path / "a.txt") == ["z", "a"]


def test_the_position_ends_at_the_size_of_all_sources(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "a.parquet", "a.txt"):
        WRITERS[name](tmp_path / name)
    config, position = CorpusConfig(source=[str(tmp_path)]), Position()
    list(read_documents(config, list_sources(config), position))
    assert position.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.txt", "saved"])
def test_a_record_changes_with_the_content_and_not_with_the_place(tmp_path: Path, name: str) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        WRITERS[name](tmp_path / folder / name)
    if name == "saved":
        datasets.Dataset.from_dict({"text": ["changed"]}).save_to_disk(tmp_path / "three" / name)
    else:
        (tmp_path / "three").mkdir()
        (tmp_path / "three" / name).write_text("changed")
    config = CorpusConfig(source=[str(tmp_path / folder / name) for folder in ("one", "two", "three")])
    one, two, three = (record_source(source, config).sha256 for source in list_sources(config))
    assert one == two != three


BAD: dict[str, tuple[str, bytes, str]] = {
    "bad JSON": ("a.jsonl", jsonl(TEXTS) + b'{"text": \n', r"a\.jsonl:4: not JSON"),
    "a JSON list": ("a.jsonl", b'["text"]\n', r"a\.jsonl:1: a JSON list, not an object"),
    "missing field": (
        "a.jsonl",
        jsonl(TEXTS, "body"),
        r"text_field: .*a\.jsonl:1 has no field 'text'; it has id, body",
    ),
    "not text": ("a.jsonl", b'{"text": 3}\n', r"text_field: 'text' of .*a\.jsonl:1 is 3, not text"),
    "not UTF-8": ("a.txt", "one\ntwo\nschön\n".encode("latin-1"), r"a\.txt:3: not UTF-8"),
    "cut gzip": ("a.txt.gz", gzip.compress(b"text\n" * 9999)[:-20], r"a\.txt\.gz: damaged after line \d+"),
    "no gzip": ("a.txt.gz", b"plain", r"a\.txt\.gz: damaged"),
    "no xz": ("a.jsonl.xz", b"plain", r"a\.jsonl\.xz: damaged"),
    "no parquet": ("a.parquet", b"plain", r"a\.parquet: not a readable parquet file"),
    "unsupported": ("a.pdf", b"plain", r"source: .*a\.pdf has an unsupported suffix"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_a_user_error_that_names_file_and_line(tmp_path: Path, case: str) -> None:
    name, content, message = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        documents(tmp_path / name)


def test_a_missing_path_and_an_empty_folder_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt does not exist"):
        documents(tmp_path / "nowhere.txt")
    with pytest.raises(UserError, match="has no readable file"):
        documents(tmp_path)
    with pytest.raises(UserError, match="nothing given"):
        documents()


def test_wrong_columns_are_user_errors(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "number": [1]}), tmp_path / "a.parquet")
    datasets.Dataset.from_dict({"body": ["a"], "number": [1]}).save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved"):
        with pytest.raises(UserError, match=r"has no column 'text'; it has body, number"):
            documents(tmp_path / name)
        with pytest.raises(UserError, match=r"column 'number' of .* is int64, not text"):
            documents(tmp_path / name, text_field="number")


def test_the_embedded_corpus_is_prose_without_repeated_paragraphs() -> None:
    texts = embedded_documents()
    paragraphs = [paragraph for text in texts for paragraph in text.split("\n\n")]
    assert len(texts) > 100
    assert sum(map(len, texts)) > 500_000
    assert len(set(paragraphs)) == len(paragraphs)
    assert not any(">>>" in paragraph for paragraph in paragraphs)
    words = " ".join(texts[:50]).split()
    assert sum(word == "the" for word in words) / len(words) > 0.03


def test_prose_drops_code_headings_and_markup() -> None:
    docstring = """Short.

    Return the *longest* common prefix of :func:`~os.path.join` and ``other``
    names of the given list.

    >>> commonprefix(["a", "b"])
    ''

    ========
    name = {x: [1, 2, 3], y: (4, 5)}; call(name, 17)

    - The first item of the list has enough words.
    - The second item of the list also has enough words.
    """
    assert list(prose(docstring)) == [
        "Return the longest common prefix of os.path.join and other names of the given list.",
        "The first item of the list has enough words.",
        "The second item of the list also has enough words.",
    ]


def test_sentences_end_at_stops_and_blank_lines_but_not_at_wrapped_lines() -> None:
    text = "A Heading\r\n\r\nDr. Smith went\r\nhome. He slept.\n \n\n  \nEnd"
    assert split_sentences(text) == ["A Heading", "Dr. Smith went\nhome.", "He slept.", "End"]
    assert split_sentences("你好。我是谁?", "zh") == ["你好。", "我是谁?"]
    assert split_sentences(" \n\n\t") == []
