"""Builds the DeepSpeed configuration of a run from its options and its number of ranks, with no value left "auto".

Every value has its reason beside it; both are written to the run's folder. A user's DeepSpeed JSON
(`launch.zero.user_json`) overrides the values chosen here that aren't options of the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.config import ARCHITECTURES, ModelConfig, RunConfig, Shape, TrainConfig, ZeroConfig
from engine.errors import UserError
from launch.zero.reasons import explain
from launch.zero.user_json import DeepSpeedFile, load

if TYPE_CHECKING:
    from engine.data.loading.loader import BatchLayout

#: largest number of elements of a communication bucket: enough to use a network's bandwidth, and 200 MB in fp32
LARGEST_BUCKET = 50_000_000
#: tokens of BERT's own vocabulary, to estimate the size of a model whose vocabulary isn't read yet
USUAL_VOCABULARY = 30_522
#: DeepSpeed's buffers for a part of the states on NVMe while it is stepped: fp32 weight, gradient and two moments
NVME_BUFFERS = 4
#: large sequential requests, as DeepSpeed's own tuning of NVMe disks chooses them
AIO = {
    "block_size": 1_048_576,
    "queue_depth": 8,
    "intra_op_parallelism": 1,
    "single_submit": False,
    "overlap_events": True,
}


@dataclass(frozen=True)
class Resolution:
    """A DeepSpeed configuration, with the reason of each value."""

    values: dict[str, Any]
    """the dict that DeepSpeed gets"""
    reasons: dict[str, str]
    """dotted key -> reason in one sentence; also for keys that are left out on purpose"""
    file: DeepSpeedFile | None = None
    """the user's JSON, if the run names one"""


def check_hardware(train: TrainConfig, accelerator: str) -> None:
    """Refuse a precision that the accelerator ("cuda", "cpu", ...) can't train in.

    Raises:
        UserError: fp16 on a CPU, or a GPU that is too old for the precision.
    """
    if train.precision == "fp16" and accelerator == "cpu":
        raise UserError("train.precision: 'fp16' needs a GPU, and this run is on CPUs; use bf16 or fp32")
    if accelerator == "cuda":
        from engine.train.ranks.gpus import check_precision

        check_precision(train.precision)


def deepspeed_config(config: RunConfig, layout: BatchLayout, accelerator: str) -> dict[str, Any]:
    """The resolved DeepSpeed dict of a run; `resolve` gives the reasons too."""
    return resolve(config, layout, accelerator).values


def resolve(config: RunConfig, layout: BatchLayout, accelerator: str) -> Resolution:
    """The resolved DeepSpeed dict of a run, with the reason of each value.

    The learning rate, the optimizer and the monitor are the engine's own, so they don't appear. If the run names a
    DeepSpeed JSON, its values that are no options of the run override those built here.

    Args:
        config: the run's configuration.
        layout: how the global batch is divided over ranks and gradient accumulation.
        accelerator: "cuda", "cpu" or another of DeepSpeed's names.

    Raises:
        UserError: the DeepSpeed JSON can't be read or is wrong.
    """
    sections = {"zero_optimization": zero_section(config.train.zero_stage, accelerator, config.zero, config.model)}
    values = {
        "train_batch_size": layout.global_batch,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": config.optim.max_grad_norm,
        **sections,
        "zero_allow_untested_optimizer": True,
        **offload_sections(config.zero),
        **precision_section(config.train),
        **checkpointing_section(config.model),
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    reasons = explain(values, config, accelerator, layout)
    file = None if config.deepspeed_config is None else load(config.deepspeed_config)
    for key, value in (file.overrides(config) if file else {}).items():
        put(values, key, value)
        reasons[key] = f"{config.deepspeed_config} sets it"
    return Resolution(values, reasons, file)


def put(values: dict[str, Any], key: str, value: object) -> None:
    """Set a dotted key in a nested dict, creating missing sections."""
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[last] = value


def bucket_size(model: ModelConfig) -> int:
    """Elements of a communication bucket: about the model's parameters at most, since DeepSpeed allocates all of it."""
    if model.init_from:
        return LARGEST_BUCKET
    return shape_bucket(ARCHITECTURES.get(model.fresh_architecture).shape(model, USUAL_VOCABULARY))


def shape_bucket(shape: Shape) -> int:
    """`bucket_size` of a model of this shape with the usual vocabulary."""
    tables = (USUAL_VOCABULARY + shape.positions) * shape.hidden
    parameters = tables + shape.layers * shape.layer_parameters() + 2 * shape.hidden * shape.hidden
    millions = -(-parameters // 1_000_000)
    return min(LARGEST_BUCKET, millions * 1_000_000)


def zero_section(
    stage: int, accelerator: str, zero: ZeroConfig | None = None, model: ModelConfig | None = None
) -> dict[str, Any]:
    """The section zero_optimization for a ZeRO stage: communication overlaps computation where there is a GPU."""
    section: dict[str, Any] = {"stage": stage}
    bucket = LARGEST_BUCKET if model is None else bucket_size(model)
    if stage >= 1:
        section["overlap_comm"] = accelerator != "cpu"
        section["contiguous_gradients"] = True
        section["reduce_bucket_size"] = bucket
    if stage in (1, 2):
        section["reduce_scatter"] = True
        section["allgather_bucket_size"] = bucket
    if stage == 3:
        section["stage3_prefetch_bucket_size"] = 10_000_000
        section["stage3_param_persistence_threshold"] = 100_000
        section["stage3_max_live_parameters"] = 1_000_000_000
    if zero is not None:
        section |= _offloads(zero, pinned=accelerator != "cpu")
    return section


def _offloads(zero: ZeroConfig, pinned: bool) -> dict[str, Any]:
    """The sections of ZeRO-Offload and ZeRO-Infinity; memory is `pinned` only where it is copied to a device."""
    sections: dict[str, Any] = {}
    if zero.offload_optimizer != "none":
        sections["offload_optimizer"] = {"device": zero.offload_optimizer, "pin_memory": pinned}
    if zero.offload_optimizer == "nvme":
        sections["offload_optimizer"] |= {"nvme_path": zero.nvme_path, "buffer_count": NVME_BUFFERS}
    if zero.offload_parameters != "none":
        sections["offload_param"] = {"device": zero.offload_parameters, "pin_memory": pinned}
    return sections


def offload_sections(zero: ZeroConfig) -> dict[str, Any]:
    """Settings for an offloaded optimizer outside of the section zero_optimization."""
    sections: dict[str, Any] = {}
    if zero.offload_optimizer != "none":
        sections["zero_force_ds_cpu_optimizer"] = False
    if zero.offload_optimizer == "nvme":
        sections["aio"] = dict(AIO)
    return sections


def precision_section(train: TrainConfig) -> dict[str, Any]:
    """The section that switches on bf16, or fp16 with dynamic loss scaling; empty for fp32.

    Gradients of bf16 are accumulated in fp32, except at stage 0, where DeepSpeed's optimizer can't do that.
    """
    if train.precision == "bf16":
        accumulation = {"data_types": {"grad_accum_dtype": "fp32"}} if train.zero_stage > 0 else {}
        return {"bf16": {"enabled": True}, **accumulation}
    if train.precision == "fp16":
        scaling = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 1000}
        return {"fp16": {**scaling, "hysteresis": 2, "min_loss_scale": 1}}
    return {}


def checkpointing_section(model: ModelConfig) -> dict[str, Any]:
    """DeepSpeed's section for activation checkpointing, which the model does itself: whole layers, unpartitioned."""
    if not model.activation_checkpointing:
        return {}
    kept = {"partition_activations": False, "contiguous_memory_optimization": False, "cpu_checkpointing": False}
    layers = {} if model.init_from else {"number_checkpoints": model.dimensions()[1]}
    return {"activation_checkpointing": {**kept, **layers}}
