"""From a run's configuration and its number of ranks to the DeepSpeed configuration, nothing left "auto".

Every value has its reason beside it; both are kept with the run. What only a DeepSpeed JSON of the user's sets
(`launch.zero.user_json`) goes over what is chosen here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.config import ModelConfig, RunConfig, TrainConfig, ZeroConfig
from engine.errors import UserError
from launch.zero.reasons import explain

if TYPE_CHECKING:
    from engine.data.loading.loader import BatchLayout

#: elements of a communication bucket: large enough for the bandwidth of a network, and 200 MB in fp32
LARGEST_BUCKET = 50_000_000
#: of BERT's own vocabulary, for the size of a model whose vocabulary isn't read yet
USUAL_VOCABULARY = 30_522
#: an fp32 weight, its gradient and two moments are in memory while DeepSpeed steps a part that lies on NVMe
NVME_BUFFERS = 4
#: large sequential requests, as DeepSpeed's own sweeps of NVMe disks choose them
AIO = {
    "block_size": 1_048_576,
    "queue_depth": 8,
    "intra_op_parallelism": 1,
    "single_submit": False,
    "overlap_events": True,
}


@dataclass(frozen=True)
class Resolution:
    """A DeepSpeed configuration and why it is so."""

    values: dict[str, Any]
    """what DeepSpeed gets"""
    reasons: dict[str, str]
    """dotted key -> one sentence; also for keys that are left out on purpose"""


def check_hardware(train: TrainConfig, accelerator: str) -> None:
    """Refuse a precision that the accelerator ("cuda", "cpu", ...) can't train in.

    Raises:
        UserError: fp16 on a CPU.
    """
    if train.precision == "fp16" and accelerator == "cpu":
        raise UserError("train.precision: 'fp16' needs a GPU, and this run is on CPUs; use bf16 or fp32")


def deepspeed_config(config: RunConfig, layout: BatchLayout, accelerator: str) -> dict[str, Any]:
    """The resolved DeepSpeed dict of a run; `resolve` gives the reasons too."""
    return resolve(config, layout, accelerator).values


def resolve(config: RunConfig, layout: BatchLayout, accelerator: str) -> Resolution:
    """The resolved DeepSpeed dict of a run, with the reason of each value.

    The learning rate, the optimizer and the monitor are the engine's own, so they don't appear. If the run names a
    DeepSpeed JSON, what has no counterpart among the run's options there overrides what is built here.

    Args:
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
    found = explain(values, config, accelerator)
    if config.deepspeed_config is not None:
        from launch.zero.user_json import overrides

        for key, value in overrides(config).items():
            put(values, key, value)
            found[key] = f"{config.deepspeed_config} sets it"
    return Resolution(values, found)


def put(values: dict[str, Any], key: str, value: object) -> None:
    """Set a dotted key, making the sections on the way."""
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[last] = value


def bucket_size(model: ModelConfig) -> int:
    """Elements of a communication bucket: DeepSpeed allocates all of it, so no more than the model has parameters."""
    if model.init_from:
        return LARGEST_BUCKET
    hidden, layers, _, intermediate = model.dimensions()
    layer = hidden * (4 * hidden + 2 * intermediate) + intermediate + 9 * hidden
    parameters = (USUAL_VOCABULARY + model.max_positions) * hidden + layers * layer + 2 * hidden * hidden
    millions = -(-parameters // 1_000_000)
    return min(LARGEST_BUCKET, millions * 1_000_000)


def zero_section(
    stage: int, accelerator: str, zero: ZeroConfig | None = None, model: ModelConfig | None = None
) -> dict[str, Any]:
    """ZeRO's own settings: communication overlaps computation where there is a device to do so."""
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
    """Where ZeRO keeps what the device has no room for; page-locked memory only where copies go to a device."""
    sections: dict[str, Any] = {}
    if zero.offload_optimizer != "none":
        sections["offload_optimizer"] = {"device": zero.offload_optimizer, "pin_memory": pinned}
    if zero.offload_optimizer == "nvme":
        sections["offload_optimizer"] |= {"nvme_path": zero.nvme_path, "buffer_count": NVME_BUFFERS}
    if zero.offload_parameters != "none":
        sections["offload_param"] = {"device": zero.offload_parameters, "pin_memory": pinned}
    return sections


def offload_sections(zero: ZeroConfig) -> dict[str, Any]:
    """What goes with an offloaded optimizer outside of ZeRO's own section."""
    sections: dict[str, Any] = {}
    if zero.offload_optimizer != "none":
        sections["zero_force_ds_cpu_optimizer"] = False
    if zero.offload_optimizer == "nvme":
        sections["aio"] = dict(AIO)
    return sections


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


def checkpointing_section(model: ModelConfig) -> dict[str, Any]:
    """DeepSpeed's view of the recomputation, which the model does itself: whole layers, kept on their rank."""
    if not model.activation_checkpointing:
        return {}
    kept = {"partition_activations": False, "contiguous_memory_optimization": False, "cpu_checkpointing": False}
    layers = {} if model.init_from else {"number_checkpoints": model.dimensions()[1]}
    return {"activation_checkpointing": {**kept, **layers}}
