"""The resolved DeepSpeed dict: nothing left open, batch identity, and a reason for each value."""

from __future__ import annotations

import json

import pytest

from engine.config import ModelConfig, RunConfig, TrainConfig, ZeroConfig
from engine.data.loading.loader import default_micro_batch, resolve_layout
from engine.errors import UserError
from launch.zero.build import bucket_size, check_hardware, deepspeed_config, resolve
from launch.zero.reasons import LEFT_OUT, leaves
from launch.zero.schema import check_models


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


OFFLOADS = [
    ZeroConfig(),
    ZeroConfig(offload_optimizer="cpu"),
    ZeroConfig(offload_optimizer="cpu", offload_parameters="cpu"),
    ZeroConfig(offload_optimizer="nvme", nvme_path="/nvme"),
]


@pytest.mark.parametrize("accelerator", ["cuda", "cpu"])
@pytest.mark.parametrize("zero", OFFLOADS)
def test_every_value_has_a_reason_and_passes_deepspeeds_own_models(zero: ZeroConfig, accelerator: str) -> None:
    train = TrainConfig(zero_stage=3, precision="bf16")
    model = ModelConfig(activation_checkpointing=True)
    found = resolve(RunConfig(train=train, zero=zero, model=model), resolve_layout(64, None, 2), accelerator)
    assert found.reasons.keys() == {*leaves(found.values), *LEFT_OUT}
    assert all(reason and "usual value" not in reason for reason in found.reasons.values())
    check_models("the run", found.values)


def test_the_micro_batch_has_the_reason_of_the_layout() -> None:
    key = "train_micro_batch_size_per_gpu"
    own = resolve(RunConfig(train=TrainConfig(micro_batch=8)), resolve_layout(64, 8, 2), "cuda")
    assert (own.values[key], own.reasons[key]) == (8, "train.micro_batch")
    default = resolve_layout(4096, None, 2, default=default_micro_batch("cuda", 512))
    found = resolve(RunConfig(train=TrainConfig(global_batch=4096)), default, "cuda")
    assert found.values[key] == 32
    assert found.reasons[key] == "the largest that divides a rank's share, up to 32 x 512 = 16,384 tokens"


def test_offload_is_in_the_dict_of_its_stage() -> None:
    config = RunConfig(train=TrainConfig(zero_stage=3), zero=OFFLOADS[2])
    for accelerator, pinned in {"cuda": True, "cpu": False}.items():
        built = deepspeed_config(config, resolve_layout(64, None, 2), accelerator)
        place = {"device": "cpu", "pin_memory": pinned}
        assert built["zero_optimization"]["offload_optimizer"] == place
        assert built["zero_optimization"]["offload_param"] == place
        assert built["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("model", "bucket"),
    [
        (ModelConfig(size="tiny"), 5_000_000),  # 4.4 million parameters
        (ModelConfig(size="base"), 50_000_000),
        (ModelConfig(size="tiny", init_from="somewhere"), 50_000_000),
    ],
)
def test_a_bucket_is_no_larger_than_the_model(model: ModelConfig, bucket: int) -> None:
    assert bucket_size(model) == bucket
