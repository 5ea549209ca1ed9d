"""From a run's configuration and its number of ranks to the DeepSpeed configuration, nothing left "auto"."""

from __future__ import annotations

from typing import Any

from engine.config import RunConfig, TrainConfig
from engine.data.loader import BatchLayout
from engine.errors import UserError


def check_hardware(train: TrainConfig, accelerator: str) -> None:
    """Refuse a precision that the accelerator ("cuda", "cpu", ...) can't train in.

    Raises:
        UserError: fp16 on a CPU.
    """
    if train.precision == "fp16" and accelerator == "cpu":
        raise UserError("train.precision: 'fp16' needs a GPU, and this run is on CPUs; use bf16 or fp32")


def deepspeed_config(config: RunConfig, layout: BatchLayout, accelerator: str) -> dict[str, Any]:
    """The resolved DeepSpeed dict of a run.

    The learning rate, the optimizer and the monitor are the engine's own, so they don't appear.
    """
    train = config.train
    return {
        "train_batch_size": layout.global_batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": config.optim.max_grad_norm,
        "zero_optimization": zero_section(train.zero_stage, accelerator),
        "zero_allow_untested_optimizer": True,
        **precision_section(train),
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


def zero_section(stage: int, accelerator: str) -> dict[str, Any]:
    """ZeRO's own settings: communication overlaps computation where there is a device to do so."""
    section: dict[str, Any] = {"stage": stage}
    if stage >= 1:
        section["overlap_comm"] = accelerator != "cpu"
        section["contiguous_gradients"] = True
        section["reduce_bucket_size"] = 50_000_000
    if stage in (1, 2):
        section["reduce_scatter"] = True
        section["allgather_bucket_size"] = 50_000_000
    if stage == 3:
        section["stage3_prefetch_bucket_size"] = 10_000_000
        section["stage3_param_persistence_threshold"] = 100_000
        section["stage3_max_live_parameters"] = 1_000_000_000
    return section


def precision_section(train: TrainConfig) -> dict[str, Any]:
    """Switch on one of bf16 and fp16 (with dynamic loss scaling), or neither.

    bf16 gradients are accumulated in fp32, except at stage 0, where DeepSpeed has no such optimizer.
    """
    if train.precision == "bf16":
        accumulation = {"data_types": {"grad_accum_dtype": "fp32"}} if train.zero_stage > 0 else {}
        return {"bf16": {"enabled": True}, **accumulation}
    if train.precision == "fp16":
        scaling = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000}
        return {"fp16": {**scaling, "hysteresis": 2, "min_loss_scale": 1}}
    return {}
