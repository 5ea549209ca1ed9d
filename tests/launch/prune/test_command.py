"""`zerobert prune` as a user gives it: what it writes and tells, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers
import yaml

from engine.compress.folder import open_source
from engine.compress.prune.compact import zeros
from engine.errors import UserError
from engine.model.folder import read_origin
from launch.prune.command import build_parser, run


def prune(classifier: Path, *given: str, data: bool = True, more: tuple[str, ...] = ()) -> list[str]:
    about_data = ("--labelled.text=text", "--labelled.max_length=30", *more) if data else more
    files = (f"--data={classifier.parent}/train.jsonl",) if data else ()
    return run(build_parser().parse_args([str(classifier), *files, *given]), list(about_data))


def test_an_even_target_makes_the_folder_smaller(classifier: Path, tmp_path: Path) -> None:
    output = tmp_path / "small"
    lines = prune(classifier, "--target=neurons 0.7", "--even", "--samples=16", f"--output={output}")
    assert lines[0].startswith("heads: ")
    assert any(line.startswith("FLOPs of the layers: 0.") for line in lines)
    assert any(line.startswith("accuracy: 0.") and "95 % between" in line for line in lines)
    config = transformers.AutoConfig.from_pretrained(output)
    assert config.intermediate_size == 32
    model = transformers.AutoModelForSequenceClassification.from_pretrained(output)
    assert model.bert.encoder.layer[0].intermediate.dense.out_features == config.intermediate_size
    origin = read_origin(output)
    assert origin is not None
    assert origin["pruned"]["target"] == "neurons 0.7"
    assert origin["round_trip"] is not None


def test_uneven_layers_hold_zeros_which_a_second_call_leaves(classifier: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    prune(classifier, "--target=heads 0.5, neurons 0.7", "--samples=16", "--tune=mask", f"--output={first}")
    empty = zeros(open_source(str(first)).load())
    assert empty["heads"] == (4, 2)
    lines = prune(first, f"--output={second}", data=False)
    assert "zeros that exports to ONNX take out: 2 of 4 heads" in lines[0]
    assert (second / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_a_run_brings_its_own_data(classifier: Path, tmp_path: Path) -> None:
    folder, data = tmp_path / "run", classifier.parent
    shutil.copytree(classifier, folder / "export")
    files = {"train": f"{data}/train.jsonl", "test": f"{data}/dev.jsonl", "text": "text", "max_length": 30}
    values = {
        "task": "sequence_classification",
        "output": str(folder),
        "labelled": files,
        "regularise": {"r_drop": 1.0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    lines = prune(folder, "--target=flops 0.8", "--samples=8", f"--output={tmp_path / 'small'}", data=False)
    assert any(line.endswith("; 24 examples)") for line in lines)


def test_layers_are_dropped_without_data(classifier: Path, tmp_path: Path) -> None:
    lines = prune(classifier, "--keep_layers=1", f"--output={tmp_path / 'one'}", data=False)
    assert lines[0] == "layers: 0 of 2 kept"
    lines = prune(classifier, "--layers=1", f"--output={tmp_path / 'other'}", data=False)
    assert lines[0] == "layers: 1 of 2 kept"
    assert json.loads((tmp_path / "other" / "config.json").read_text())["num_hidden_layers"] == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--target=fast"], "target: 'fast' is not allowed; give speed 2x"),
        (["--target=flops 0.5", "--samples=0"], "samples: 0 is not allowed"),
        (["--target=speed 2x", "--threads=0"], "threads: 0 is not allowed"),
        (["--target=speed 2x", "--latency_batch=0"], "latency_batch: 0 is not allowed"),
        (
            ["--target=speed 2x", "--samples=8", "--latency_length=41"],
            "latency_length: 41 is not allowed; the model has 40",
        ),
        (["--target=size 0.01MB"], "target: size 0.01MB is out of reach; with one head and 16 neurons a layer"),
        (["--even"], "even: True has no effect without --target"),
        (["--samples=7"], "samples: 7 has no effect without --target"),
        (["--layers=0,0"], "layers: '0,0' is not allowed; the model has layers 0 to 1"),
        (["--layers=5"], "layers: '5' is not allowed"),
        (["--layers=first"], "layers: 'first' is not allowed; give numbers such as 0,2,4"),
        (["--keep_layers=3"], "keep_layers: 3 is not allowed; the model has 2"),
        (["--keep_layers=1", "--layers=0"], "keep_layers: 1 is given beside layers"),
        (["--output=."], r"output: '\.' is not allowed"),
    ],
)
def test_wrong_options_are_refused(classifier: Path, tmp_path: Path, given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        prune(classifier, f"--output={tmp_path / 'out'}", *given)
    assert not (tmp_path / "out").exists()


def test_wrong_models_and_data_are_refused(classifier: Path, tmp_path: Path) -> None:
    output, train = f"--output={tmp_path / 'out'}", classifier.parent / "train.jsonl"
    with pytest.raises(UserError, match=r"^data: not given, and .* is no run"):
        prune(classifier, "--target=flops 0.5", output, data=False)
    with pytest.raises(UserError, match=r"^--labelled.text=text: without --data or --target no data are read"):
        prune(classifier, "--keep_layers=1", output, data=False, more=("--labelled.text=text",))
    with pytest.raises(UserError, match=r"^output: .* is the model itself"):
        prune(classifier, "--keep_layers=1", f"--output={classifier}", data=False)
    other = tmp_path / "other.jsonl"
    other.write_text(train.read_text().replace('"label": "b"', '"label": "c"'))
    with pytest.raises(UserError, match=r"^data: its classes are a, c and the model's a, b"):
        run(
            build_parser().parse_args([str(classifier), f"--data={other}", "--target=flops 0.5", output]),
            ["--labelled.text=text", "--labelled.max_length=30"],
        )
    broken = tmp_path / "broken"
    shutil.copytree(classifier, broken)
    (broken / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForNothing"]}))
    with pytest.raises(UserError, match="names 'BertForNothing' in architectures; give a model of"):
        prune(broken, "--keep_layers=1", output, data=False)
    with pytest.raises(UserError, match="no such folder"):
        prune(tmp_path / "nowhere", "--keep_layers=1", output, data=False)
