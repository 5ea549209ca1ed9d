"""`zerobert compress` as a user gives it: what it writes, that it goes on, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from engine.compress.quantise import quantise as quantising
from engine.compress.score import score
from engine.errors import UserError
from engine.predict.model import open_folder
from launch.__main__ import dispatch
from launch.api import predict
from launch.cli import run_command


@pytest.fixture(scope="module")
def run(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with an export."""
    folder, data = tmp_path_factory.mktemp("compress") / "run", classifier.parent
    shutil.copytree(classifier, folder / "export")
    files = {"train": f"{data}/train.jsonl", "test": f"{data}/dev.jsonl", "text": "text", "max_length": 30}
    values = {"task": "sequence_classification", "output": str(folder), "labelled": files}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def compress(run: Path, *given: str) -> int:
    return dispatch(["compress", str(run), *given])


@pytest.mark.slow
def test_roads_are_tried_and_gone_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[object] = []
    monkeypatch.setattr(quantising, "score", lambda task, model: scored.append(model) or score(task, model))
    out, room = tmp_path / "fast", tmp_path / "fast.candidates"
    training = ("--train.steps=2", "--train.epochs=null", "--train.global_batch=8", "--train.eval_interval=0")
    asked = ("--target=accuracy -60", f"--output={out}", "--speeds=1.02,50", "--students=1", "--samples=16")
    more = ("--calibration=8", "--", *training, "--labelled.max_length=30")
    assert compress(run, *asked, *more) == 0
    report = json.loads((room / "report.json").read_text())
    names = ["whole", "pruned 1.02x", "1 layers, distilled"]
    assert [each["name"] for each in report["candidates"]] == [f"{n}{kind}" for n in names for kind in ("", ", int8")]
    assert report["target"]["met"]
    assert len(scored) == 3  # the int8 graphs alone: the scores of the float ones are known
    assert [each.split(":")[0] for each in report["left_out"]] == ["pruned 50x"]
    assert (room / "front.png").stat().st_size > 5000
    assert open_folder(str(out)).is_onnx
    (told,) = predict(out, [{"text": "good film"}])
    assert told["predicted_label"] in ("a", "b")
    made = {path: path.stat().st_mtime_ns for path in room.glob("*/model.onnx")}
    assert len(made) == 6
    capsys.readouterr()
    assert compress(run, *asked, *more) == 0
    assert {path: path.stat().st_mtime_ns for path in room.glob("*/model.onnx")} == made
    assert compress(run, "--target=latency 1000x, accuracy -60", *asked[1:], *more) == 1
    assert "the target is missed" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        run_command(dispatch, ["compress", str(run), *asked[:-1], "--samples=17", *more])
    assert ended.value.code == 2
    assert "holds candidates of another model or other options; remove it" in capsys.readouterr().err


MISTAKES: dict[str, tuple[list[str], str]] = {
    "wish": (["--target=fast"], "target: 'fast' is not allowed"),
    "output": (["--target=latency 2x", "--output=."], "output: '.' is not allowed"),
    "speeds": (["--target=latency 2x", "--speeds=0.5"], "speeds: '0.5' is not allowed; give numbers above 1"),
    "speed": (["--target=latency 2x", "--speeds=fast"], "speeds: 'fast' is not allowed; give numbers above 1"),
    "endless speed": (["--target=latency 2x", "--speeds=2,inf"], "speeds: '2,inf' is not allowed"),
    "half a layer": (["--target=latency 2x", "--students=1.5"], "students: '1.5' is not allowed; give whole numbers"),
    "no layer": (["--target=latency 2x", "--students=0"], "students: '0' is not allowed; give numbers of layers"),
    "all layers": (["--target=latency 2x", "--students=2"], "students: 2 layers are not fewer than the model's"),
    "time": (["--target=latency 2x", "--minutes=0"], "minutes: 0.0 is not allowed; give a positive number"),
    "samples": (["--target=latency 2x", "--samples=0"], "samples: 0 is not allowed"),
    "calibration": (["--target=latency 2x", "--calibration=2"], "calibration: 2 is not allowed; give at least 8"),
    "threads": (["--target=latency 2x", "--threads=0"], "threads: 0 is not allowed"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(run: Path, tmp_path: Path, mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    given, told = MISTAKES[mistake]
    output = [] if any(each.startswith("--output") for each in given) else [f"--output={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as ended:
        run_command(dispatch, ["compress", str(run), *given, *output])
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert told in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_graph_is_no_model_to_compress(classifier: Path, tmp_path: Path) -> None:
    shutil.copytree(classifier, tmp_path / "graph")
    (tmp_path / "graph" / "model.safetensors").unlink()
    (tmp_path / "graph" / "model.onnx").touch()
    data = f"--data={classifier.parent}/train.jsonl"
    with pytest.raises(UserError, match=r"^model: .* is an ONNX folder already; give the model that it was made from"):
        dispatch(["compress", str(tmp_path / "graph"), data, "--target=latency 2x", f"--output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_students_and_scores_need_a_run(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, out = f"--data={classifier.parent}/train.jsonl", f"--output={tmp_path / 'out'}"
    for given, told in (
        ([], f"data: not given, and '{classifier}' is no run"),
        ([train, "--students=1"], "students: '1' need the run that trained"),
    ):
        with pytest.raises(SystemExit) as ended:
            run_command(dispatch, ["compress", str(classifier), "--target=latency 2x", out, *given])
        assert ended.value.code == 2
        assert told in capsys.readouterr().err
