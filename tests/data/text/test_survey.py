"""What sources are told to be by their content, where documents end, what is said of it and kept in the store."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest

from engine.data.store.executor import open_executor
from engine.data.store.manifest import MANIFEST_NAME, Manifest, read_manifest
from engine.data.store.prepare import PrepareConfig, prepare
from engine.data.text.corpus import CorpusConfig, list_sources, read_documents
from engine.data.text.readers import Position
from engine.data.text.survey import describe_reading, describe_sources, resolved, with_lines
from engine.errors import UserError

ARTICLES = [("Cats & dogs", "The cat sat.\nIt ran < fast."), ("River", "It is blue.\n\nIt is big."), ("Empty", "")]
NOTE = "Seen today. No fever.\n\nPlan: rest. Call if worse.\n"


def wiki() -> str:
    docs = []
    for number, (title, text) in enumerate(ARTICLES):
        body = f"{title}\n\n{text}".replace("&", "&amp;").replace("<", "&lt;")
        docs.append(
            f'<doc id="{number}" url="https://xx.example.org?curid={number}" title="{title}">\n{body}\n\n</doc>\n'
        )
    return "\n".join(docs)


def lines(name: str = "text") -> str:
    return "".join(json.dumps({"id": number, name: text}) + "\n" for number, (_, text) in enumerate(ARTICLES))


def read(*sources: object, **options: Any) -> tuple[list[str], list[str], list[str]]:
    """The documents, what is said before and after."""
    config = CorpusConfig(source=[str(source) for source in sources], **options)
    found, position = list_sources(config), Position()
    texts = list(read_documents(config, found, position))
    return texts, describe_sources(found, config), describe_reading(found, position)


@pytest.mark.parametrize("name", ["AA/wiki_00", "a.txt", "wiki_00.bz2", "a.TXT.gz"])
def test_wikiextractors_files_are_a_document_an_article_without_tags(tmp_path: Path, name: str) -> None:
    path = tmp_path / "d" / name
    path.parent.mkdir(parents=True)
    content = wiki().encode()
    path.write_bytes({".bz2": bz2.compress, ".gz": gzip.compress}.get(path.suffix, bytes)(content))
    for source in (tmp_path / "d", path):
        texts, before, after = read(source)
        assert [text.strip() for text in texts] == [f"{title}\n\n{text}".strip() for title, text in ARTICLES]
        assert before == ["1 file told by the content: WikiExtractor's, each <doc> a document"]
        assert after == [f"{path}: 1 file, 3 documents: split at <doc> tags"]


@pytest.mark.parametrize("name", ["AA/wiki_00", "a.txt", "wiki_00.bz2", "c4.json", "c4.json.gz"])
def test_json_lines_are_told_by_their_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / "d" / name
    path.parent.mkdir(parents=True)
    content = ("\n" + lines()).encode()
    path.write_bytes({".bz2": bz2.compress, ".gz": gzip.compress}.get(path.suffix, bytes)(content))
    (tmp_path / "d" / "dataset_info.json").write_text('{"splits": {}}')
    texts, before, after = read(tmp_path / "d")
    assert texts == [text for _, text in ARTICLES if text]
    assert before == ["1 file told by the content: JSON lines"]
    assert after == [f"{path}: 1 row without text left out"]


def test_json_lines_of_another_field_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text(lines("body"))
    read(tmp_path / "a.txt")
    assert "begins with JSON: text_field may be id, body" in caplog.text
    assert read(tmp_path / "a.txt", text_field="body")[1] == ["1 file told by the content: JSON lines"]


def test_text_that_only_looks_like_either_stays_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("<doc is a tag.\n\n{curly} braces.\n")
    (tmp_path / "b.txt").write_text('{"text": broken\n')
    texts, before, _ = read(tmp_path / "a.txt", tmp_path / "b.txt")
    assert (len(texts), before) == (3, [])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_rows_without_text_are_left_out_and_counted(tmp_path: Path, kind: str) -> None:
    table = {"text": ["The cat sat.", None, "", " \n", "The dog ran."]}
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        rows = [json.dumps({"text": text}) for text in table["text"]]
        path.write_text("\n".join([*rows[:4], '{"text": NaN}', rows[4]]))
    elif kind == "parquet":
        pd.DataFrame(table).to_parquet(path)
    else:
        datasets.Dataset.from_dict(table).save_to_disk(path)
    texts, _, after = read(path)
    assert texts == ["The cat sat.", "The dog ran."]
    assert after == [f"{path}: {4 if kind == 'jsonl' else 3} rows without text left out"]


def test_a_category_of_texts_is_text(tmp_path: Path) -> None:
    pd.DataFrame({"text": pd.Series(["One.", "Two.", "One."], dtype="category")}).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0] == ["One.", "Two.", "One."]


def write_notes(folder: Path, count: int, text: str = NOTE) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03}.txt").write_text(text)
    return folder


def test_many_small_files_are_a_document_each_unless_told_otherwise(tmp_path: Path) -> None:
    folder = write_notes(tmp_path / "notes", 30)
    texts, before, after = read(folder)
    assert len(texts) == 30
    assert before == ["30 files of plain text: a document each (--documents blank_line splits them)"]
    assert after == [f"{folder}: 30 files, 30 documents: a file each (--documents blank_line splits them)"]
    texts, before, after = read(folder, documents="blank_line")
    assert (len(texts), before) == (60, [])
    assert after == [f"{folder}: 30 files, 60 documents: split at blank lines (--documents file takes whole files)"]
    one_by_one = sorted(folder.iterdir())
    assert len(read(*one_by_one)[0]) == 30
    assert len(read(*one_by_one[:19])[0]) == 38
    assert len(read(*one_by_one[:19], documents="file")[0]) == 19


def test_many_large_files_and_one_file_beside_notes_are_split(tmp_path: Path) -> None:
    large = write_notes(tmp_path / "large", 21, "A line.\n" * 140_000 + "\nAnother.\n")
    assert len(read(large)[0]) == 42
    notes = write_notes(tmp_path / "notes", 30)
    (tmp_path / "book.txt").write_text("One.\n\nTwo.\n\nThree.\n")
    texts, _, after = read(notes, tmp_path / "book.txt")
    assert len(texts) == 33
    assert after[1].endswith("book.txt: 1 file, 3 documents: split at blank lines (--documents file takes whole files)")


def test_an_option_without_effect_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines())
    assert read(tmp_path / "a.jsonl", documents="file")[1] == [
        "documents: file changes nothing, for no source is plain text"
    ]


def made(source: list[Path], output: Path, **options: Any) -> Manifest:
    return prepare(
        PrepareConfig(
            **{
                "source": list(map(str, source)),
                "output": str(output),
                "vocab_size": 200,
                "validation_fraction": 0.0,
                **options,
            }
        )
    )


def test_each_file_has_lines_of_its_own_and_the_store_says_so(tmp_path: Path) -> None:
    wrapped = "A sentence that is far too long for the width\nof a page goes on in the next line. It ends.\n\n"
    (tmp_path / "book.txt").write_text(wrapped * 3)
    (tmp_path / "chat.txt").write_text("asked about it\noffered help. refused\naccepted\n\nasked why\nleft\n")
    (tmp_path / "more.txt").write_text(wrapped * 2)
    sources = [tmp_path / name for name in ("book.txt", "chat.txt", "more.txt")]
    manifest = made(sources, tmp_path / "store")
    assert manifest.settings["lines"] == [["wrapped", 1], ["sentence", 1], ["wrapped", 1]]
    assert manifest.counts("train").sentences == 3 * 2 + 5 + 2 * 2
    assert manifest.counts("train").documents == 3 + 2 + 2
    with open_executor(2) as opened:
        assert opened is not None
        config = PrepareConfig(source=list(map(str, sources)), output=str(tmp_path / "pool"), vocab_size=200)
        config.validation_fraction = 0.0
        assert prepare(config, *opened).fingerprint == manifest.fingerprint
    assert made(sources, tmp_path / "wrapped", lines="wrapped").counts("train").sentences == 3 * 2 + 3 + 2 * 2
    with pytest.raises(UserError, match=r"lines: .* was prepared with .*, not 'wrapped'; pass --overwrite"):
        made(sources, tmp_path / "store", lines="wrapped")


def test_a_store_of_an_earlier_version_is_recognised_where_nothing_changed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One is here. Two.\n\nThree is here. Four.\n")
    (tmp_path / "b.txt").write_text("one here\ntwo\n\nthree here\nfour\n")
    for name, same in (("a.txt", True), ("b.txt", False)):
        output = tmp_path / f"store-{name}"
        manifest = made([tmp_path / name], output)
        content = json.loads((output / MANIFEST_NAME).read_text())
        for unsaid in ("lines", "by_content"):
            del content["settings"][unsaid]
        (output / MANIFEST_NAME).write_text(json.dumps(content))
        if same:
            assert made([tmp_path / name], output).fingerprint == manifest.fingerprint
        else:
            with pytest.raises(UserError, match=r"lines: .* was prepared with 'wrapped', not 'sentence'"):
                made([tmp_path / name], output)
            assert made([tmp_path / name], output, lines="wrapped") == read_manifest(output)


def test_settings_state_what_was_decided(tmp_path: Path) -> None:
    notes = write_notes(tmp_path / "notes", 25, "one here\ntwo here\n")
    (tmp_path / "wiki_00").write_text(wiki())
    config = CorpusConfig(source=[str(notes), str(tmp_path / "wiki_00")])
    sources, said = with_lines(list_sources(config), config, "en")
    assert resolved(sources, config) == {"documents": "file", "lines": "sentence", "by_content": ["wiki"]}
    assert said[0].startswith(f"{notes}: a line is a sentence, by their looks (lines: sentence;")
