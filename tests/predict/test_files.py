"""Inputs and outputs of every format: columns come along, bytes repeat, what is there already is respected."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.errors import UserError
from engine.predict.options import PredictConfig
from engine.predict.rows import InputColumns, read_rows
from engine.predict.stream import Summary, predict_file
from tests.conftest import ROOT
from tests.predict.models import read_jsonl, some_texts, write_rows
from tests.train.runs import environment

TEXTS = ["a quick fox", 'dull , "really" dull', "naïve, but fun"]
RECORDS = [{"id": str(number), "text": text, "note": "é"} for number, text in enumerate(TEXTS)]
TABLE = [list(RECORDS[0]), *(list(record.values()) for record in RECORDS)]


def write_csv(path: Path, delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows(TABLE)


def jsonl() -> bytes:
    return "".join(json.dumps(record) + "\n\n" for record in RECORDS).encode()


WRITERS: dict[str, Callable[[Path], object]] = {
    "x.csv": write_csv,
    "semicolons.csv": lambda path: write_csv(path, ";"),
    "x.tsv": lambda path: path.write_text(
        "".join("\t".join(row) + "\n" for row in [RECORDS[0], *map(dict.values, RECORDS)])
    ),  # type: ignore[arg-type]
    "x.jsonl": lambda path: path.write_bytes(jsonl()),
    "x.ndjson.gz": lambda path: path.write_bytes(gzip.compress(jsonl())),
    "x.json.xz": lambda path: path.write_bytes(lzma.compress(jsonl())),
    "x.parquet": lambda path: pq.write_table(pa.Table.from_pylist(RECORDS), path),
}


def predict(model: Path, source: Path, output: Path, overwrite: bool = False, **options: Any) -> Summary:
    summary = predict_file(PredictConfig(str(model), str(source), str(output), **options), overwrite=overwrite)
    assert summary is not None
    return summary


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_read_with_all_columns(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    seen: list[int] = []
    rows = list(read_rows(str(tmp_path / name), None, InputColumns("", None, ""), seen.append))
    assert [row.record for row in rows] == RECORDS
    assert 0 < seen[-1] <= (tmp_path / name).stat().st_size


def test_a_line_of_txt_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"one\r\n\r\nthree"))
    rows = read_rows(str(tmp_path / "x.txt.gz"), None, InputColumns("", None, ""))
    assert [(row.position, row.record) for row in rows] == [
        (1, {"text": "one"}),
        (2, {"text": ""}),
        (3, {"text": "three"}),
    ]


def test_the_same_predictions_whatever_the_formats(classifier: Path, tmp_path: Path) -> None:
    expected = None
    for name, write in WRITERS.items():
        write(tmp_path / name)
        predict(classifier, tmp_path / name, tmp_path / f"{name}.jsonl", probabilities=True)
        content = (tmp_path / f"{name}.jsonl").read_bytes()
        expected = expected or content
        assert content == expected, name


def test_tables_have_a_column_for_each_probability(classifier: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", TEXTS, more=[{"a": [1, "é"]}, None, True])
    predict(classifier, source, tmp_path / "out.jsonl", probabilities=True)
    predict(classifier, source, tmp_path / "out.csv", probabilities=True)
    predict(classifier, source, tmp_path / "out.tsv", probabilities=True, prefix="")
    expected = read_jsonl(tmp_path / "out.jsonl")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["more"] for row in rows] == ['{"a": [1, "é"]}', "", "true"]
    for row, other in zip(rows, expected, strict=True):
        assert row["text"] == other["text"]
        assert row["predicted_label"] == other["predicted_label"]
        assert float(row["predicted_probabilities.fair"]) == other["predicted_probabilities"]["fair"]
    header, *lines = (tmp_path / "out.tsv").read_text(encoding="utf-8").splitlines()
    assert header.split("\t") == [
        "id",
        "text",
        "more",
        "label",
        "confidence",
        *(f"probabilities.{n}" for n in ("bad", "fair", "good")),
    ]
    assert lines[1].split("\t")[:3] == ["1", TEXTS[1], ""]


def test_a_table_refuses_what_it_cannot_hold(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a"}\n{"text": "b", "more": 1}\n')
    with pytest.raises(UserError, match=r"in.jsonl, line 2: column 'more' is not in all rows, as a table needs"):
        predict(classifier, tmp_path / "in.jsonl", tmp_path / "out.csv")
    source = write_rows(tmp_path / "tabs.jsonl", ["fine", "a\tb"])
    with pytest.raises(UserError, match=r"tabs.jsonl, line 2: a tab or a line break, which .tsv can't hold"):
        predict(classifier, source, tmp_path / "out.tsv")


def test_odd_values_come_along(classifier: Path, tmp_path: Path) -> None:
    day = datetime.date(2024, 2, 29)
    pq.write_table(pa.table({"sentence": ["fox"], "day": [day], "list": [[1, 2]]}), tmp_path / "x.parquet")
    predict(classifier, tmp_path / "x.parquet", tmp_path / "out.jsonl")
    (row,) = read_jsonl(tmp_path / "out.jsonl")
    assert (row["day"], row["list"]) == ("2024-02-29", [1, 2])
    (tmp_path / "half.jsonl").write_text('{"text": "fox \\ud83d", "deep": {"half": "\\ud83d"}}\n')
    predict(classifier, tmp_path / "half.jsonl", tmp_path / "half-out.jsonl")
    (row,) = read_jsonl(tmp_path / "half-out.jsonl")
    assert row["deep"] == {"half": "\ud83d"}


def test_a_run_tells_its_columns_and_length(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "export").symlink_to(classifier)
    (tmp_path / "run" / "config.yaml").write_text("labelled: {text: premise, text_pair: claim, max_length: 9}\n")
    rows = [{"premise": "quick fox", "claim": "lazy dog " * 9, "text": "other"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert predict(tmp_path / "run", tmp_path / "in.jsonl", tmp_path / "a.jsonl").length == 9
    given = {"text": "premise", "text_pair": "claim", "max_length": 9}
    summary = predict(classifier, tmp_path / "in.jsonl", tmp_path / "b.jsonl", **given)
    assert (summary.length, summary.truncated) == (9, 1)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_a_finished_output_says_so_and_another_is_respected(classifier: Path, tagger: Path, tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", some_texts(20)), tmp_path / "new" / "out.jsonl"
    predict(classifier, source, output, chunk_rows=8)
    content = output.read_bytes()
    again = predict(classifier, source, output, chunk_rows=8)
    assert again.line("out") == "nothing to do: out has the predictions of all 20 rows"
    with pytest.raises(UserError, match="was made with probabilities False, and True is given; give another output"):
        predict(classifier, source, output, chunk_rows=8, probabilities=True)
    with pytest.raises(UserError, match=r"was made with model sha256 [0-9a-f]{12}, and sha256 [0-9a-f]{12} is given"):
        predict(tagger, source, output, chunk_rows=8)
    other = write_rows(tmp_path / "other.jsonl", some_texts(20, seed=9))
    with pytest.raises(UserError, match=r"has predictions of 20 rows, which are not the first ones of .*other.jsonl"):
        predict(classifier, other, output, chunk_rows=8)
    assert output.read_bytes() == content
    with source.open("a") as file:
        file.write('{"id": 20, "text": "one more fox"}\n')
    more = predict(classifier, source, output, chunk_rows=8)
    assert (more.rows, more.earlier) == (21, 20)
    assert output.read_bytes().startswith(content)
    predict(classifier, other, output, overwrite=True, chunk_rows=8)
    assert len(read_jsonl(output)) == 20


def test_a_damaged_or_foreign_output_is_refused(classifier: Path, tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", some_texts(9)), tmp_path / "out.jsonl"
    output.write_text("mine\n")
    with pytest.raises(UserError, match=r"out.jsonl' exists and out.jsonl.progress.json doesn't"):
        predict(classifier, source, output)
    assert output.read_text() == "mine\n"
    output.unlink()
    predict(classifier, source, output)
    output.write_bytes(output.read_bytes()[:-1])
    with pytest.raises(UserError, match="is shorter than what was written there"):
        predict(classifier, source, output)
    sidecar = tmp_path / "out.jsonl.progress.json"
    sidecar.write_text(sidecar.read_text().replace('"rows": 9', '"rows": 8'))
    with pytest.raises(UserError, match=r"progress.json is damaged or of another version"):
        predict(classifier, source, output)


def test_from_pipe_to_pipe(classifier: Path, tmp_path: Path) -> None:
    """Real pipes: lines go in and come out, all else is told on the standard error."""
    texts = [text for text in some_texts(40) if "\n" not in text]
    command = [sys.executable, "-m", "launch", "predict", str(classifier), "--input", "-", "--output", "-"]
    done = subprocess.run(
        [*command, "--format", "txt", "--chunk_rows", "16"], cwd=ROOT, env=environment(), capture_output=True,
        input="".join(text + "\n" for text in texts).encode(), check=True,
    )  # fmt: skip
    rows = [json.loads(line) for line in io.StringIO(done.stdout.decode())]
    assert [row["text"] for row in rows] == texts
    assert done.stderr.decode().startswith(f"predicted {len(texts)} rows in ")
    assert len(done.stderr.splitlines()) == 1


def test_processes_give_the_same_rows(classifier: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", some_texts(40))
    predict(classifier, source, tmp_path / "one.jsonl", chunk_rows=8)
    predict(classifier, source, tmp_path / "two.jsonl", chunk_rows=8, processes=2)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
