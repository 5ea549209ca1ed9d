"""`zerobert quantise`: an int8 folder that predicts, its report, and a user's mistakes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from transformers import BertConfig

from engine.model.folder import INT8_REPORT, is_intact, read_origin, write_origin
from engine.onnx.folder import onnx_folder
from engine.predict.model import open_folder
from launch.__main__ import dispatch
from launch.api import predict
from launch.cli import run_command
from tests.compress.quantise import graphs
from tests.predict.models import write_model
from tests.tasks.labels import write
from tests.tasks.tiny import WORDS as TOKENS
from tests.tasks.tiny import save_tokenizer

ROWS, CLASSES = 400, ("a", "b", "c", "d")
WORDS = ("good", "bad", "film", "a", "the", "was")


def texts(count: int, seed: int) -> list[str]:
    """All of as many words, so that none is padded."""
    return [" ".join(words) for words in np.random.default_rng(seed).choice(WORDS, (count, 6))]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier as an ONNX folder, and texts whose labels are what it says."""
    folder = tmp_path_factory.mktemp("quantise")
    graph = folder / "onnx"
    graph.mkdir()
    names = dict(enumerate(CLASSES))
    config = BertConfig(vocab_size=len(TOKENS), hidden_size=16, num_attention_heads=2, max_position_embeddings=16)
    config.id2label, config.architectures = names, ["BertForSequenceClassification"]
    config.to_json_file(graph / "config.json")
    save_tokenizer(graph)
    model = graphs.chain(3)
    model.metadata_props.add(key="precision", value="fp32")
    onnx.save(model, graph / "model.onnx")
    write_origin(graph, {}, None)
    shutil.copytree(graph, folder / "int8")
    model.metadata_props[0].value = "int8"
    onnx.save(model, folder / "int8" / "model.onnx")
    rows = labelled(graph, texts(ROWS, 5))
    write(folder / "rows.jsonl", rows)
    write(folder / "few.jsonl", [row for name in CLASSES for row in [r for r in rows if r["label"] == name][:10]])
    write(folder / "other.jsonl", [{"sentence": text, "label": f"no {text[0]}"} for text in texts(60, 7)])
    return folder


def labelled(model: Path, sentences: list[str]) -> list[dict[str, Any]]:
    """The texts with what a model says of them."""
    told = predict(model, [{"sentence": text} for text in sentences], text="sentence")
    return [{"sentence": row["sentence"], "label": row["predicted_label"]} for row in told]


def quantise(inputs: Path, *arguments: str) -> int:
    return dispatch(["quantise", *(argument.replace("IN", str(inputs)) for argument in arguments)])


FILE = ("--data=IN/rows.jsonl", "--", "--labelled.max_length=14")


def test_an_int8_folder_predicts_and_tells_what_it_lost(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "int8"
    assert quantise(inputs, "IN/onnx", f"--output={out}", "--samples=16", "--budget=5", *FILE) == 0
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    assert "on 400 examples" in printed
    report = json.loads((out / INT8_REPORT).read_text())
    assert report["after"]["value"] - report["before"]["value"] == pytest.approx(report["change"]["value"])
    assert report["change"]["interval_95"][0] >= -0.05
    assert {"1", "32"} == report["milliseconds"].keys()
    assert report["bytes"]["int8"] == (out / "model.onnx").stat().st_size
    assert {each.key: each.value for each in onnx.load(out / "model.onnx").metadata_props}["precision"] == "int8"
    assert read_origin(out)["onnx"]["precision"] == "int8"  # type: ignore[index]
    assert is_intact(out)
    rows = [json.loads(line) for line in (inputs / "rows.jsonl").read_text().splitlines()]
    told = labelled(out, [row["sentence"] for row in rows])
    assert np.mean([one == other for one, other in zip(told, rows, strict=True)]) == report["after"]["value"]
    assert report["before"]["value"] == 1.0
    with onnx_folder(out) as partial:  # it is an export, which another one replaces
        shutil.copytree(inputs / "onnx", partial, dirs_exist_ok=True)
    assert not (out / INT8_REPORT).exists()


@pytest.mark.slow
def test_a_folder_of_weights_is_exported_first(inputs: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "model", "SequenceClassification", CLASSES)
    out, samples = tmp_path / "int8", ("--samples=8", "--certain=false", "--budget=100")
    assert quantise(inputs, str(tmp_path / "model"), f"--output={out}", "--method=dynamic", *samples, *FILE) == 0
    assert open_folder(str(out)).is_onnx
    assert not open_folder(str(tmp_path / "model")).is_onnx


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no data": (["IN/onnx"], "data: not given, and 'IN/onnx' is no run; give the run that it is of, or a labelled"),
    "data that isn't there": (["IN/onnx", "--data=IN/none"], "data: 'IN/none' is neither a run's folder nor a file"),
    "no model": (["IN/none", "--data=IN/rows.jsonl"], "IN/none: no such folder"),
    "unknown method": (["IN/onnx", "--data=IN/rows.jsonl", "--method=int4"], "method: 'int4' is not allowed"),
    "no budget": (["IN/onnx", "--data=IN/rows.jsonl", "--budget=0"], "budget: 0.0 is not allowed; give points in"),
    "too few samples": (["IN/onnx", "--data=IN/rows.jsonl", "--samples=2"], "samples: 2 is not allowed; give a whole"),
    "no thread": (["IN/onnx", "--data=IN/rows.jsonl", "--threads=0"], "threads: 0 is not allowed; give at least 1"),
    "unknown option": (["IN/onnx", "--data=IN/rows.jsonl", "--bits=4"], "bits: no such field"),
    "too few examples": (
        ["IN/onnx", "--data=IN/few.jsonl"],
        "examples can't tell a loss of so little from none; give more examples",
    ),
    "other classes": (["IN/onnx", "--data=IN/other.jsonl"], "data: its classes are no a, no b, no f, no g, no t"),
    "int8 already": (["IN/int8", "--data=IN/rows.jsonl"], "model: 'IN/int8' is of precision int8; give the fp32"),
    "output in use": (
        ["IN/onnx", "--data=IN/rows.jsonl", "--output=IN"],
        "it exists and is not an exported model alone",
    ),
    "the model itself": (["IN/onnx", "--data=IN/rows.jsonl", "--output=IN/onnx"], "'IN/onnx' is the model itself"),
    "wrong option of training": (
        ["IN/onnx", "--data=IN/rows.jsonl", "--", "--labelled.text=body", "--labelled.max_length=14"],
        "no column 'body'",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_exit_code_2(
    name: str, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given, message = MISTAKES[name]
    own = [argument.replace("IN", str(inputs)) for argument in given]
    if not any(argument.startswith("--output") for argument in own):
        own.insert(1, f"--output={tmp_path / 'out'}")
    rest = [] if "--" in own else ["--", "--labelled.max_length=14"]
    with pytest.raises(SystemExit) as ended:
        run_command(dispatch, ["quantise", *own, *rest])
    assert ended.value.code == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert message.replace("IN", str(inputs)) in told[0]
    assert not list(tmp_path.iterdir())
