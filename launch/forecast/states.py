"""Weights, gradients and optimizer states as DeepSpeed 0.19 keeps them, and the buffers it works with, in bytes.

DeepSpeed wraps the optimizer in one of four classes, by stage and precision, and each keeps other things; what is said
here was read in their source and measured (benchmarks/memory_forecast.py). N parameters, R ranks, e bytes a weight.
Where a part of the weights is trained, the others are there in e bytes and have nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.config import OPTIMIZERS
from launch.forecast.workload import Workload

FP32 = 4
#: elements that DeepSpeed's engine flattens at a time when it reduces whole gradients (MEMORY_OPT_ALLREDUCE_SIZE)
WHOLE_REDUCTION = 500_000_000
#: elements that stage 3 steps at a time (zero_optimization.sub_group_size)
SUB_GROUP = 1_000_000_000
#: tensors of the optimizer on NVMe: fp32 weights, gradient, two moments
ON_NVME = 4


@dataclass(frozen=True)
class States:
    """Bytes of one rank. All but the first four are added to them."""

    parameters: int
    master: int
    gradients: int
    optimizer: int
    always: int = 0
    """buffers that are never freed"""
    passes: int = 0
    """during forward and backward pass"""
    reduction: int = 0
    """when gradients are reduced, once activations are gone"""
    early: float = 0.0
    """share of the activations that are still there when the first gradients are reduced"""
    step: int = 0
    """during the optimizer step; negative if gradients are gone by then"""
    host: int = 0
    nvme: int = 0


def states(work: Workload) -> States:
    """What one rank keeps."""
    if work.stage == 0:
        kept = _stage_0(work)
    elif work.stage == 1 and work.precision == "bf16" and work.offload_optimizer == "none":
        kept = _bf16_stage_1(work)
    else:
        kept = _stage_3(work) if work.stage == 3 else _stage_1_and_2(work)
    return kept


def _optimizer(work: Workload, elements: int) -> tuple[int, int]:
    """fp32 weights and the optimizer's states of so many elements (two states: the paper's K = 12), with further copies
    of the weights.

    AdaLoRA keeps two more of its factors, which are nearly all that it trains.
    """
    adalora = work.trained is not None and work.trained.adapter.method == "adalora"
    kept = len(OPTIMIZERS.get(work.optimizer).states) + work.copies + 2 * adalora
    return FP32 * elements, kept * FP32 * elements


def _gathered(work: Workload) -> int:
    """gloo collects the ranks' parts in a copy; NCCL writes them in place."""
    on_cpu = work.accelerator == "cpu" and work.ranks > 1
    return work.width * work.trained_parameters if on_cpu else 0


def _flattened(work: Workload, limit: int, *, even_alone: bool = False) -> int:
    """Elements of the flat copy that a reduction makes: at most the limit, or a parameter that is larger."""
    if work.ranks == 1 and not even_alone:
        return 0
    return min(work.trained_parameters, max(limit, work.largest_trained))


def _stage_0(work: Workload) -> States:
    """fp32: the client optimizer itself. bf16 and fp16: FP16_UnfusedOptimizer, whose fp32 gradients live in the step.

    On a GPU our optimizers need none, but their first step moves each list of fp32 tensors into a flat one.
    """
    count = work.trained_parameters
    master, kept = _optimizer(work, count)
    half = work.width < FP32
    moved = OPTIMIZERS.get(work.optimizer).flat_copies if work.accelerator != "cpu" else 0
    step = FP32 * count * max(int(half), moved)
    return States(
        parameters=work.width * work.parameters,
        master=master if half else 0,
        gradients=work.width * count,
        optimizer=kept,
        reduction=work.width * _flattened(work, WHOLE_REDUCTION),
        step=step,
    )


def _bf16_stage_1(work: Workload) -> States:
    """BF16_Optimizer: whole fp32 gradients, and the bf16 ones, which it zeroes and keeps.

    The fp32 gradients are flattened once more for the reduction, and again in bf16, in which they travel.
    """
    count = work.trained_parameters
    master, kept = _optimizer(work, work.share)
    flat = _flattened(work, WHOLE_REDUCTION)
    return States(
        parameters=work.width * work.parameters,
        master=master,
        gradients=(FP32 + work.width) * count,
        optimizer=kept,
        reduction=max((FP32 + work.width) * flat, FP32 * work.largest_trained),
        step=_gathered(work),
    )


def _stage_1_and_2(work: Workload) -> States:
    """DeepSpeedZeroOptimizer.

    Stage 1 keeps whole gradients until the last micro-batch, and then reduces them through the bucket; what was copied
    there is freed. Stage 2 keeps the rank's part, in bf16 in a flat fp32 tensor that the step takes as it is. In other
    precisions each micro-batch fills a new part beside the accumulated one, and the step flattens and widens it.
    """
    count, share, width = work.trained_parameters, work.share, work.width
    master, kept = _optimizer(work, share)
    bucket = width * work.bucket * (2 if work.overlaps else 1)
    compact = work.stage == 2 and work.precision == "bf16"
    flat = width * _flattened(work, work.bucket, even_alone=compact)
    if compact:  # a reduced slice is widened before it is added
        flat += FP32 * min(share, work.largest_trained)
    part = 0 if compact else width * share
    widened = FP32 * share if width < FP32 and not compact else 0
    if work.stage == 1:
        gradients = width * count
        reduction = bucket + flat + part - width * min(count, work.bucket)
        step = 2 * part + widened - gradients
    else:
        gradients = FP32 * share if compact else part
        reduction = bucket + flat + (part if work.accumulates else 0)
        step = part + widened
    found = States(
        parameters=width * work.parameters,
        master=master,
        gradients=gradients,
        optimizer=kept,
        passes=bucket,
        reduction=max(reduction, 0),
        early=max(0.0, 1 - work.bucket / count) if work.stage == 2 else 0.0,
        step=max(step, _gathered(work) + part - gradients),
    )
    return _offloaded_1_and_2(work, found, compact) if work.offload_optimizer != "none" else found


def _offloaded_1_and_2(work: Workload, kept: States, compact: bool) -> States:
    """ZeRO-Offload: fp32 weights, moments and fp32 gradients in host memory, and the weights in e bytes once more.

    A buffer of the largest parameter goes on either side. bf16's accumulated part stays on the device.
    """
    share, width, largest = work.share, work.width, work.largest_trained
    accumulated = width * share if work.accumulates and not compact else 0
    host = kept.master + kept.optimizer + FP32 * share + width * share + accumulated + width * largest
    stays = kept.gradients if compact or work.stage == 1 else 0
    return replace(
        kept, master=0, optimizer=0, gradients=stays, always=width * largest, step=0, host=host, reduction=kept.passes
    )


def _stage_3(work: Workload) -> States:
    """DeepSpeedZeroOptimizer_Stage3: everything in parts, fp32 weights also beside fp32 weights, and a bucket for good.

    Gathered parameters stay while something within `stage3_max_reuse_distance` needs them: in a model below half of
    that all of them do, until the backward pass. The reduction sorts a bucket by rank into a copy, of which gloo makes
    another one.
    """
    count, share, width = work.trained_parameters, work.share, work.width
    master, kept = _optimizer(work, share)
    accumulated = width if work.precision == "fp16" else FP32
    reduced = min(count, max(work.bucket, work.largest_trained))
    copies = 2 if work.accelerator == "cpu" else 1
    persistent, live = _gathered_parameters(work)
    largest = width * work.largest_trained
    widened = FP32 * reduced // work.ranks if width < accumulated else 0
    found = States(
        parameters=width * -(-work.parameters // work.ranks),
        master=master,
        gradients=accumulated * share,
        optimizer=kept,
        always=width * (work.bucket + persistent),
        passes=width * live,
        reduction=copies * width * reduced + widened + (largest if live else 0),
        early=max(0.0, 1 - work.bucket / count),
        step=FP32 * min(share, SUB_GROUP),
    )
    return _offloaded_3(work, found)


def _gathered_parameters(work: Workload) -> tuple[int, int]:
    """Whole parameters of stage 3, in elements: small ones that always are, and those during the passes.

    Between its passes lie twice the parameters that follow a module, so those within half the distance stay; besides
    there are the module at work and what is fetched ahead.
    """
    if work.ranks == 1:
        return 0, 0
    shape = work.shape
    sizes = [size for size in shape.tensors() if size > work.stage3_param_persistence_threshold]
    others, working = sum(sizes), max(shape.layer_parameters(), shape.largest_parameter())
    stay = min(others, work.stage3_max_reuse_distance // 2 + working)
    ahead = min(others, work.stage3_prefetch_bucket_size, work.stage3_max_live_parameters)
    return shape.parameters() - others, stay + ahead


def _offloaded_3(work: Workload, kept: States) -> States:
    """ZeRO-Offload and ZeRO-Infinity: optimizer states and gradients, and parameters, in host memory or on NVMe."""
    share, host, nvme = work.share, 0, 0
    if work.offload_parameters != "none":
        host += kept.parameters
        kept = replace(kept, parameters=0)
    if work.offload_optimizer == "none":
        return replace(kept, host=host)
    moved = kept.master + kept.optimizer + FP32 * share
    buffers = ON_NVME * FP32 * min(share, SUB_GROUP)
    host += kept.gradients + (moved if work.offload_optimizer == "cpu" else buffers)
    nvme += moved if work.offload_optimizer == "nvme" else 0
    return replace(kept, master=0, optimizer=0, gradients=0, step=0, host=host, nvme=nvme)
