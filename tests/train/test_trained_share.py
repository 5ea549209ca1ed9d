"""The start of a run tells which share of the weights is trained, under ZeRO too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.config import AdapterConfig, architecture_of
from engine.model.adapters.trained import Trained
from engine.model.pretrained import load_config
from tests.tasks.test_labels import ROWS, write
from tests.tasks.tiny import tiny_bert
from tests.train.runs import run


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_the_start_tells_what_is_trained(tmp_path: Path, stage: int) -> None:
    tiny_bert(tmp_path / "bert")
    write(tmp_path / "train.jsonl", ROWS["regression"](40, 1))
    options = [
        "--task=regression", f"--model.init_from={tmp_path / 'bert'}", f"--labelled.train={tmp_path / 'train.jsonl'}",
        "--labelled.max_length=14", "--train.steps=1", f"--train.zero_stage={stage}", "--train.save_interval=null",
    ]  # fmt: skip
    printed = run(tmp_path / "run", *options, "--adapter.method=lora", "--adapter.rank=2")
    told = json.loads((tmp_path / "run" / "trained.json").read_text())
    config = load_config(tmp_path / "bert")
    kind = architecture_of(config)
    trained = Trained(kind.shape_of(config), AdapterConfig(method="lora", rank=2), None, kind)
    assert told["parts"]["adapters"] == sum(trained.added())
    assert told["trained"] == sum(told["parts"].values())
    share = told["trained"] / (told["base"] + told["parts"]["adapters"])
    assert f"({share:.2%}): adapters {told['parts']['adapters']:,}, " in printed
