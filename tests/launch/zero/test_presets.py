"""The presets: files as the builder makes them, each used by a recipe, and each really trained with."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from benchmarks.presets import BATCH, main, rewritten
from engine.config import ModelConfig, RunConfig
from launch.configure.options import parse
from launch.forecast.hardware import GIB
from launch.forecast.memory import Workload, forecast, shape_of
from launch.zero.build import deepspeed_config
from launch.zero.presets import FOLDER, PRESETS, layout, preset, render
from tests.conftest import ROOT
from tests.train.runs import can_swap, environment, losses, run

RECIPES = ROOT / "launch" / "recipes"
#: what a machine without a GPU can't do, and the line that says so
REFUSED = {"zero2_fp16": "train.precision: 'fp16' needs a GPU"}


def recipe(name: str) -> RunConfig:
    path = RECIPES / f"{name}.yaml"
    needs = ["--model.init_from=model", "--labelled.train=train.csv"] if "finetune" in name else []
    return parse(["--config", str(path), *needs])


def test_the_files_are_what_the_builder_makes() -> None:
    assert {path.stem: path.read_text() for path in FOLDER.glob("*.json")} == {name: render(name) for name in PRESETS}


@pytest.mark.parametrize("name", PRESETS)
def test_a_recipe_trains_as_the_preset_says(name: str) -> None:
    """The recipe names ZeRO's stage, precision and offload; batch and model may be others."""
    one = PRESETS[name]
    config = recipe(one.recipe)
    built, file = deepspeed_config(config, layout(one), one.accelerator), preset(name)
    assert isinstance(built["zero_optimization"], dict)
    for key in ("zero_optimization", "bf16", "fp16", "data_types", "zero_force_ds_cpu_optimizer", "gradient_clipping"):
        assert built.get(key) == file.get(key), key


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name].accelerator != "cpu"])
def test_a_presets_micro_batch_fits_a_gpu_of_80_gib(name: str) -> None:
    one = PRESETS[name]
    work = Workload(
        shape_of(ModelConfig(size=one.size), 30522), 128, layout(one).micro_batch, one.stage, one.ranks, one.ranks,
        one.precision, offload_optimizer=one.zero.offload_optimizer, offload_parameters=one.zero.offload_parameters,
    )  # fmt: skip
    assert forecast(work).total <= 80 * GIB


@pytest.mark.parametrize("path", sorted(RECIPES.glob("[!l]*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid_and_introduces_itself(path: Path) -> None:
    assert path.read_text().startswith("# ")
    given = yaml.safe_load(path.read_text())
    assert recipe(path.stem).output == given["output"]


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in REFUSED])
def test_a_preset_can_be_a_runs_own_file(name: str) -> None:
    """What the file says comes out again where its number of ranks is met."""
    one = PRESETS[name]
    config = parse([f"--deepspeed_config={FOLDER / name}.json"])
    built = deepspeed_config(config, layout(one), one.accelerator)
    assert built == preset(name)


def test_only_batch_sizes_and_the_nvme_folder_are_rewritten(tmp_path: Path) -> None:
    before = preset("zero3_nvme")
    after = rewritten(before, tmp_path)
    assert {key for key in before if before[key] != after[key]} == {*BATCH, "zero_optimization"}
    text = json.dumps(before["zero_optimization"]).replace("/nvme", str(tmp_path))
    assert json.dumps(after["zero_optimization"]) == text


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"zero9\.json is not there"):
        main(["zero9"])


@pytest.mark.slow
def test_the_debug_preset_is_what_a_run_on_two_cpu_ranks_gets(store: Path, tmp_path: Path) -> None:
    tiny = ["--model.hidden_size=128", "--model.max_positions=512"]
    run(tmp_path, f"--data.path={store}", "--train.steps=1", *tiny, launcher="deepspeed", ranks=2)
    assert len(losses(tmp_path)) == 1
    assert json.loads((tmp_path / "deepspeed.json").read_text()) == preset("cpu_debug")
    reasons = json.loads((tmp_path / "deepspeed_reasons.json").read_text())
    assert reasons["zero_optimization.overlap_comm"] == "CPU ranks have nothing to overlap with"


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_preset_trains_or_says_why_not() -> None:
    command = [sys.executable, "-m", "benchmarks.presets"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line.split(".json")[0]: line for line in done.stdout.splitlines() if ".json" in line.split(" ")[0]}
    assert rows.keys() == PRESETS.keys()
    refused = REFUSED if can_swap() else REFUSED | {"zero3_nvme": "zero.offload_optimizer: 'nvme' needs"}
    for name, row in rows.items():
        if name in refused:
            assert f"refused: {refused[name]}" in row
        else:
            assert re.search(r" \d\.\d{4} +[\d.]+ s  trained 5 steps$", row), row
