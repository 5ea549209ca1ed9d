"""Optimizer steps on CPUs: ours against torch's fused AdamW and DeepSpeed's CPUAdam, and the time of moving its bytes.

    python -m benchmarks.optimizer_step                 speed
    python -m benchmarks.optimizer_step --counts        bytes moved a parameter

Sizes are those of BERT-like models, as some 200 separate tensors. `DeepSpeedCPUAdam` joins with --deepspeed (it
compiles for a minute the first time, and needs ninja).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.common import emit, interleaved, options
from engine.optim import FusedAdamW, FusedLamb

#: width, layers and vocabulary
SIZES = {"24M": (384, 7, 30522), "110M": (768, 12, 30522)}
MAX_NORM, LOSS_SCALE = 1.0, 1024.0


def shapes(width: int, layers: int, vocabulary: int) -> list[tuple[int, ...]]:
    """The parameters of an encoder."""
    layer: list[tuple[int, ...]] = [(width, width), (width,)] * 4
    layer += [(4 * width, width), (4 * width,), (width, 4 * width), *[(width,)] * 5]
    return [(vocabulary, width), (512, width), (2, width), *layer * layers, (width, width), (width,)]


def parameters(size: str, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Weights with gradients, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in shapes(*SIZES[size]):
        p = nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtype))
        p.grad = (torch.randn(shape, generator=generator) * 1e-3).to(dtype)
        found.append(p)
    return found


def torch_step(size: str) -> Callable[[], object]:
    return torch.optim.AdamW(parameters(size), lr=1e-4, fused=True).step


def torch_with_passes(size: str, unscale: bool) -> Callable[[], object]:
    """Torch's fused step with the passes for clipping and a bf16 copy, and for unscaling."""
    params = parameters(size)
    copies = [p.detach().bfloat16() for p in params]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
    grads = [p.grad for p in params if p.grad is not None]

    def run() -> None:
        if unscale:
            torch._foreach_mul_(grads, 1.0)  # by 1, so that repeated runs see the same gradients
        torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
        optimizer.step()
        torch._foreach_copy_(copies, [p.detach() for p in params])

    return run


def ours_with_passes(kind: type[FusedAdamW] | type[FusedLamb], size: str) -> Callable[[], object]:
    """Unscale, clip, step and bf16 copy: the parameters are bf16 and their fp32 masters the state."""
    low = parameters(size, torch.bfloat16)
    for p in low:
        p.grad, p.grad_dtype = None, torch.float32
        p.grad = p.detach().float().mul_(0.05)
    optimizer = kind(low, lr=1e-4, max_grad_norm=MAX_NORM)
    return lambda: optimizer.step(grad_scale=1.0 / LOSS_SCALE)


def deepspeed_step(size: str) -> Callable[[], object]:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    step: Callable[[], object] = DeepSpeedCPUAdam(parameters(size), lr=1e-4, adamw_mode=True).step
    return step


def bandwidth_floor(elements: int) -> Callable[[], object]:
    """AdamW's 28 bytes a parameter (four fp32 arrays read, three written in place) at measured bandwidth.

    An addition in place moves 12 bytes an element: two arrays read, one of them written where it was read.
    """
    target, source = torch.ones(elements * 7 // 3), torch.ones(elements * 7 // 3)
    return lambda: target.add_(source)


def steps_alone(size: str, with_deepspeed: bool) -> dict[str, Callable[[], object]]:
    """The step and nothing else; ours is first."""
    elements = sum(p.numel() for p in parameters(size))
    runs: dict[str, Callable[[], object]] = {
        "AdamW: ours": FusedAdamW(parameters(size), lr=1e-4).step,
        "AdamW: torch fused": torch_step(size),
        "LAMB: ours": FusedLamb(parameters(size), lr=1e-4, max_grad_norm=0.0).step,
        "28 B/parameter at measured bandwidth": bandwidth_floor(elements),
    }
    if with_deepspeed:
        runs["AdamW: DeepSpeed CPUAdam"] = deepspeed_step(size)
    return runs


def steps_with_passes(size: str) -> dict[str, Callable[[], object]]:
    """Unscale, clip, step and bf16 copy; ours is first."""
    return {
        "AdamW: ours": ours_with_passes(FusedAdamW, size),
        "AdamW: torch fused": torch_with_passes(size, unscale=True),
        "AdamW: torch fused, no unscaling": torch_with_passes(size, unscale=False),
        "LAMB: ours": ours_with_passes(FusedLamb, size),
    }


def compare(title: str, runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, Any]:
    """Times of rivals as ratios to the first."""
    times = interleaved(runs, repeats)
    ours = next(iter(times.values()))
    ratios = {
        name: {"x ours": timing.median / ours.median, "x ours (best runs)": timing.best / ours.best}
        for name, timing in times.items()
    }
    return {"title": title, "rivals": {name: {**times[name].to_dict(), **ratios[name]} for name in times}}


def counts() -> list[dict[str, Any]]:
    """Bytes moved for a parameter with fp32 weights, gradients and moments, by counting loads and stores.

    Sources, as of November 2026: apex csrc/multi_tensor_adam.cu, multi_tensor_lamb.cu and multi_tensor_distopt_adam_*,
    DeepSpeed 0.19.8 csrc/adam/cpu_adam*, csrc/lamb/fused_lamb_cuda_kernel.cu, torch 2.13 fused_adam_utils.cuh.
    """
    table = {
        "AdamW, ours: g p m v read, p m v written; factor and copy in the pass": (28, 4, 2, 34),
        "AdamW, torch fused: clipping reads, then reads and writes; a cast for the copy": (28, 12, 6, 46),
        "AdamW, apex FusedAdam: as torch": (28, 12, 6, 46),
        "AdamW, apex DistributedFusedAdam: as ours": (28, 4, 2, 34),
        "AdamW, DeepSpeed CPUAdam: as torch": (28, 12, 6, 46),
        "LAMB, ours: pass 1 g p m v read, m v written; pass 2 p m v read, p written": (40, 4, 2, 46),
        "LAMB, apex FusedLAMB: norms apart, update written over the gradient": (48, 4, 6, 58),
        "LAMB, DeepSpeed (CUDA only, no bf16): as ours, three launches a tensor": (40, 4, 2, 46),
    }
    names = ("step", "clipping adds", "16-bit copy adds", "all")
    rivals = {name: dict(zip(names, row, strict=True)) for name, row in table.items()}
    return [{"title": "Bytes a parameter", "rivals": rivals}]


def main() -> None:
    parser = options(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="model sizes")
    parser.add_argument("--deepspeed", action="store_true", help="compare with DeepSpeedCPUAdam")
    parser.add_argument("--counts", action="store_true", help="bytes moved a parameter in place of times")
    args = parser.parse_args()
    if args.counts:
        return emit(counts(), args.json)
    results = []
    for size in args.sizes:
        for threads in args.threads:
            torch.set_num_threads(threads)
            where = f"{size} parameters, {threads} thread(s)"
            results.append(compare(f"{where}, step alone", steps_alone(size, args.deepspeed), args.repeats))
            work = f"{where}, unscale + clip + step + bf16 copy"
            results.append(compare(work, steps_with_passes(size), args.repeats))
            if not args.json:
                emit(results[-2:], as_json=False)
    return emit(results, as_json=True) if args.json else None


if __name__ == "__main__":
    main()
