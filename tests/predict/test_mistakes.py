"""Mistakes in what predict is given, by the real command line: one line on stderr, exit code 2, nothing written."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.predict.model import open_folder
from engine.predict.predictor import predictor_class
from launch.__main__ import dispatch
from launch.cli import run_command
from tests.predict.models import change_config, write_model

MISTAKES: dict[str, tuple[list[str], str]] = {
    "no model": (["IN/none"], "IN/none: no such folder; give the folder of a Hugging Face encoder"),
    "folder without a head": (["IN/encoder"], "names 'BertModel' in architectures, which has no head of a task"),
    "model of pre-training": (["IN/mlm"], "names 'BertForMaskedLM' in architectures, which has no head of a task"),
    "head without weights": (["IN/fresh"], "IN/fresh has no weights of bert.pooler.dense.weight, a"),
    "head of another size": (["IN/reshaped"], "IN/reshaped has no weights of classifier"),
    "other architecture": (["IN/t5"], "its model_type is 't5'; give a model of type 'bert'"),
    "no tokenizer": (["IN/bare"], "bare has neither tokenizer.json nor vocab.txt"),
    "tokenizer of another model": (["IN/words"], "words has a tokenizer of"),
    "no weights": (["IN/weightless"], "weightless: it holds no weights"),
    "run without an export": (["IN/run"], "is a run without an export; zerobert export IN/run makes one"),
    "unknown problem type": (["IN/problem"], "problem_type 'ranking' is not known"),
    "thresholds that are none": (["IN/thresholds"], "thresholds [0.5] is not an object of numbers by label"),
    "no input": (["IN/model", "--input=IN/none.csv"], "input: 'IN/none.csv' is no such file; check the path"),
    "folder for input": (["IN/model", "--input=IN/t5"], "input: 'IN/t5' has the unknown format '(no suffix)'"),
    "folder for input, with a format": (["IN/model", "--input=IN/t5", "--format=csv"], "is a folder; give a file"),
    "unknown format": (["IN/model", "--input=IN/x.docx"], "input: 'IN/x.docx' has the unknown format '.docx'"),
    "unknown --format": (["IN/model", "--format=xml"], "format: 'xml' is not allowed; give"),
    "empty input": (["IN/model", "--input=IN/empty.jsonl"], "IN/empty.jsonl: no rows in it; give at least one"),
    "header alone": (["IN/model", "--input=IN/header.csv"], "IN/header.csv: no rows in it; give at least one"),
    "missing column": (
        ["IN/model", "--text=body"],
        "IN/in.jsonl, line 1: no column 'body'; it has id, text; set text to one of them",
    ),
    "missing default column": (
        ["IN/model", "--input=IN/other.csv"],
        "IN/other.csv: no column text or sentence; it has id, body; set text to one of them",
    ),
    "missing second column": (["IN/model", "--text_pair=b"], "no column 'b'; it has id, text; set text_pair to one of"),
    "one column twice": (["IN/model", "--text=text", "--text_pair=text"], "text_pair: 'text' is text already"),
    "pair in txt": (["IN/model", "--input=IN/x.txt", "--text_pair=b"], "txt holds one text a line and text_pair is"),
    "columns of one name": (
        ["IN/model", "--input=IN/twice.csv"],
        "several columns are called 'id'; rename all but one",
    ),
    "ragged row": (["IN/model", "--input=IN/ragged.csv"], "ragged.csv, line 3: the header has 2 fields and this row"),
    "not UTF-8": (["IN/model", "--input=IN/latin.txt"], "latin.txt, line 1: not UTF-8 text"),
    "damaged compression": (["IN/model", "--input=IN/cut.jsonl.gz"], "cut.jsonl.gz: damaged or not of the format"),
    "no parquet": (["IN/model", "--input=IN/x.parquet"], "x.parquet: damaged or not of the format that its name says"),
    "second column that is the new one": (
        ["IN/model", "--input=IN/new.csv"],
        "prefix: the input has a column 'predicted_label' already; give another prefix",
    ),
    "unknown output": (["IN/model", "--output=IN/out.xlsx"], "output: 'IN/out.xlsx' has the unknown format '.xlsx'"),
    "output over the input": (["IN/model", "--output=IN/in.jsonl"], "output: 'IN/in.jsonl' is the input"),
    "output that is a folder": (["IN/model", "--output=IN/folder.jsonl"], "folder.jsonl' is a folder; give a file"),
    "output below a file": (["IN/model", "--output=IN/x.txt/out.jsonl"], "out.jsonl' can't be written"),
    "output of somebody": (["IN/model", "--output=IN/mine.jsonl"], "mine.jsonl' exists and mine.jsonl.progress.json"),
    "too long": (["IN/model", "--max_length=41"], "max_length: 41 is not allowed; IN/model has 40 positions"),
    "too short": (["IN/model", "--max_length=3"], "max_length: 3 is not allowed; give at least 4"),
    "no rows in a chunk": (["IN/model", "--chunk_rows=0"], "chunk_rows: 0 is not allowed; give at least 1"),
    "no processes": (["IN/model", "--processes=0"], "processes: 0 is not allowed; give at least 1"),
    "precision in words": (["IN/model", "--precision=fp16"], "precision: 'fp16' is not allowed"),
    "unknown option": (["IN/model", "--probability=true"], "probability: no such field; did you mean probabilities?"),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    model = write_model(folder / "model", "SequenceClassification", ("a", "b"))
    write_model(folder / "mlm", "MaskedLM", ("a", "b"))
    for name in ("encoder", "fresh", "reshaped", "bare", "words", "weightless", "problem", "thresholds"):
        shutil.copytree(model, folder / name)
    change_config(folder / "encoder", {"architectures": ["BertModel"]})
    shutil.copy(folder / "mlm" / "model.safetensors", folder / "fresh")
    change_config(
        folder / "reshaped", {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    )
    for path in [*(folder / "bare").glob("*.txt"), *(folder / "bare").glob("tokenizer*")]:
        path.unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "words" / name).unlink()
    with (folder / "words" / "vocab.txt").open("a") as file:
        file.write("".join(f"more{number}\n" for number in range(9)))
    (folder / "weightless" / "model.safetensors").unlink()
    change_config(folder / "problem", {"problem_type": "ranking"})
    change_config(folder / "thresholds", {"thresholds": [0.5]})
    for name in ("t5", "run", "folder.jsonl"):
        (folder / name).mkdir()
    (folder / "t5" / "config.json").write_text('{"model_type": "t5"}')
    (folder / "run" / "config.yaml").write_text("labelled: {text: text}\n")
    row = json.dumps({"id": 1, "text": "a quick fox"}) + "\n"
    texts = {
        "in.jsonl": row, "empty.jsonl": "\n\n", "header.csv": "id,text\n", "other.csv": "id,body\n1,fox\n",
        "x.txt": "fox\n", "x.docx": "fox", "twice.csv": "id,id,text\n1,2,fox\n",
        "x.parquet": "PAR", "ragged.csv": "id,text\n1,fox\n2,a,b\n",
        "new.csv": "text,predicted_label\nfox,a\n", "mine.jsonl": "mine\n",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(row.encode() * 1000)[:-30])
    return folder


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_exit_code_2(
    name: str, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given, message = MISTAKES[name]
    arguments = [argument.replace("IN", str(inputs)) for argument in given]
    defaults = {"--input": str(inputs / "in.jsonl"), "--output": str(tmp_path / "out.jsonl")}
    arguments += [f"{option}={path}" for option, path in defaults.items() if not any(option in a for a in arguments)]
    before = {path: path.stat().st_mtime_ns for path in inputs.rglob("*")}
    with pytest.raises(SystemExit) as ended:
        run_command(dispatch, ["predict", *arguments])
    assert ended.value.code == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1
    assert message.replace("IN", str(inputs)) in captured.err
    assert not list(tmp_path.iterdir())
    assert {path: path.stat().st_mtime_ns for path in inputs.rglob("*")} == before


def test_a_head_without_a_predictor_is_refused(inputs: Path) -> None:
    """Another package's architecture may have one."""
    model = replace(open_folder(str(inputs / "model")), head="ranking")
    with pytest.raises(UserError, match="model has a head for ranking, which can't predict yet; give sequence_classif"):
        predictor_class(model)


@pytest.mark.parametrize("first", [[], ["--local_rank=0"]], ids=["torchrun", "deepspeed"])
def test_ranks_of_a_launcher_are_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], first: list[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    paths = [f"--input={inputs / 'in.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    with pytest.raises(SystemExit) as ended:
        run_command(dispatch, [*first, "predict", str(inputs / "model"), *paths])
    assert ended.value.code == 2
    assert "WORLD_SIZE: 2 ranks of a launcher are not used" in capfd.readouterr().err
