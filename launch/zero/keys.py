"""The keys of a DeepSpeed JSON: those of the supported DeepSpeed version, those it removed or renamed, and those that
zerobert's engine can't work with.

DeepSpeed silently ignores unknown keys at the top level, so names are checked here.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable
from typing import Any

from engine.errors import UserError

#: sections -> their keys; the values become options of the run (launch.zero.claims) or go to DeepSpeed unchanged
SECTIONS: dict[str, tuple[str, ...] | None] = {
    "zero_optimization": None,  # DeepSpeed's own models know the keys of these three: launch.zero.schema
    "bf16": None,
    "fp16": None,
    "optimizer": ("type", "params", "legacy_fusion"),
    "scheduler": ("type", "params"),
    "activation_checkpointing": (
        "partition_activations", "number_checkpoints", "contiguous_memory_optimization", "cpu_checkpointing",
        "synchronize_checkpoint_boundary", "profile",
    ),
    "tensorboard": ("enabled", "output_path", "job_name"),
    "csv_monitor": ("enabled", "output_path", "job_name"),
    "wandb": ("enabled", "project", "group", "team"),
    "aio": ("block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"),
    "data_types": ("grad_accum_dtype",),
    "flops_profiler": (
        "enabled", "profile_step", "module_depth", "top_modules", "detailed", "output_file", "recompute_fwd_factor",
    ),
    "comms_logger": ("enabled", "verbose", "prof_all", "debug", "prof_ops"),
    "timers": ("throughput",),
}  # fmt: skip
#: keys of single values at the top level
SCALARS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "disable_allgather",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_python_gc", "log_level",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "gradient_allreduce_op",
    "managed_gradient_accumulation", "vocabulary_size", "dataloader_drop_last", "use_node_local_storage", "checkpoint",
)  # fmt: skip
#: keys that DeepSpeed 0.19 removed, with what to do instead
REMOVED = {
    "nebula": "delete it: zerobert writes its own checkpoints",
    "compression_training": "delete it: DeepSpeed's compression library is gone",
    "amp": "delete it and set train.precision (bf16 or fp16)",
    "quantize_training": "delete it: quantised training is gone",
    "sparse_gradients": "delete it: embedding gradients are reduced dense",
    "eigenvalue": "delete it: it served quantised training, which is gone",
    "sparse_attention": "delete it: attention is dense over packed sequences",
    "elasticity": "delete it: train.global_batch is kept at every number of ranks",
    "graph_harvesting": "delete it",
    "curriculum_learning": "delete it: run two phases with data.sequence_length 128, then 512",
    "progressive_layer_drop": "delete it",
    "zero_optimization.mics_shard_size": "delete it: MiCS is gone; zero_hpz_partition_size shards within a node",
    "zero_optimization.mics_hierarchical_params_gather": "delete it: MiCS is gone",
    "zero_optimization.zeropp_loco_param": "delete it: LoCo is gone",
}
#: keys of DeepSpeed that zerobert's engine can't work with unless they are switched off -> why, and the remedy
REFUSED = {
    "autotuning": "it kills other runs of the same user; let train.micro_batch auto find the batch",
    "compile": "zerobert's kernels are compiled already; delete it",
    "hybrid_engine": "it is for generation; delete it",
    "pipeline": "zerobert shards by ZeRO only; delete it",
    "tensor_parallel": "zerobert shards by ZeRO only; delete it",
    "expert_parallel": "BERT has no experts; delete it",
    "sequence_parallel_size": "zerobert keeps sequences whole; delete it",
    "torch_autocast": "set train.precision (bf16 or fp16) and delete it",
    "data_efficiency": "zerobert has its own loader; delete it",
    "comet": "choose tensorboard, csv_monitor or wandb",
    "weight_quantization": "it is for inference; delete it",
    "datastates": "zerobert writes its own checkpoints; delete it",
    "zero_optimization.zenflow": "its optimizer's tensors can't be mapped to parameters; delete it",
    "zero_optimization.elastic_checkpoint": "zerobert's checkpoints load in every layout; delete it",
    "zero_optimization.round_robin_gradients": "DeepSpeed maps optimizer states to wrong parameters there; set false",
    "zero_optimization.legacy_stage1": "it is an older stage 1; set false",
    "zero_optimization.offload_optimizer.super_offload": "it needs DeepSpeed's own Adam; set false",
    "bf16.bf16_master_weights_and_grads": "zerobert's optimizers step fp32 weights; set false",
    "bf16.bf16_optimizer_states": "zerobert's optimizers keep fp32 states; set false",
    "fp16.fp16_master_weights_and_grads": "zerobert's optimizers step fp32 weights; set false",
}
#: key -> the only value that zerobert's engine can work with, and why
FIXED: dict[str, tuple[Any, str]] = {
    "zero_allow_untested_optimizer": (True, "zerobert gives DeepSpeed its own optimizer"),
    "zero_force_ds_cpu_optimizer": (False, "zerobert's optimizers step on the CPU themselves"),
    "gradient_allreduce_op": ("mean", "zerobert's shares of the loss count on it"),
    "managed_gradient_accumulation": (True, "zerobert's loop counts on it"),
    "zero_optimization.compute_grad_norm": (True, "the norm is a curve of the run, and clips"),
    "zero_optimization.offload_optimizer.ratio": (1, "only whole states can be offloaded under zerobert's optimizers"),
    "optimizer.params.adam_w_mode": (True, "zerobert's weight decay is decoupled, as in AdamW"),
    "optimizer.params.bias_correction": (True, "zerobert's optimizers correct their moments"),
    "optimizer.params.amsgrad": (False, "zerobert has no AMSGrad"),
    "optimizer.params.min_coeff": (0, "zerobert's LAMB has no lower bound of the trust ratio"),
    "activation_checkpointing.cpu_checkpointing": (False, "zerobert recomputes layers on the device"),
    "scheduler.params.warmup_min_lr": (0, "zerobert warms up from 0"),
    "scheduler.params.warmup_min_ratio": (0, "zerobert warms up from 0"),
    "scheduler.params.warmup_type": ("linear", "zerobert warms up linearly"),
}
#: keys that have no effect on a run of zerobert -> why
WITHOUT_EFFECT = {
    "checkpoint": "zerobert writes its own checkpoints",
    "vocabulary_size": "the store knows it",
    "dataloader_drop_last": "zerobert's loader drops nothing",
    "use_node_local_storage": "zerobert writes its own checkpoints",
    "optimizer.legacy_fusion": "zerobert has its own optimizers",
    "optimizer.params.torch_adam": "zerobert has its own AdamW",
    "optimizer.params.fused": "zerobert has its own AdamW",
    "scheduler.params.last_batch_iteration": "the learning rate is a function of the step",
    "tensorboard.output_path": "curves go under the run's output folder",
    "tensorboard.job_name": "curves go under the run's output folder",
    "csv_monitor.output_path": "curves go under the run's output folder",
    "csv_monitor.job_name": "curves go under the run's output folder",
    "activation_checkpointing.partition_activations": "there is no model parallelism",
    "activation_checkpointing.contiguous_memory_optimization": "the model recomputes layers itself",
    "activation_checkpointing.synchronize_checkpoint_boundary": "the model recomputes layers itself",
    "activation_checkpointing.profile": "the model recomputes layers itself",
}


def fail(path: str, key: str, problem: str) -> UserError:
    """The error of a key of a file, to be raised."""
    return UserError(f"deepspeed_config: {path}: {key} {problem}")


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for an unknown name: the most similar known one, if any."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]}?" if near else "delete it"


def find(values: dict[str, Any], key: str) -> Any:
    """The value of a dotted key; None if it or one of its sections is missing."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None  # type: ignore[assignment]
    return values


def remove(values: dict[str, Any], key: str) -> None:
    """Delete a dotted key, which must exist."""
    *sections, last = key.split(".")
    for section in sections:
        values = values[section]
    del values[last]


def check_names(path: str, values: dict[str, Any]) -> None:
    """Refuse unknown, removed and unsupported keys, and sections that aren't JSON objects.

    Raises:
        UserError: names the file, the key and the remedy.
    """
    for key, remedy in REMOVED.items():
        if find(values, key) is not None:
            raise fail(path, key, f"was removed from DeepSpeed 0.19; {remedy}")
    for key, remedy in REFUSED.items():
        value = find(values, key)
        off = value in (None, False) or (isinstance(value, dict) and value.get("enabled") is False)
        if not off and not (key == "sequence_parallel_size" and value == 1):
            raise fail(path, key, f"can't be used; {remedy}")
    known = [*SECTIONS, *SCALARS]
    for key, value in values.items():
        if key not in known and key not in REFUSED:
            raise fail(path, key, f"is no key of DeepSpeed, which would ignore it; {nearest(key, known)}")
        if key in SECTIONS and not isinstance(value, dict):
            raise fail(path, key, f"is {value!r}; give an object {{...}}")
        for name in value if SECTIONS.get(key) else ():
            names = SECTIONS[key] or ()
            if name not in names:
                raise fail(path, f"{key}.{name}", f"is no key of DeepSpeed; {nearest(name, names)}")


def check_fixed(path: str, values: dict[str, Any]) -> None:
    """Refuse keys of `FIXED` with another value than the only supported one.

    Raises:
        UserError: names the file, the key, both values and the reason.
    """
    for key, (needed, why) in FIXED.items():
        value = find(values, key)
        if value is not None and value != "auto" and value != needed:
            raise fail(path, key, f"is {value!r} and can only be {needed!r}: {why}")


def translated(path: str, values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The same configuration with the present names of keys, and messages about the renamed ones.

    Raises:
        UserError: an old name beside the new one.
    """
    values = copy.deepcopy(values)
    told: list[str] = []
    if isinstance(values.get("zero_optimization"), bool):
        stage = int(values["zero_optimization"])
        values["zero_optimization"] = {"stage": stage}
        told.append(f"{path}: zero_optimization true or false is the old form of stage {stage}")
    if "bfloat16" in values:
        _rename(path, values, "bfloat16", "bf16", values["bfloat16"], told)
    zero = values.get("zero_optimization")
    if isinstance(zero, dict):
        _translate_zero(path, zero, told)
    return values, told


def _translate_zero(path: str, zero: dict[str, Any], told: list[str]) -> None:
    pinned = zero.pop("cpu_offload_use_pin_memory", None)
    for old, new in {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}.items():
        if old in zero:
            if not isinstance(zero[old], bool):
                raise fail(path, f"zero_optimization.{old}", f"is {zero[old]!r}; give true or false")
            section: dict[str, Any] = {"device": "cpu" if zero[old] else "none"}
            _rename(path, zero, old, new, section, told, "zero_optimization.")
    for new in ("offload_optimizer", "offload_param"):
        if pinned is not None and isinstance(zero.get(new), dict):
            zero[new].setdefault("pin_memory", pinned)
    if pinned is not None:
        told.append(f"{path}: zero_optimization.cpu_offload_use_pin_memory is now pin_memory of the offload sections")
    old, new = "stage3_gather_fp16_weights_on_model_save", "stage3_gather_16bit_weights_on_model_save"
    if old in zero:
        _rename(path, zero, old, new, zero[old], told, "zero_optimization.")


def _rename(
    path: str, values: dict[str, Any], old: str, new: str, value: object, told: list[str], section: str = ""
) -> None:
    if new in values:
        raise fail(path, section + old, f"is the old name of {section}{new}, which is there too; delete {old}")
    del values[old]
    values[new] = value
    told.append(f"{path}: {section}{old} is now {section}{new}")
