"""Means of exports: the mean is written, opens in transformers and in predict, and unlike models are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from engine.errors import UserError
from engine.model.folder import described, export_huggingface, tokenizer_files
from engine.predict.model import open_folder
from launch.__main__ import dispatch
from launch.average import average
from tests.tasks.labels import maker


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three classifiers whose weights differ, exported."""
    folder = tmp_path_factory.mktemp("average")
    task = maker(folder)("sequence_classification")
    found = []
    for seed in range(3):
        task.config.seed = seed
        model = task.build_model()
        with torch.no_grad():
            for p in model.parameters():
                p += 0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        config = described(task.model_config, task.export_class(task.model_config))
        files = tokenizer_files(Path(task.config.model.init_from or ""))
        found.append(folder / f"seed-{seed}" / "export")
        origin = {"facts": {"classes": list(task.names or ()), "seed": str(seed)}, "tuned": {}}
        export_huggingface(model.state_dict(), config, files, found[-1], origin, check=False)
    return found


def test_the_mean_is_written_and_opens(exports: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "soup"
    assert dispatch(["average", *map(str, exports), f"--output={out}"]) == 0
    told = capsys.readouterr().out
    assert "averaged 3 models" in told
    assert "\nchecked: " in told
    assert "checked: nothing" not in told
    assert "note: the mean of several runs is good only if they end in one basin" in told
    weights = [load_file(folder / "model.safetensors") for folder in exports]
    written = load_file(out / "model.safetensors")
    assert written.keys() == weights[0].keys()
    for name, mean in written.items():
        torch.testing.assert_close(mean, torch.stack([each[name] for each in weights]).mean(0), rtol=1e-6, atol=1e-8)
    origin = json.loads((out / "zerobert.json").read_text())
    assert origin["averaged"] == [str(folder) for folder in exports]
    assert list(origin["facts"]) == ["classes"], "what differs is not told"
    theirs = AutoModelForSequenceClassification.from_pretrained(out)
    assert theirs.config.label2id == AutoModelForSequenceClassification.from_pretrained(exports[0]).config.label2id
    assert open_folder(str(out)) is not None


def test_a_run_stands_for_its_export(exports: list[Path], tmp_path: Path) -> None:
    average([exports[0], exports[1]], tmp_path / "exports", None, False)
    average([exports[0].parent, exports[1].parent], tmp_path / "runs", None, False)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("exports", "runs"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def config_with(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def other_words(folder: Path) -> None:
    (folder / "vocab.txt").write_text((folder / "vocab.txt").read_text().replace("film", "book"))


def adapters(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")


UNLIKE: dict[str, tuple[Callable[[Path], None], str]] = {
    "classes": (config_with(id2label={"0": "a", "1": "b", "2": "c", "3": "d"}), "folders: id2label of "),
    "width": (config_with(intermediate_size=64), "folders: intermediate_size of "),
    "vocabulary": (other_words, "folders: vocab.txt of "),
    "weights cut": (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), "cannot be read"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is no model of ours"),
    "nothing there": (lambda folder: shutil.rmtree(folder), "is no model of ours"),
    "adapters": (adapters, "holds only the part of a model that was trained; give whole models"),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_unlike_models_are_refused(exports: list[Path], tmp_path: Path, what: str) -> None:
    edit, said = UNLIKE[what]
    shutil.copytree(exports[1], tmp_path / "other")
    edit(tmp_path / "other")
    with pytest.raises(UserError) as found:
        average([exports[0], tmp_path / "other"], tmp_path / "out", None, True)
    assert said in str(found.value)
    assert "\n" not in str(found.value)
    assert not (tmp_path / "out").exists()


def test_what_is_no_mean_is_refused(exports: list[Path], tmp_path: Path) -> None:
    out, run = tmp_path / "out", exports[0].parent
    mistakes: list[tuple[list[Path], Path, int | None, str]] = [
        ([exports[0]], out, None, "is one alone; give two or more"),
        ([exports[0], exports[0]], out, None, "is given twice"),
        ([run], out, 1, "last: 1 is not allowed; give at least 2"),
        ([run], out, 2, "has 0 checkpoints (train.keep says how many stay"),
        (exports[:2], out, 2, "it takes one run and 2 folders are given"),
        (exports[:2], Path(), None, "output: '.' is not allowed"),
    ]
    for folders, output, last, said in mistakes:
        with pytest.raises(UserError) as found:
            average(folders, output, last, True)
        assert said in str(found.value)
