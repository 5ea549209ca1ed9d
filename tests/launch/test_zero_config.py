"""The resolved DeepSpeed dict: nothing left open, batch identity, and the presets beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.config import RunConfig, TrainConfig
from engine.data.loader import resolve_layout
from engine.errors import UserError
from launch.presets import FOLDER, PRESETS, preset, render
from launch.zero_config import check_hardware, deepspeed_config
from tests.train.runs import losses, run


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_nothing_is_auto_and_the_batch_multiplies_out(ranks: int, stage: int, precision: str) -> None:
    train = TrainConfig(global_batch=48, zero_stage=stage, precision=precision)  # type: ignore[arg-type]
    built = deepspeed_config(RunConfig(train=train), resolve_layout(48, None, ranks), "cuda")
    assert "auto" not in json.dumps(built)
    micro, accumulation = built["train_micro_batch_size_per_gpu"], built["gradient_accumulation_steps"]
    assert micro * accumulation * ranks == built["train_batch_size"] == 48
    assert built["zero_optimization"]["stage"] == stage
    assert {"bf16", "fp16"} & built.keys() == ({precision} - {"fp32"})


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"train\.precision: 'fp16' needs a GPU"):
        check_hardware(TrainConfig(precision="fp16"), "cpu")
    check_hardware(TrainConfig(precision="fp16"), "cuda")


def test_the_files_are_what_the_builder_makes() -> None:
    assert {path.stem: path.read_text() for path in FOLDER.glob("*.json")} == {name: render(name) for name in PRESETS}


def test_the_debug_preset_is_what_a_run_on_two_cpu_ranks_gets(store: Path, tmp_path: Path) -> None:
    run(tmp_path, f"--data.path={store}", "--train.steps=1", launcher="deepspeed", ranks=2)
    assert len(losses(tmp_path)) == 1
    assert json.loads((tmp_path / "deepspeed.json").read_text()) == preset("cpu_debug")
