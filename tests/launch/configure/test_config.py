"""The configuration tree: defaults and checks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.config import RunConfig
from engine.data.loading.loader import resolve_layout
from engine.errors import UserError
from engine.optim.build import build_optimizer
from engine.optim.fused import FusedLamb
from launch.configure.options import parse
from launch.zero.build import resolve


def test_the_defaults_are_valid_and_what_a_run_without_options_means() -> None:
    config = parse([])  # which validates
    assert config == RunConfig()
    assert (config.task, config.train.zero_stage, config.optim.name, config.train.precision) == (
        "pretrain",
        2,
        "adamw",
        "fp32",
    )


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("model", "size", "huge"),
        ("model", "layers", 0),
        ("model", "heads", 3),
        ("model", "hidden_dropout", 1.0),
        ("model", "max_positions", 4),
        ("model", "window", 0),
        ("model", "window", 7),
        ("model", "global_every", 0),
        ("model", "rope_theta", 1.0),
        ("model", "local_rope_theta", -3.0),
        ("data", "objective", "nsp"),
        ("data", "sequence_length", 4),
        ("data", "mask_probability", 0.0),
        ("data", "mask_probability_end", 0.6),
        ("data", "eval_mask_probability", 0.0),
        ("data", "mask_replace_probability", 1.2),
        ("data", "random_replace_probability", -0.1),
        ("data", "random_replace_probability", 0.3),
        ("data", "mean_span_length", 0.5),
        ("data", "mean_span_length", 11.0),
        ("data", "short_sequence_probability", 1.5),
        ("data", "workers", -1),
        ("labelled", "max_length", 2),
        ("optim", "learning_rate", 0.0),
        ("optim", "betas", (0.9, 1.0)),
        ("optim", "eps", 0.0),
        ("optim", "weight_decay", -0.1),
        ("optim", "min_ratio", 2.0),
        ("optim", "power", 0.0),
        ("optim", "name", "sgd"),
        ("train", "global_batch", 0),
        ("train", "micro_batch", 0),
        ("train", "steps", 0),
        ("train", "epochs", 0.0),
        ("train", "zero_stage", 4),
        ("train", "log_interval", 0),
        ("train", "save_interval", -1),
        ("train", "keep", 0),
        ("train", "kernels", "fast"),
    ],
)
def test_a_bad_value_names_its_field_and_value(part: str, field: str, value: object) -> None:
    config = RunConfig()
    setattr(config, part, replace(getattr(config, part), **{field: value}))
    with pytest.raises(UserError, match=rf"^{part}\.{field}: ") as caught:
        config.validate()
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RunConfig(task="nothing"), "task: 'nothing' is not allowed; choose one of pretrain, sequence_classification"),
        (RunConfig(output=""), "output: ''"),
        (RunConfig(seed=-1), "seed: -1"),
        (RunConfig(task="sequence_classification"), "labelled.train: None"),
    ],
)
def test_a_bad_run_is_refused(config: RunConfig, message: str) -> None:
    with pytest.raises(UserError) as caught:
        config.validate()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lamb_is_offered_at_every_stage(stage: int, precision: str) -> None:
    """What is asked for is what DeepSpeed and the optimizer get: no stage falls back to another one or to AdamW."""
    config = parse(["--optim.name=lamb", f"--train.zero_stage={stage}", f"--train.precision={precision}"])
    values = resolve(config, resolve_layout(config.train.global_batch, None, 2), "cpu").values
    assert values["zero_optimization"]["stage"] == stage
    assert values.get("bf16", {}).get("enabled", False) == (precision == "bf16")
    optimizer = build_optimizer(torch.nn.Linear(2, 2), config.optim, torch.device("cpu"), stage)
    assert isinstance(optimizer, FusedLamb)


def test_fp16_is_refused_where_deepspeed_does_not_scale_the_loss() -> None:
    config = RunConfig()
    config.train.precision, config.train.zero_stage = "fp16", 0
    with pytest.raises(UserError, match=r"^train\.zero_stage: 0 .* choose 1"):
        config.validate()


def test_steps_and_epochs_exclude_each_other() -> None:
    config = RunConfig()
    config.train = replace(config.train, steps=10, epochs=1.0)
    with pytest.raises(UserError, match=r"train\.epochs: 1\.0 .* train\.steps \(10\)"):
        config.validate()


def test_a_sequence_longer_than_the_positions_is_refused() -> None:
    config = RunConfig()
    config.data = replace(config.data, sequence_length=1024)
    with pytest.raises(UserError, match=r"data\.sequence_length: 1024 .* model\.max_positions \(512\)"):
        config.validate()


def test_a_user_error_is_always_one_line() -> None:
    assert str(UserError("a\n  b\tc")) == "a b c"
