"""`zerobert plan`: choices, refusals, and files that are read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UserError
from launch.hardware import GIB
from launch.plan import main

CLUSTER = ["--gpus=64", "--gpus-per-node=8", "--gpu-memory=80GiB"]
LARGE = ["--model=bert-large", "--sequence-length=512", "--global-batch=32768", *CLUSTER]


def plan(capsys: pytest.CaptureFixture[str], *options: str, code: int = 0) -> dict[str, Any]:
    assert main([*options, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("model", ["bert-base", "large", "1.3b"])
@pytest.mark.parametrize(("gpus", "memory"), [(1, 24), (8, 80), (64, 80)])
def test_the_choice_fits_and_multiplies_out(
    capsys: pytest.CaptureFixture[str], model: str, gpus: int, memory: int
) -> None:
    found = plan(capsys, f"--model={model}", "--global-batch=4096", f"--gpus={gpus}", f"--gpu-memory={memory}GiB")
    choice, deepspeed = found["choice"], found["deepspeed"]
    assert choice["memory"]["total"] <= memory * GIB
    assert choice["micro_batch"] * choice["accumulation"] * gpus == 4096 == deepspeed["train_batch_size"]
    assert deepspeed["train_micro_batch_size_per_gpu"] == choice["micro_batch"]
    assert deepspeed["zero_optimization"]["stage"] == choice["stage"]
    assert "auto" not in json.dumps(deepspeed)


def test_no_cheaper_candidate_that_fits_was_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, *LARGE)
    chosen = found["choice"]["cost"]["communication"]
    fitting = [row for row in found["candidates"] if row["fits"] and row["offload_optimizer"] == "none"]
    assert chosen <= 1.05 * min(row["cost"]["communication"] for row in fitting)


def test_a_micro_batch_of_twice_the_size_would_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    from dataclasses import replace

    from engine.config import ModelConfig
    from launch.memory import Workload, forecast, shape_of

    choice = plan(capsys, *LARGE)["choice"]
    assert choice["accumulation"] > 1
    work = Workload(
        shape_of(ModelConfig(size="large"), 30522), 512, choice["micro_batch"], choice["stage"], 64, 8, "bf16",
        activation_checkpointing=choice["activation_checkpointing"],
    )  # fmt: skip
    assert forecast(work).total <= 80 * GIB < forecast(replace(work, micro_batch=2 * work.micro_batch)).total


def test_little_memory_shards_recomputes_or_offloads(capsys: pytest.CaptureFixture[str]) -> None:
    """1.3B parameters take 16 bytes each: 20 GiB of states fit no 16 GiB."""
    found = plan(capsys, "--model=1.3b", "--gpus=1", "--gpu-memory=16GiB", "--sequence-length=512")
    assert found["choice"]["offload_optimizer"] == "cpu"
    assert not any(row["fits"] for row in found["candidates"] if row["offload_optimizer"] == "none")
    sharded = plan(capsys, "--model=1.3b", "--gpus=8", "--gpu-memory=16GiB", "--sequence-length=512")
    assert sharded["choice"]["offload_optimizer"] == "none"
    assert sharded["choice"]["stage"] >= 1


def test_what_fits_nowhere_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--model=1.3b", "--gpus=1", "--gpu-memory=2GiB"]
    assert plan(capsys, *options, code=1)["choice"] is None
    assert main(options) == 1
    assert "Nothing fits" in capsys.readouterr().out


def test_a_recipe_gives_model_batch_and_precision(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--config=launch/recipes/pretrain_large_phase1.yaml", *CLUSTER)
    request = found["request"]
    assert (request["model"]["size"], request["global_batch"], request["precision"]) == ("large", 256, "bf16")


def test_table_picture_and_deepspeed_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture, file = tmp_path / "plan.png", tmp_path / "ds.json"
    assert main([*LARGE, f"--plot={picture}", f"--output={file}"]) == 0
    printed = capsys.readouterr().out
    assert "ZeRO-3 + optimizer on CPU" in printed
    assert "Predicted, not measured" in printed
    assert "launch/train.py --train.zero_stage" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(file.read_text()) == plan(capsys, *LARGE)["deepspeed"]


def test_this_machine_is_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--model=tiny", "--global-batch=64", "--precision=fp32")
    assert found["hardware"]["memory"] > 0
    assert found["choice"]["micro_batch"] >= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "model: not given; give --model bert-base or --config RECIPE"),
        (["--model=bert-huge"], "model: 'bert-huge' is unknown; choose one of tiny"),
        (["--model=base", "--gpus=0"], "gpus: 0 is not allowed; give a positive number"),
        (["--model=base", "--gpus=3", "--global-batch=256"], "global-batch: 256 is not a multiple of 3 GPUs; give 255"),
        (["--model=base", "--gpu=h900"], "gpu: 'h900' is unknown"),
        (["--model=base", "--gpu-memory=lots"], "gpu-memory: 'lots' is no amount of memory"),
        (["--model=base", "--precision=int8"], "precision: 'int8' is not allowed; choose one of bf16, fp16, fp32"),
        (["--model=base", "--optimizer=lion"], "optimizer: 'lion' is not allowed"),
        (["--model=base", "--attention=ring"], "attention: 'ring' is not allowed"),
        (["--model=base", "--activation-checkpointing=maybe"], "activation-checkpointing: 'maybe' is not allowed"),
        (["--model=base", "--sequence-length=-1"], "sequence-length: -1 is not allowed"),
        (
            ["--model=base", "--utilisation=1.5"],
            r"utilisation: 1.5 is not allowed; give a share of the peak in \(0, 1\]",
        ),
        (["--model=base", "--tokens=-1"], "tokens: -1.0 is not allowed"),
        (["--model=base", "--gpus=8", "--output=/nowhere/ds.json"], "output: '/nowhere/ds.json' can't be written"),
        (["--model=base", "--gpus=8", "--plot=/tmp/plan.xyz"], "plot: '/tmp/plan.xyz' can't be written"),
        (["--model=base", "--gpus=many"], "gpus: 'many' is not allowed; give a whole number"),
    ],
)
def test_mistakes_name_the_option(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(options)
