"""The reason of each value of a resolved DeepSpeed configuration, in one sentence each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from engine.config import RunConfig

if TYPE_CHECKING:
    from engine.data.loading.loader import BatchLayout

MICRO_BATCH = "train_micro_batch_size_per_gpu"

#: ZeRO stage -> what it shards
SHARDED = {
    0: "nothing is sharded: every rank has the whole training state",
    1: "optimizer states and fp32 weights are sharded over the ranks",
    2: "optimizer states, fp32 weights and gradients are sharded over the ranks",
    3: "optimizer states, gradients and parameters are sharded over the ranks",
}
#: dotted key -> the reason of its value, the same in every run
ALWAYS = {
    "gradient_accumulation_steps": "train_batch_size / (train_micro_batch_size_per_gpu x ranks)",
    "zero_optimization.contiguous_gradients": "gradients of a bucket lie in one buffer, which is reduced in one call",
    "zero_optimization.reduce_scatter": "each rank receives only the gradients that it steps",
    "zero_optimization.stage3_prefetch_bucket_size": "10 million parameters are gathered ahead of their use",
    "zero_optimization.stage3_param_persistence_threshold": "biases and LayerNorm stay whole: to gather them costs "
    "more than their memory",
    "zero_optimization.stage3_max_live_parameters": "no limit for an encoder: parameters go as soon as they are used",
    "zero_optimization.offload_optimizer.device": "zero.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "zero.nvme_path",
    "zero_optimization.offload_optimizer.buffer_count": "weight, gradient and two moments of the part being stepped",
    "zero_optimization.offload_param.device": "zero.offload_parameters",
    "zero_allow_untested_optimizer": "the optimizers are zerobert's own, exact at every ZeRO stage",
    "zero_force_ds_cpu_optimizer": "zerobert's optimizers step on the CPU themselves",
    "bf16.enabled": "train.precision bf16",
    "data_types.grad_accum_dtype": "bf16 gradients of micro-batches would lose bits when they are added",
    "fp16.enabled": "train.precision fp16",
    "fp16.loss_scale": "0 means dynamic",
    "fp16.initial_scale_power": "the loss scale starts at 2^16 and finds its own value",
    "fp16.loss_scale_window": "the loss scale doubles after so many steps without an overflow",
    "fp16.hysteresis": "one overflow is forgiven before the loss scale is halved",
    "fp16.min_loss_scale": "the loss is never scaled down",
    "activation_checkpointing.partition_activations": "there is no model parallelism to cut activations over",
    "activation_checkpointing.contiguous_memory_optimization": "the model recomputes whole layers by itself",
    "activation_checkpointing.cpu_checkpointing": "a layer's input stays on the device",
    "activation_checkpointing.number_checkpoints": "model.activation_checkpointing recomputes each layer",
    "steps_per_print": "the run reports by itself",
    "wall_clock_breakdown": "timers would wait for the device at every step",
}
#: sections that are left out on purpose -> why
LEFT_OUT = {
    "optimizer": "left out: the engine gives DeepSpeed its own optimizer",
    "scheduler": "left out: the learning rate is a function of the step, so a resume needs no scheduler state",
    "tensorboard": "left out: the run writes its own curves (monitor.*); DeepSpeed's would hold the learning rate only",
}


def explain(values: dict[str, Any], config: RunConfig, accelerator: str, layout: BatchLayout) -> dict[str, str]:
    """The reason of every value, and of sections that are left out, by dotted key."""
    reasons = ALWAYS | _of_this_run(config, accelerator) | {MICRO_BATCH: layout.reason}
    known = {key: reasons[key] for key in leaves(values) if key in reasons}
    missing = [key for key in leaves(values) if key not in known]
    return known | dict.fromkeys(missing, "DeepSpeed's usual value") | LEFT_OUT


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted keys of all values in a nested dict."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _of_this_run(config: RunConfig, accelerator: str) -> dict[str, str]:
    train = config.train
    on_cpu = accelerator == "cpu"
    clipping = "optim.max_grad_norm" if config.optim.max_grad_norm else "optim.max_grad_norm 0 turns clipping off"
    overlap = "CPU ranks have nothing to overlap with" if on_cpu else "reduction runs beside the backward pass"
    bucket = "the model's parameters, up to 50 million elements: DeepSpeed allocates all of it"
    if config.model.init_from:
        bucket = "50 million elements: the dimensions of model.init_from are read later"
    pinned = "nothing is copied to a device" if on_cpu else "page-locked memory copies to the GPU at full bandwidth"
    return {
        "train_batch_size": "train.global_batch",
        "gradient_clipping": clipping,
        "zero_optimization.stage": f"train.zero_stage: {SHARDED[train.zero_stage]}",
        "zero_optimization.overlap_comm": overlap,
        "zero_optimization.reduce_bucket_size": bucket,
        "zero_optimization.allgather_bucket_size": bucket,
        "zero_optimization.offload_optimizer.pin_memory": pinned,
        "zero_optimization.offload_param.pin_memory": pinned,
        **{f"aio.{name}": "large sequential requests suit an NVMe disk" for name in _AIO},
    }


_AIO = ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events")
#: keys of a DeepSpeed JSON for which "auto" always gets a value
AUTOMATIC = frozenset([MICRO_BATCH, *ALWAYS, *_of_this_run(RunConfig(), "cpu")])
