"""`zerobert export --format onnx`: what is written computes what the model computes, and says what it is."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from engine.config import TASKS, LabelledConfig, ModelConfig, RunConfig
from engine.data.loading.loader import evaluation_batches
from engine.errors import UserError
from engine.export import samples_of
from engine.model.folder import is_intact
from engine.model.pretrained import load_pretrained
from engine.model.roundtrip import packed, random_samples
from engine.onnx.folder import GraphWish, complete_folder, export_graph, onnx_folder
from engine.onnx.module import OnnxModule
from engine.onnx.triton import triton_config
from engine.predict.model import open_folder
from engine.predict.options import PredictConfig
from engine.predict.stream import predict_rows
from launch.__main__ import dispatch
from launch.cli import run_command
from tests.onnx.graphs import LABELS, source, write_folder
from tests.predict.models import some_texts, write_rows

CPU = torch.device("cpu")
CLOSE = 1e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("models") / "classifier", "bert", "sequence_classification")
    (folder / "zerobert.json").write_text(json.dumps({"tuned": {"thresholds": {"bad": 0.3}}, "step": 7}))
    return folder


@pytest.fixture(scope="module")
def graph(model: Path) -> Path:
    output = model.parent / "graph"
    rows = write_rows(model.parent / "rows.jsonl", some_texts(20))
    assert dispatch(["export", str(model), "--format=onnx", f"--output={output}", f"--samples={rows}"]) == 0
    return output


def test_its_predictions_are_those_of_the_model(model: Path, graph: Path) -> None:
    texts = some_texts(60)
    rows = [
        list(predict_rows(PredictConfig(str(folder), "-", "-", probabilities=True), texts)) for folder in (model, graph)
    ]
    confidences = [row["predicted_confidence"] for row in rows[0]]
    assert max(confidences) - min(confidences) > 0.01
    for ours, theirs in zip(*rows, strict=True):
        assert ours["predicted_label"] == theirs["predicted_label"]
        for name in LABELS:
            assert abs(ours["predicted_probabilities"][name] - theirs["predicted_probabilities"][name]) < CLOSE


def test_padding_changes_no_logit(graph: Path) -> None:
    folder = open_folder(str(graph))
    module = folder.load(CPU, "fp32")
    samples = random_samples(folder.config)
    together = module(**packed(samples))
    alone = torch.cat([module(**packed([sample])) for sample in samples])
    assert len(samples) > 2
    assert float((together - alone).abs().max()) < CLOSE


def test_a_task_evaluates_a_graph_as_its_model(model: Path, graph: Path, tmp_path: Path) -> None:
    texts = some_texts(40)[7:]  # the first ones are odd
    labels = [LABELS[index % 3] for index in range(len(texts))]
    files = {name: str(write_rows(tmp_path / f"{name}.jsonl", texts, label=labels)) for name in ("train", "validation")}
    labelled = LabelledConfig(**files, text="text", max_length=30)  # type: ignore[arg-type]
    config = RunConfig(task="sequence_classification", model=ModelConfig(init_from=str(model)), labelled=labelled)
    config.validate()
    config.monitor.tensorboard = False
    task = TASKS.get(config.task).load()(config)
    modules = [open_folder(str(folder)).load(CPU, "fp32") for folder in (model, graph)]
    batches = [evaluation_batches(task.evaluation_source("validation"), 0, 1, size, 0) for size in (33, 8)]
    ours, theirs = (task.evaluate(*each).scalars for each in zip(modules, batches, strict=True))
    assert theirs == pytest.approx(ours, rel=1e-5)


def test_the_graph_says_what_it_is(graph: Path) -> None:
    session = onnxruntime.InferenceSession(graph / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(each.name, each.shape) for each in session.get_inputs()] == [
        (name, ["batch", "length"]) for name in ("input_ids", "attention_mask", "token_type_ids")
    ]
    assert [(each.name, each.shape) for each in session.get_outputs()] == [("logits", ["batch", 3])]
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["labels"]) == list(LABELS)
    assert told["head"], told["precision"] == ("sequence_classification", "fp32")
    proto = onnx.load(graph / "model.onnx")
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names)
    assert "bert.encoder.layer.1.attention.self.query/MatMul" in names
    assert sum(node.op_type == "MultiHeadAttention" for node in proto.graph.node) == 3
    assert str(Path.cwd()) not in str(proto)  # the exporter's traces


def test_the_folder_tells_its_origin_and_what_was_compared(graph: Path) -> None:
    origin = json.loads((graph / "zerobert.json").read_text())
    assert is_intact(graph)
    assert (origin["step"], origin["tuned"]) == (7, {"thresholds": {"bad": 0.3}})
    assert origin["onnx"]["of_data"]
    assert origin["onnx"]["samples"] == 20
    assert 0 < origin["onnx"]["differences"]["logits"] < origin["onnx"]["bound"] < 2e-4
    assert origin["onnx"]["bytes"] == (graph / "model.onnx").stat().st_size
    assert (graph / "tokenizer.json").is_file()
    assert not (graph / "model.safetensors").exists()


def test_samples_are_the_first_rows(model: Path, tmp_path: Path) -> None:
    texts = ["the quick brown fox", "a"] * 30
    samples = samples_of(open_folder(str(model)), str(write_rows(tmp_path / "rows.jsonl", texts)))
    assert len(samples) == 32
    assert len(samples[0].ids) > len(samples[1].ids) == 3


def test_a_graph_of_another_model_is_not_written(model: Path, graph: Path, tmp_path: Path) -> None:
    other = source(model)
    with torch.no_grad():
        other.model.classifier.bias[1] += 0.01
    proto = onnx.load(graph / "model.onnx")
    with (
        pytest.raises(UserError, match=r"logits of the ONNX graph differ from ours by .* allowed is 1\.2e-04"),
        onnx_folder(tmp_path / "out") as partial,
    ):
        complete_folder(partial, proto, other, GraphWish())
    assert not list(tmp_path.iterdir())
    with onnx_folder(tmp_path / "out") as partial:
        complete_folder(partial, proto, other, GraphWish(check=False))
    assert json.loads((tmp_path / "out/zerobert.json").read_text())["onnx"]["samples"] == 0


def test_a_model_of_triton(model: Path, graph: Path, tmp_path: Path) -> None:
    proto = onnx.load(graph / "model.onnx")
    with onnx_folder(tmp_path / "sst2") as partial:
        complete_folder(partial, proto, source(model), GraphWish(check=False, triton=True))
    names = {path.name for path in (tmp_path / "sst2").iterdir()}
    assert {"config.pbtxt", "1", "tokenizer.json", "config.json", "zerobert.json"} <= names
    assert (tmp_path / "sst2/1/model.onnx").read_bytes() == proto.SerializeToString()
    written = (tmp_path / "sst2/config.pbtxt").read_text()
    assert written == triton_config(proto)
    assert 'name: "attention_mask" data_type: TYPE_INT64 dims: [ -1 ]' in written
    assert 'name: "logits" data_type: TYPE_FP32 dims: [ 3 ]' in written
    with onnx_folder(tmp_path / "sst2") as partial:  # it is an export, which another one replaces
        complete_folder(partial, proto, source(model), GraphWish(check=False))


MISTAKES: dict[str, tuple[list[str], str]] = {
    "precision of weights": (["IN/model", "--precision=fp16"], "precision: 'fp16' has no effect: format huggingface"),
    "samples of weights": (["IN/model", "--samples=x.csv"], "samples: 'x.csv' has no effect: format huggingface"),
    "merge": (["IN/model", "--format=onnx", "--merge"], "merge: True has no effect: format onnx always merges"),
    "weights of no run": (["IN/model", "--format=onnx", "--weights=best"], "weights: 'best' has no effect"),
    "a graph": (["IN/graph", "--format=onnx"], "is an ONNX folder already; give the model that it was made from"),
    "nothing": (["IN/none", "--format=onnx"], "IN/none: no such folder"),
    "unknown precision": (["IN/model", "--format=onnx", "--precision=int4"], "precision: 'int4' is not allowed"),
    "int8": (
        ["IN/model", "--format=onnx", "--precision=int8"],
        "'int8' is not allowed here; give fp32 or fp16, or let zerobert quantise write the graph",
    ),
    "int8 weights": (["IN/model", "--precision=int8"], "let zerobert quantise write the graph"),
    "unknown format": (["IN/model", "--format=tflite"], "format: 'tflite' is not allowed"),
    "no samples": (["IN/model", "--format=onnx", "--samples=IN/none.csv"], "'IN/none.csv' is no such file"),
    "samples of no text": (["IN/model", "--format=onnx", "--samples=IN/other.csv"], "no column text or sentence"),
    "the model itself": (["IN/model", "--format=onnx", "--output=IN/model"], "'IN/model' is the model itself; give"),
    "output of somebody": (["IN/model", "--format=onnx", "--output=IN/mine"], "mine: it exists and is not an exported"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_exit_code_2(
    name: str, model: Path, graph: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").symlink_to(model)
    (tmp_path / "graph").symlink_to(graph)
    (tmp_path / "other.csv").write_text("id,body\n1,fox\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    given, message = MISTAKES[name]
    arguments = [argument.replace("IN", str(tmp_path)) for argument in given]
    arguments += [] if any("--output" in each for each in arguments) else [f"--output={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as ended:
        run_command(dispatch, ["export", *arguments])
    assert ended.value.code == 2
    said = capfd.readouterr().err
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert message.replace("IN", str(tmp_path)) in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_package_that_is_missing_is_named(
    model: Path, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnxruntime, which is not installed; pip install 'zerobert\[onnx\]'"):
        open_folder(str(graph)).load(CPU, "fp32")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"a graph needs the package onnx.*, which is not installed; pip install"):
        export_graph(source(model), tmp_path / "out", GraphWish())


def test_damaged_and_foreign_graphs_are_refused(model: Path, graph: Path, tmp_path: Path) -> None:
    shutil.copytree(graph, tmp_path / "damaged")
    content = (graph / "model.onnx").read_bytes()
    (tmp_path / "damaged/model.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"damaged/model\.onnx: onnxruntime can't open it"):
        open_folder(str(tmp_path / "damaged")).load(CPU, "fp32")
    with pytest.raises(
        UserError, match="it holds an ONNX graph, which can't be trained; give the model that it was made"
    ):
        load_pretrained(source(model).model, graph)
    folder = open_folder(str(graph))
    with pytest.raises(UserError, match=r"outputs logits and a model for question_answering has start_logits"):
        replace(folder, head="question_answering").load(CPU, "fp32")
    with pytest.raises(UserError, match="precision: 'bf16' has no effect"):
        folder.load(CPU, "bf16")


HEADS = ("sequence_classification", "token_classification", "question_answering", "multiple_choice", "embeddings")
CASES = [("bert", head) for head in HEADS[1:]]
CASES += [("roberta", HEADS[0]), ("roberta", HEADS[4]), *(("modernbert", head) for head in HEADS)]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "head"), CASES)
def test_every_architecture_and_head(kind: str, head: str, tmp_path: Path) -> None:
    own = source(write_folder(tmp_path / "model", kind, head, pooling="cls" if kind == "roberta" else "mean"))
    found = export_graph(own, tmp_path / "graph", GraphWish())
    assert found.batches == 4 + 1 if kind == "bert" else found.batches > 3
    module = open_folder(str(tmp_path / "graph")).load(CPU, "fp32")
    assert isinstance(module, OnnxModule)
    assert ("token_type_ids" in {each.name for each in module.session.get_inputs()}) is (kind == "bert")
    batch = packed(random_samples(own.config))
    if head in ("token_classification", "question_answering"):
        read = torch.arange(0, len(batch["input_ids"]), 7)
        assert torch.equal(module(**batch, read=read), module(**batch)[read])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_fp16_has_its_own_bound(kind: str, tmp_path: Path) -> None:
    own = source(write_folder(tmp_path / "model", kind, "sequence_classification"))
    found = export_graph(own, tmp_path / "graph", GraphWish("fp16"))
    assert 2e-4 < found.differences["logits"] < found.bound
    proto = onnx.load(tmp_path / "graph/model.onnx")
    kinds = {each.data_type for each in proto.graph.initializer if np.prod(each.dims) > 64}
    assert onnx.TensorProto.FLOAT not in kinds
