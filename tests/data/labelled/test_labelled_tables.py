"""Tables and JSON lines of labelled examples as people have them: long fields, other separators, what is no table."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.config import LabelledConfig
from engine.data.labelled.classes import class_names, split_validation
from engine.data.labelled.files import Examples, read_examples
from engine.errors import UserError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 99\n"


def read(path: Path, content: str | bytes | None = None, pair: str | None = None) -> Examples:
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_examples(str(path), "sentence", pair, "label")


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("xl/workbook.xml", "<workbook/>")
    return content.getvalue()


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.csv.gz"])
def test_a_field_may_be_longer_than_the_csv_modules_limit(tmp_path: Path, name: str) -> None:
    text, separator = "word " * 60_000, "\t" if name == "x.tsv" else ","
    content = f"sentence{separator}label\nshort{separator}0\n{text}{separator}1\n".encode()
    found = read(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    assert found.texts == ["short", text]
    assert found.positions == [2, 3]


def test_a_position_is_the_line_that_a_row_starts_at(tmp_path: Path) -> None:
    content = 'sentence,label\n"one\ntwo\nthree",a\n\n\nfour,b\n"five\r\nsix",a\nseven,b\n'
    found = read(tmp_path / "x.csv", content)
    assert found.positions == [2, 7, 8, 10]
    assert found.texts[2] == "five\r\nsix"
    lines = '\n{"sentence": "a", "label": 1}\r\n\r\n{"sentence": "b", "label": 0}\n'
    assert read(tmp_path / "x.jsonl.gz", gzip.compress(lines.encode())).positions == [2, 4]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('"the cat" sat,1\n', "line 4: .*check the quotes"),
        ('"never closed,1\nx,1\ny,0\n', "line 4: .*check the quotes"),
        ("p,q,1\n", "line 4: the header has 2 fields and this row has 3;"),
        ('"a\nb",c,1\n', "line 4: the header has 2 fields and this row has 3;"),
        (' ,"1"\n', "line 4: empty text"),
        ("caf\udce9,1\n", r"line 4: not UTF-8 text \(byte 0xe9"),
        ("word,a\0b\n", "line 4: label 'a.x00b' in column 'label' has a control character"),
    ],
)
def test_a_wrong_row_is_named_by_the_line_that_it_starts_at(tmp_path: Path, row: str, message: str) -> None:
    content = 'sentence,label\n"good\ndog",1\n' + row + "more,0\n"
    with pytest.raises(UserError, match=message):
        read(tmp_path / "x.csv", content.encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("separator", [";", "\t", "|"])
def test_a_csv_with_another_separator_is_read_and_told(
    tmp_path: Path, separator: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rows = [("sentence", "label"), ("well, well", "a"), (f'"x{separator}y"', "b")]
    found = read(tmp_path / "x.csv", "".join(separator.join(row) + "\n" for row in rows))
    assert (found.texts, found.labels) == (["well, well", f"x{separator}y"], ["a", "b"])
    assert "its fields are separated by" in caplog.text


def test_a_tsv_is_quoted_if_its_header_is(tmp_path: Path) -> None:
    assert read(tmp_path / "x.tsv", 'sentence\tlabel\n"a" b\tx\n').texts == ['"a" b']
    assert read(tmp_path / "x.tsv", '"sentence"\t"label"\n"a ""b""\tc"\t"x"\n').texts == ['a "b"\tc']


@pytest.mark.parametrize("name", ["x.csv", "x.jsonl"])
@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_lines_end_as_any_system_ends_them(tmp_path: Path, name: str, end: str) -> None:
    rows = {
        "x.csv": ["\ufeffsentence, label ", "a,x", "b,y"],
        "x.jsonl": ['\ufeff{"sentence": "a", "label": "x"}', '{"sentence": "b", "label": "y"}'],
    }
    found = read(tmp_path / name, end.join(rows[name]) + end)
    assert (found.texts, found.labels) == (["a", "b"], ["x", "y"])
    assert found.positions == ([2, 3] if name == "x.csv" else [1, 2])


def test_labels_agree_whatever_the_format_makes_of_them(tmp_path: Path) -> None:
    table = {"sentence": ["a", "b", "c"]}
    pq.write_table(pa.table(table | {"label": [True, False, True]}), tmp_path / "b.parquet")
    pq.write_table(pa.table(table | {"label": [1.0, 0.0, 1.0]}), tmp_path / "f.parquet")
    lines = [
        json.dumps({"sentence": text, "label": label}) for text, label in zip("abc", (True, False, True), strict=True)
    ]
    assert read(tmp_path / "b.parquet").labels == ["True", "False", "True"]
    assert read(tmp_path / "x.jsonl", "\n".join(lines)).labels == ["True", "False", "True"]
    assert read(tmp_path / "f.parquet").labels == ["1", "0", "1"]
    assert read(tmp_path / "x.csv", "sentence,label\na,1.0\nb,0 \nc, 1\n").labels == ["1", "0", "1"]


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    assert read(tmp_path / "x.jsonl", '{"sentence": "a\\ud83d b", "label": "x"}\n').texts == ["a b"]


NO_TABLE: dict[str, tuple[str, str | bytes, str]] = {
    "a pointer": ("x.csv", POINTER, r"^labelled: .*x\.csv is a Git LFS pointer.*git lfs pull"),
    "a pointer to parquet": ("x.parquet", POINTER, "is a Git LFS pointer"),
    "UTF-16": ("x.csv", "sentence,label\na,1\n".encode("utf-16"), "x.csv: UTF-16, not UTF-8; convert it: iconv"),
    "UTF-16 unmarked": ("x.tsv", "sentence\tlabel\na\t1\n".encode("utf-16-le"), "x.tsv: UTF-16"),
    "gzip unnamed": ("x.jsonl", gzip.compress(b"{}"), "compressed by gzip; end its name in .gz"),
    "no gzip": ("x.csv.gz", "sentence,label\na,1\n", "damaged or not of the format"),
    "a spreadsheet": ("x.csv", zipped(), "a zip archive or a spreadsheet, not text"),
    "parquet in JSON": ("x.jsonl", b"PAR1....", "parquet, not text"),
    "twice a column": ("x.csv", "sentence,label,label\na,1,2\n", r"2 columns are called 'label' \(labelled.label\)"),
    "twice a field": ("x.jsonl", '{"sentence": "a", "label": 1, "label": 0}', "line 1: 2 columns are called 'label'"),
    "an array": ("x.json", '[{"sentence": "a", "label": 1}]', "is no object; write one object a line: jq -c"),
    "an array of lines": ("x.json", '[\n {"sentence": "a"},\n', r"line 1: not JSON \(one value over several lines\)"),
    "an object of lines": ("x.json", '{\n "data": [\n', r"line 1: not JSON \(one value over several lines\)"),
    "a long number": ("x.jsonl", '{"sentence": "a", "label": ' + "1" * 5000 + "}", "a number of too many digits"),
    "a deep value": ("x.jsonl", "[" * 100_000, "nested too deeply"),
    "no text": ("x.jsonl", '{"sentence": NaN, "label": 1}', "line 1: empty text in column 'sentence'"),
    "header alone": ("x.csv", "sentence;label\n", "no examples in it"),
}


@pytest.mark.parametrize("case", NO_TABLE)
def test_what_is_no_table_is_said_in_a_line(tmp_path: Path, case: str) -> None:
    name, content, message = NO_TABLE[case]
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / name, content)
    assert str(caught.value).count("; ") >= 1


def test_a_parquet_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    pq.write_table(pa.table(columns, names=["sentence", "label", "label"]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="2 columns are called 'label'"):
        read(tmp_path / "x.parquet")


def test_a_folders_name_is_no_column_of_parquet(tmp_path: Path) -> None:
    folder = tmp_path / "label=9"
    folder.mkdir()
    pq.write_table(pa.table({"sentence": ["a"], "label": ["x"]}), folder / "x.parquet")
    assert read(folder / "x.parquet").labels == ["x"]


def test_a_saved_data_set_of_pointers_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"sentence": ["a"], "label": ["x"]}).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_text(POINTER)
    with pytest.raises(UserError, match="Git LFS pointer"):
        read(tmp_path / "saved")


def test_two_fields_cannot_name_one_column(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"labelled\.text_pair: 'sentence' is labelled\.text already"):
        read(tmp_path / "x.csv", "sentence,label\na,1\n", pair="sentence")


def test_a_column_of_ids_is_no_label() -> None:
    texts = [f"t{i}" for i in range(40)]
    ids = Examples("x.csv", texts, None, [f"id{i}" for i in range(38)] + ["a", "a"], list(range(40)))
    for use in (class_names, lambda given: split_validation(given, LabelledConfig(), seed=1)):
        with pytest.raises(UserError, match=r"38 of 40 examples have a label of their own; set labelled\.label"):
            use(ids)
    classes = Examples("x.csv", texts, None, ["a", "b", "c", "d"] * 10, list(range(40)))
    assert class_names(classes) == ("a", "b", "c", "d")
