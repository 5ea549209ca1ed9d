"""What an optimizer step costs: FLOPs, bytes communicated, and seconds under stated bandwidths. Pure arithmetic.

Predicted, never measured here. Matrix products alone count as FLOPs (a multiplication and an addition are two); the
backward pass costs two forward passes, and activation checkpointing adds a third (Korthikanti et al. 2022, section 5).
How long they take follows from the kernels of the passes (launch/forecast/kernels) at the rates that are attainable, or
from a share of the peak that somebody gave.
Communication follows Rajbhandari et al. 2020 (ZeRO), section 7, for Ψ parameters in the training precision, by a ring.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.config import OPTIMIZERS
from engine.model.adapters.flops import step_flops as needed_flops
from engine.model.flops import forward_flops
from launch.forecast.hardware import Hardware
from launch.forecast.kernels.bound import attainable, bound
from launch.forecast.kernels.counting import Step
from launch.forecast.kernels.step import passes
from launch.forecast.memory import Workload


@dataclass(frozen=True)
class StepCost:
    """One optimizer step of one rank."""

    flops: float
    communication: float
    """bytes that this rank sends, gradients and parameters together"""
    compute_seconds: float
    """of forward and backward passes, with the copies of their gradients"""
    utilisation: float
    """share of the peak that these are"""
    limit: str
    """what bounds them: compute, memory or launches; empty where the utilisation was given"""
    exposed_seconds: float
    """communication that no computation hides"""
    optimizer_seconds: float
    host_seconds: float
    """transfers to and from offloaded states that nothing hides"""

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.exposed_seconds + self.optimizer_seconds + self.host_seconds


def step_flops(work: Workload, accumulation: int) -> float:
    """FLOPs that a rank executes for a step; recomputation and teachers included."""
    given = (work.shape, [work.sequence_length], work.read_share * work.sequence_length)
    again = forward_flops(*given) if work.activation_checkpointing else 0.0
    taught = sum(forward_flops(teacher, *given[1:]) for teacher in work.teachers)
    needed = needed_flops(*given, work.trained, to_words=work.passes > 1)
    return (needed + again + taught) * work.sequences * accumulation


def communicated(work: Workload, accumulation: int) -> tuple[float, float]:
    """Bytes that a rank sends in a step for gradients and for parameters.

    Stages 0 and 1 reduce once a step, 2 and 3 after every micro-batch; stage 3 gathers the parameters for each forward
    and each backward pass, stages 1 and 2 once after the update. A ring reduce-scatter or all-gather over n ranks sends
    (n-1)/n of the data, an all-reduce twice that.
    """
    ring = (work.ranks - 1) / work.ranks
    size = work.trained_parameters * work.width * ring
    if work.stage == 0:
        return 2 * size, 0.0
    if work.stage == 3:
        return size * accumulation, 2 * work.parameters * work.width * ring * accumulation
    return size * (accumulation if work.stage == 2 else 1), size


def transfer_seconds(size: float, hardware: Hardware) -> float:
    """Seconds for each rank to send `size` bytes around a ring: the slower of the links in a node and the network."""
    within = size / hardware.link_bandwidth
    return max(within, size / hardware.network_bandwidth) if hardware.nodes > 1 else within


def exposed(work: Workload, accumulation: int, compute: float, hardware: Hardware) -> float:
    """Seconds of communication that computation can't hide.

    Gradients travel during the backward pass (the last one, where they travel once a step), at stage 0 after it;
    parameters of stage 3 during both passes; stages 1 and 2 gather the updated parameters after the step, behind
    nothing. On CPUs nothing overlaps.
    """
    gradients, parameters = (transfer_seconds(part, hardware) for part in communicated(work, accumulation))
    if hardware.accelerator == "cpu" or work.stage == 0:
        return gradients + parameters
    passes = 4 if work.activation_checkpointing else 3
    backward = compute * (passes - 1) / passes
    if work.stage == 3:
        return max(0.0, gradients + parameters - compute)
    return max(0.0, gradients - (backward if work.stage == 2 else backward / accumulation)) + parameters


def pass_seconds(work: Workload, accumulation: int, hardware: Hardware) -> tuple[float, str]:
    """Seconds of a step's forward and backward passes, and what bounds them where it isn't a given utilisation.

    Where a part of the weights is trained, they are taken to shrink as their FLOPs do, and with teachers to grow so.
    """
    if hardware.utilisation is not None:
        return step_flops(work, accumulation) / (hardware.peak_flops * hardware.utilisation), ""
    least = bound(passes(Step(work, accumulation)), attainable(hardware))
    everything = step_flops(replace(work, trained=None, teachers=()), accumulation)
    return least.seconds * step_flops(work, accumulation) / everything, least.limit


def step_cost(work: Workload, accumulation: int, hardware: Hardware) -> StepCost:
    """The cost of a step of so many passes, forward and backward (`accumulation`, here and above)."""
    flops = step_flops(work, accumulation)
    compute, limit = pass_seconds(work, accumulation, hardware)
    measured = hardware.accelerator == "cpu"
    bandwidth = hardware.memory_bandwidth if measured else attainable(hardware).memory_bandwidth
    shard = work.trained_parameters / (work.ranks if work.stage > 0 else 1)
    offloaded = work.offload_optimizer != "none"
    stepped = shard * OPTIMIZERS.get(work.optimizer).step_bytes
    update = stepped / bandwidth
    host = 0.0
    if offloaded:
        update = stepped / hardware.host_bandwidth
        host += shard * 2 * work.width / hardware.host_bandwidth
    if work.offload_parameters != "none":
        streamed = 2 * accumulation * shard * work.width / hardware.host_bandwidth
        host += max(0.0, streamed - compute)
    return StepCost(
        flops=flops,
        communication=sum(communicated(work, accumulation)),
        compute_seconds=compute,
        utilisation=flops / compute / hardware.peak_flops,
        limit=limit,
        exposed_seconds=exposed(work, accumulation, compute, hardware),
        optimizer_seconds=update,
        host_seconds=host,
    )
