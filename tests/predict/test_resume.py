"""A run that is killed goes on and writes the bytes of one that isn't; a bad row stops it after what is before."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.errors import UserError
from engine.predict import stream
from engine.predict.journal import Journal
from engine.predict.options import PredictConfig
from engine.predict.stream import predict_file
from tests.conftest import ROOT
from tests.predict.models import read_jsonl, some_texts, write_rows
from tests.train.runs import environment

ROWS = 8
#: a process that waits after each chunk, so that a kill meets it in the middle
SLOW = """
import sys, time
from engine.predict import stream
from launch.__main__ import main
compute = stream.computations
def slowly(*arguments):
    for result in compute(*arguments):
        yield result
        time.sleep(0.3)
stream.computations = slowly
main()
"""


def rows_written(output: Path) -> int:
    sidecar = output.with_name(f"{output.name}.progress.json")
    return json.loads(sidecar.read_text())["rows"] if sidecar.is_file() else 0


def test_a_killed_process_goes_on_with_the_same_bytes(classifier: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", some_texts(80))
    whole, output = tmp_path / "whole.csv", tmp_path / "out.csv"
    predict_file(PredictConfig(str(classifier), str(source), str(whole), chunk_rows=ROWS))
    arguments = ["predict", str(classifier), "--input", str(source), "--output", str(output), "--chunk_rows", str(ROWS)]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *arguments], cwd=ROOT, env=environment())
    while rows_written(output) < 3 * ROWS and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 3 * ROWS <= rows_written(output) < 80
    with output.open("ab") as file:
        file.write(b'17,"half a row')  # as a kill within a write leaves it
    summary = predict_file(PredictConfig(str(classifier), str(source), str(output), chunk_rows=ROWS))
    assert summary is not None
    assert summary.rows == rows_written(output) == 80
    assert 3 * ROWS <= summary.earlier < 80
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_kill_before_the_first_chunk_is_a_fresh_start(classifier: Path, tmp_path: Path, end: str) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", some_texts(9)), tmp_path / "out.csv"
    config = PredictConfig(str(classifier), str(source), str(output))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "computations", stop)
        patch.setattr(Journal, "__exit__", lambda journal, *_: journal._file.close())  # a killed process tidies nothing
        with pytest.raises(KeyboardInterrupt):
            predict_file(config)
    output.write_text(output.read_text() + end)
    summary = predict_file(config)
    assert summary is not None
    assert (summary.rows, summary.earlier) == (9, 0)
    assert len(output.read_text().splitlines()) > 9


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bad_row_is_named_and_all_chunks_before_it_stay(classifier: Path, tmp_path: Path, processes: int) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", some_texts(30)), tmp_path / "out.jsonl"
    lines = source.read_text().splitlines(keepends=True)
    config = PredictConfig(str(classifier), str(source), str(output), chunk_rows=ROWS, processes=processes)
    for bad, message in (
        ('{"id": 20}\n', "in.jsonl, line 21: no column"),
        ('{"id": 20, "text": null}\n', "in.jsonl, line 21: no text in column 'text'"),
        ('{"id": 20, "text": 5}\n', "in.jsonl, line 21: column 'text' holds 5, which is not text"),
        ('{"id": 20, "text": "a\n', "in.jsonl, line 21: not JSON"),
    )[: None if processes == 1 else 1]:
        source.write_text("".join([*lines[:20], bad, *lines[21:]]))
        with pytest.raises(UserError, match=message):
            predict_file(config)
        assert rows_written(output) == len(read_jsonl(output)) == 2 * ROWS
    source.write_text("".join(lines))
    summary = predict_file(config)
    assert summary is not None
    assert (summary.rows, summary.earlier) == (30, 2 * ROWS)
    assert [row["id"] for row in read_jsonl(output)] == list(range(30))


#: prints the peak memory of a prediction of so many rows, in MB, after a prediction that has opened everything
PEAK = """
import sys
import torch
from engine.predict.options import PredictConfig
from engine.predict.stream import predict_file
from engine.train.curves.monitor import memory_bytes
model, source, output = sys.argv[1:]
predict_file(PredictConfig(model, source, output, chunk_rows=500))
print(memory_bytes(torch.device("cpu")) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt", "parquet"])
def test_memory_does_not_grow_with_the_input(classifier: Path, tmp_path: Path, kind: str) -> None:
    peaks = []
    for count in (2_000, 20_000):
        texts = [" ".join(["fox", *text.replace(",", "").split()[:8]]) for text in some_texts(count, longest=8)]
        source = tmp_path / f"{count}.{kind}"
        if kind == "jsonl":
            write_rows(source, texts)
        elif kind == "parquet":
            pq.write_table(pa.table({"text": texts}), source)
        else:
            source.write_text("\n".join([*(["text"] if kind == "csv" else []), *texts]) + "\n")
        arguments = [str(classifier), str(source), str(tmp_path / f"{count}-out.jsonl")]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *arguments],
            cwd=ROOT, env=environment(), capture_output=True, text=True, check=True,
        )  # fmt: skip
        peaks.append(float(done.stdout))
        assert len(read_jsonl(tmp_path / f"{count}-out.jsonl")) == count
    assert peaks[1] - peaks[0] < 20, peaks
