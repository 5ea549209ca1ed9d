"""Forecasts of runs that train a part of the weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import ARCHITECTURES, AdapterConfig, Shape
from engine.model.adapters.trained import Trained
from engine.model.packing import pack
from launch.forecast.activations import passes
from launch.forecast.command import main
from launch.forecast.fit import RESERVE, ballast
from launch.forecast.memory import Workload, forecast
from launch.forecast.step_time import communicated, step_flops
from tests.conftest import ROOT
from tests.model.adapters.test_counts import adapted

SHAPE = Shape(768, 12, 12, 3072, 30522, decoder=False)
FULL = Workload(SHAPE, 128, 32, 1, 2, 2, "bf16", read_share=0)


def with_trained(work: Workload, freeze: str | None = None, **adapter: object) -> Workload:
    trained = Trained(work.shape, AdapterConfig(**adapter), freeze, ARCHITECTURES.get("bert"))  # type: ignore[arg-type]
    return replace(work, trained=trained)


LORA = with_trained(FULL, method="lora", rank=8)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_states_are_those_of_trained_parameters(stage: int) -> None:
    full, lora = (forecast(replace(work, stage=stage)) for work in (FULL, LORA))
    trained = LORA.trained_parameters // (2 if stage else 1)
    # the pooler is the base's; the classifier has 2 x 768 + 2
    assert LORA.trained_parameters == 8 * 12 * (4 * 2 * 768 + 2 * (768 + 3072)) + 2 * 768 + 2
    assert (lora.master, lora.optimizer) == (4 * trained, 8 * trained)
    assert lora.parameters == pytest.approx(full.parameters, rel=0.02)
    assert lora.parameters > full.parameters
    assert lora.gradients < full.gradients / 50


def test_nothing_is_kept_below_the_lowest_trained_place() -> None:
    top = with_trained(FULL, freeze="embeddings,layers:0-8")
    head = with_trained(FULL, freeze="encoder")
    assert passes(head).kept == 0
    assert passes(top).kept < passes(FULL).kept / 3
    assert step_flops(head, 1) < step_flops(top, 1) < 0.6 * step_flops(FULL, 1)
    assert 0.6 * step_flops(FULL, 1) < step_flops(LORA, 1) < 0.75 * step_flops(FULL, 1)


def test_only_trained_parameters_are_communicated_but_stage_3_gathers_all() -> None:
    size = LORA.trained_parameters * 2 / 2
    assert communicated(LORA, 1) == (size, size)
    gradients, parameters = communicated(replace(LORA, stage=3), 1)
    assert (gradients, parameters) == (size, LORA.parameters * 2.0)


def test_ballast_is_what_the_trial_lacks() -> None:
    work = replace(LORA, accelerator="cpu", ranks=1, stage=0, precision="fp32")
    run = forecast(work)
    held = ballast(run, work)
    assert held == RESERVE + run.total - run.activations - run.head - run.parameters - run.gradients
    assert held - RESERVE < ballast(forecast(replace(work, trained=None)), replace(work, trained=None)) - RESERVE


def test_passes_and_copies_of_a_micro_batch_are_counted() -> None:
    for work in (FULL, LORA):
        again, twice = replace(work, passes=2), replace(work, sequences_per_sample=2)
        assert step_flops(twice, 1) == 2 * step_flops(work, 1)
        assert forecast(twice).activations > 1.9 * forecast(work).activations
        noise = 2 * 4 * work.tokens * work.shape.hidden
        assert forecast(again).activations >= forecast(work).activations + noise
    assert step_flops(replace(FULL, passes=2), 2) == 2 * step_flops(FULL, 1)
    assert step_flops(replace(LORA, passes=2), 2) > 2 * step_flops(LORA, 1)


def test_a_plan_counts_regularisers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = (ROOT / "launch" / "recipes" / "finetune.yaml").read_text()
    costs = []
    for added in ("", "regularise: {r_drop: 1}", "regularise: {adversarial: fgm}"):
        (tmp_path / "recipe.yaml").write_text(f"{recipe}\n{added}\n")
        options = ["--model", "bert-base", "--gpus", "1", "--gpu", "a100-40", "--json"]
        assert main(["--config", str(tmp_path / "recipe.yaml"), *options]) == 0
        costs.append(json.loads(capsys.readouterr().out)["choice"]["cost"]["flops"])
    assert costs == [costs[0], 2 * costs[0], 2 * costs[0]]


def test_a_plan_counts_teachers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A second model of the size of the first: its weights once more, and its forward pass, a third of a step."""
    recipe = (ROOT / "launch" / "recipes" / "finetune.yaml").read_text()
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    told = {"model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512, "pad_token_id": 0, **sizes}
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text(json.dumps(told))
    found = []
    for added in ("", f"distil: {{teachers: {tmp_path}}}", f"distil: {{teachers: {tmp_path / 'missing'}}}"):
        (tmp_path / "recipe.yaml").write_text(f"{recipe}\n{added}\n")
        options = ["--model", "bert-base", "--gpus", "1", "--gpu", "a100-40", "--json"]
        assert main(["--config", str(tmp_path / "recipe.yaml"), *options]) == 0
        found.append(json.loads(capsys.readouterr().out))
    plain, taught, missing = (each["choice"] for each in found)
    assert taught["cost"]["flops"] == pytest.approx(plain["cost"]["flops"] * 4 / 3, rel=1e-6)
    assert taught["memory"]["parameters"] == 2 * plain["memory"]["parameters"]
    assert taught["cost"]["compute_seconds"] > 1.3 * plain["cost"]["compute_seconds"]
    assert missing["cost"] == plain["cost"]
    assert "distil.teachers" not in str(found[1])
    assert "distil.teachers: not all have a config.json that can be read" in str(found[2])


def test_a_plan_of_the_recipe_tells_the_trained_share(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "launch" / "recipes" / "finetune_lora.yaml")
    options = ["--model", "bert-base", "--gpus", "1", "--gpu", "t4", "--precision", "fp16"]
    assert main(["--config", recipe, *options]) == 0
    assert "110.8 M parameters, 1.20% of them trained" in capsys.readouterr().out
    plans = []
    for name in (recipe, recipe.replace("_lora", "")):
        assert main(["--config", name, *options, "--json"]) == 0
        plans.append(json.loads(capsys.readouterr().out)["choice"])
    lora, full = plans
    assert lora["memory"]["optimizer"] < full["memory"]["optimizer"] / 50
    assert lora["cost"]["seconds"] < 0.8 * full["cost"]["seconds"]


@pytest.mark.parametrize(
    ("options", "freeze", "bound"),
    [
        ({"method": "lora"}, None, 1.02),
        ({"method": "lora"}, "layers:0-1", 1.02),
        ({"method": "ia3"}, None, 1.02),
        ({"method": "bitfit"}, None, 1.02),
        ({}, "embeddings,layers:0-1", 1.02),
        ({"method": "houlsby", "bottleneck": 8}, None, 1.3),  # of whose first layer attention keeps nothing
    ],
)
def test_activations_are_those_that_autograd_keeps(
    options: dict[str, Any], freeze: str | None, bound: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's attention, which keeps all queries of the last layer too."""
    monkeypatch.setattr("engine.kernels.dispatch._selected", "reference")
    model, trained = adapted("bert", options, freeze)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[torch.Tensor] = []

    def keep(saved: torch.Tensor) -> torch.Tensor:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        model.eval()(**pack(torch.randint(5, 1000, (16, 48)), torch.ones(16, 48)), max_length=48)
    storages = {saved.untyped_storage().data_ptr(): saved.untyped_storage().nbytes() for saved in kept}
    size = sum(nbytes for place, nbytes in storages.items() if place not in weights)
    work = Workload(
        trained.shape, 48, 16, 0, 1, 1, "fp32", accelerator="cpu", read_share=0, dropout=0.0, trained=trained
    )
    assert size / 1.02 < passes(work).kept < size * bound
