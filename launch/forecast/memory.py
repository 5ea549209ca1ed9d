"""Forecast of the bytes that each rank of a training run takes: pure arithmetic, without torch.

A step goes through phases, and the peak is the largest of them: the backward pass at the MLM head or at the last layer,
where most activations are there; its end, where embedding gradients are; the reduction of the gradients; the
optimizer's step; and, at the first step, the certificate's comparison. Model states are there in each of them, so
`Forecast` adds to them the activations and the head, and to those what the largest phase needs beyond them, as buckets.

Assumed: full sequences; every step after the first, when all states exist; with `accumulates`, a micro-batch after the
first of its step, when gradients exist; DeepSpeed 0.19 as `launch.zero.build` configures it; our optimizers' kernels.
Not counted: the data loader, the interpreter and its libraries on the host, files in the page cache.

`launch.forecast.workload` says what is forecast, `launch.forecast.activations` and `launch.forecast.states` hold the
arithmetic, and benchmarks/memory_forecast.py compares it with what real ranks allocate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from engine.config import OPTIMIZERS
from launch.forecast.activations import passes
from launch.forecast.states import FP32, States, states
from launch.forecast.workload import Workload, shape_of

__all__ = ["Forecast", "Workload", "forecast", "largest_micro_batch", "shape_of"]

#: CUDA's context, the loaded kernels of torch, cuBLAS with its workspaces, and NCCL: not measured here. Contexts of
#: recent GPUs take 300 to 500 MiB (NVIDIA's own figures differ by driver and card), cuBLAS 32 MiB a handle on Hopper
#: (torch's CUBLAS_WORKSPACE_CONFIG default), NCCL some 100 to 200 MiB of channel buffers.
CUDA_LIBRARIES = 700 << 20
#: share of activations and buffers that the caching allocator holds in blocks of the wrong size: torch's round-up is
#: 2 MiB for large blocks; an assumption, since no GPU was measured
FRAGMENTATION = 0.05
#: `engine.train.certificate.exact.DEVICE_CHUNK` and the float64 temporaries of an element of it
DEVICE_CHUNK, DEVICE_CHUNK_BYTES = 1 << 20, 160


@dataclass(frozen=True)
class Forecast:
    """Bytes of one rank at the peak of a step; the first eight add up to `total`."""

    parameters: int
    """weights that the model, and teachers beside it, compute with: bf16, fp16 or fp32"""
    master: int
    """fp32 weights of the optimizer, where they are apart"""
    gradients: int
    """as they are accumulated"""
    optimizer: int
    """moments"""
    activations: int
    """of encoder and embeddings, at the peak of a micro-batch"""
    head: int
    """the head's rows and logits, and MLM's decoder's gradient, which waits for the embedding's"""
    buckets: int
    """communication buckets, flat copies, gathered parameters; where the step or the reduction needs more than the
    passes, also that"""
    margin: int
    """on GPUs context, libraries and fragmentation: `CUDA_LIBRARIES` and `FRAGMENTATION`; 0 on CPUs"""
    host: int
    """in host memory for offload, page-locked buffers too"""
    nvme: int
    startup: int = 0
    """host memory while a run starts: each rank builds the whole fp32 model, and for a moment a decoder's weight that
    isn't tied yet; freed when DeepSpeed has taken it over, so it is in no other sum. DeepSpeed's own start takes more
    than that and less than a step."""

    @property
    def model_states(self) -> int:
        """Weights, gradients and optimizer states, as Rajbhandari et al. 2020 count them."""
        return self.parameters + self.master + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """On the device; without host and NVMe."""
        return sum(self.kinds().values())

    def kinds(self) -> dict[str, int]:
        """The parts of the total by name."""
        return {
            "parameters": self.parameters,
            "master": self.master,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "head": self.head,
            "buckets": self.buckets,
            "margin": self.margin,
        }


def forecast(workload: Workload) -> Forecast:
    """The bytes of one rank, the largest where ranks differ."""
    kept, model_states, shape = passes(workload), states(workload), workload.shape
    head = kept.head
    activations = max(kept.peak - head, 0)
    # A first micro-batch finds no gradients where they are made anew: they grow while activations shrink.
    missing = 0 if workload.accumulates or workload.stage > 1 else model_states.gradients
    during = kept.kept + max(kept.head, kept.layer) + model_states.passes - missing
    ends = kept.end + model_states.passes
    reduction = model_states.reduction + round(model_states.early * kept.kept)
    peak = max(during, ends, reduction, model_states.step, _certificate(workload, model_states), 0)
    activations, head = _fit(activations, head, peak)
    buckets = model_states.always + peak - activations - head
    libraries = CUDA_LIBRARIES + round(FRAGMENTATION * (activations + head + buckets))
    return Forecast(
        parameters=model_states.parameters + workload.teachers_bytes,
        master=model_states.master,
        gradients=model_states.gradients,
        optimizer=model_states.optimizer,
        activations=activations,
        head=head,
        buckets=buckets,
        margin=libraries if workload.accelerator == "cuda" else 0,
        host=model_states.host,
        nvme=model_states.nvme,
        startup=FP32 * (workload.parameters + (shape.largest_parameter() if shape.decoder else 0)),
    )


def _fit(activations: int, head: int, room: int) -> tuple[int, int]:
    """Activations and head within the peak: less than their sum where they take the place of gradients to come."""
    head = min(head, room)
    return min(activations, room - head), head


def _certificate(workload: Workload, kept: States) -> int:
    """The comparison after the first step, when gradients are gone: copies, and whole parameters put together.

    Copies of the fp32 weights and gradients lie in host memory, which on CPUs is the same. The largest parameter is put
    together from fp32 tensors of its ranks' pieces (new weights and states, old weights, gradient): those sent, those
    received, and the whole. On GPUs the comparison's own float64 temporaries count.
    """
    if workload.verify_update == 0:
        return 0
    copies = 2 * FP32 * workload.share if workload.accelerator == "cpu" else 0
    rows = 3 + len(OPTIMIZERS.get(workload.optimizer).states)
    blocks = (2 if workload.ranks == 1 else 3) * rows * FP32 * workload.largest_trained
    chunk = min(DEVICE_CHUNK, workload.largest_trained) if workload.accelerator != "cpu" else 0
    freed = 0 if workload.stage == 3 else kept.gradients
    return copies + max(blocks + DEVICE_CHUNK_BYTES * chunk - freed, kept.step)


def largest_micro_batch(workload: Workload, memory: int, *, limit: int) -> int | None:
    """The largest micro-batch of at most `limit` whose forecast fits into `memory` bytes; None if not even 1 does.

    On CPUs the start has to fit too.
    """
    fits, beyond = 0, limit + 1
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        guess = forecast(replace(workload, micro_batch=middle))
        startup = guess.startup if workload.accelerator == "cpu" else 0
        if max(guess.total, startup) <= memory:
            fits = middle
        else:
            beyond = middle
    return fits or None
