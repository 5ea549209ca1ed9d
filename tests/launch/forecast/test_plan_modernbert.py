"""`zerobert plan` of ModernBERT: what it prints is a run that trains, and a folder's own windows count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ModernBertConfig

from engine.config import ModelConfig, architecture_of
from engine.model.build import build_config
from engine.model.modernbert.models import ModernBertForMaskedLM
from launch.configure.options import parse
from launch.configure.start_model import folder_config, with_folder
from launch.forecast.command import main
from launch.forecast.memory import shape_of
from tests.conftest import ROOT
from tests.launch.forecast.test_plan import plan

RECIPES = ROOT / "launch" / "recipes"
GPUS = ["--gpus=8", "--gpu=h100"]


def printed_run(capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    """The run that a plan's last command means."""
    assert main([*options, *GPUS]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("launch/train.py ")]
    return parse(line.split()[1:])


def test_a_plan_without_a_recipe_names_architecture_and_objective(capsys: pytest.CaptureFixture[str]) -> None:
    run = printed_run(capsys, "--model=modernbert-base", "--sequence-length=1024")
    assert (run.model.architecture, run.model.size, run.data.objective) == ("modernbert", "base", "mlm")
    assert (run.data.sequence_length, run.model.positions) == (1024, 8192)
    bert = printed_run(capsys, "--model=bert-base")
    assert (bert.model.fresh_architecture, bert.data.objective) == ("bert", "mlm_nsp")


def test_a_recipe_of_pairs_is_planned_for_modernbert_on_mlm_alone(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = f"--config={RECIPES / 'pretrain_base_phase1.yaml'}"
    run = printed_run(capsys, recipe, "--model=modernbert-base")
    assert (run.model.architecture, run.data.objective, run.train.global_batch) == ("modernbert", "mlm", 256)


def test_fine_tuning_keeps_its_objective_out_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--config={RECIPES / 'finetune.yaml'}", "--model=modernbert-base", *GPUS]) == 0
    assert "--data.objective" not in capsys.readouterr().out


@pytest.mark.parametrize("size", ["tiny", "base", "large"])
def test_the_parameters_are_those_of_the_real_model(capsys: pytest.CaptureFixture[str], size: str) -> None:
    """Base and large have 149 and 395 million over their own vocabulary (Warner et al. 2024)."""
    main([f"--model=modernbert-{size}", "--vocabulary=50368", *GPUS])
    told = float(capsys.readouterr().out.split()[0])
    with torch.device("meta"):
        model = ModernBertForMaskedLM(build_config(ModelConfig(size, "modernbert"), 50368))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert told == pytest.approx(count / 1e6, abs=0.06)
    assert {"base": 149.7, "large": 395.9}.get(size, told) == told


@pytest.mark.parametrize("recipe", ["pretrain_modernbert_base", "pretrain_modernbert_base_long"])
def test_the_recipes_fit_eight_gpus_in_the_memory_of_their_tokens(
    capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    """Both have 16,384 tokens in a micro-batch, and flash attention keeps nothing that grows with their length."""
    found = plan(capsys, f"--config={RECIPES / recipe}.yaml", *GPUS)
    assert found["recipe"]["fits"]
    assert found["request"]["sequence_length"] * found["recipe"]["micro_batch"] == 16_384
    assert found["recipe"]["memory"]["total"] == pytest.approx(9.0 * 2**30, rel=0.02)


def folder_of(path: Path, **values: Any) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(ModernBertConfig(num_hidden_layers=7).to_dict() | values))
    return str(path)


@pytest.mark.parametrize("every", [1, 2, 3, 6, 7])
def test_the_windows_of_a_folder_are_planned(tmp_path: Path, every: int) -> None:
    kinds = ["sliding_attention" if index % every else "full_attention" for index in range(7)]
    values: dict[str, Any] = {"local_attention": 64, "layer_types": kinds}
    folder = folder_config(folder_of(tmp_path / "folder", **values))
    assert folder is not None
    config = ModernBertConfig(num_hidden_layers=7, **values)
    theirs = architecture_of(config).shape_of(config)
    planned = shape_of(with_folder(ModelConfig(init_from="folder"), folder), config.vocab_size)
    assert (planned.windows, planned.reach) == (theirs.windows, theirs.reach)
    assert theirs.reach == 32
    own = with_folder(ModelConfig(init_from="folder", window=16, global_every=1), folder)
    assert (own.window, own.global_every) == (16, 1)


@pytest.mark.parametrize("values", [{"layer_types": ["sliding_attention"] * 7}, {"local_attention": "wide"}])
def test_windows_that_no_option_tells_are_planned_as_usual(tmp_path: Path, values: dict[str, Any]) -> None:
    folder = folder_config(folder_of(tmp_path / "folder", **values))
    assert folder is not None
    model = with_folder(ModelConfig(init_from="folder"), folder)
    shape_of(model, 100)
    assert model.window in (128, None)
    assert model.global_every in (3, None)


def test_the_published_folders_of_earlier_versions_tell_how_often(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "modernbert", "vocab_size": 50368, "hidden_size": 768, "num_hidden_layers": 22}
            | {"num_attention_heads": 12, "intermediate_size": 1152, "max_position_embeddings": 8192}
            | {"local_attention": 128, "global_attn_every_n_layers": 3, "pad_token_id": 50283}
        )
    )
    found = folder_config(str(tmp_path))
    assert found is not None
    assert found.options == {"window": 128, "global_every": 3}
