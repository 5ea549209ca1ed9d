"""Loss of the MLM decoder, forward and backward: ours against torch's and Apple's, and against its GEMMs alone.

    python -m benchmarks.fused_loss                     speed (minutes)
    python -m benchmarks.fused_loss --accuracy          bf16 error against float64
    python -m benchmarks.fused_loss --counts            bytes moved a logit

`cut-cross-entropy` joins when it is installed (it needs triton to be importable, on CPUs too).
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks.common import emit, interleaved, options
from engine.kernels import linear_cross_entropy

VOCABULARY = 30522
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def inputs(rows: int, hidden: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, decoder weight, bias and targets, drawn so that the loss is near log(V)."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype).requires_grad_()

    target = torch.randint(0, VOCABULARY, (rows,), generator=generator).to(device)
    return draw(rows, hidden, scale=1.0), draw(VOCABULARY, hidden, scale=0.02), draw(VOCABULARY, scale=0.1), target


def ours(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    loss = linear_cross_entropy(hidden, weight, bias, target, reduction="mean")
    assert isinstance(loss, Tensor)
    return loss


def torch_low(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), target)


def torch_fp32(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), target)


def torch_chunked(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    chunks = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, target, linear_bias=bias, options=chunks)


def rivals(dtype: torch.dtype) -> dict[str, Loss]:
    """Every implementation that this machine has."""
    found: dict[str, Loss] = {"ours": ours, "F.cross_entropy(F.linear)": torch_low}
    if dtype != torch.float32:
        found["F.cross_entropy(F.linear.float())"] = torch_fp32
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["F.linear_cross_entropy(options)"] = torch_chunked
    try:
        from cut_cross_entropy import linear_cross_entropy as cut
    except ImportError:
        return found
    found["cut-cross-entropy (no bias)"] = lambda h, w, b, t: cut(h, w, t, impl="torch_compile")
    return found


def train(loss: Loss, tensors: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Forward and backward, gradients dropped."""
    loss(*tensors).backward()
    for tensor in tensors[:3]:
        tensor.grad = None


def gemms(tensors: tuple[Tensor, Tensor, Tensor, Tensor], with_bias: bool) -> Callable[[], object]:
    """The three products that no implementation can avoid: logits, and gradients of hidden states and weight."""
    hidden, weight, bias = (tensor.detach() for tensor in tensors[:3])
    slope = F.linear(hidden, weight)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        return F.linear(hidden, weight, bias if with_bias else None), slope @ weight, slope.t() @ hidden

    return run


def compare(
    rows: int, hidden: int, name: str, threads: int, repeats: int, memory: bool, without: list[str]
) -> dict[str, Any]:
    """Times of all rivals on one shape, as ratios to the GEMMs and to ours, and their peak extra memory."""
    torch.set_num_threads(threads)
    tensors = inputs(rows, hidden, DTYPES[name])
    losses = {rival: loss for rival, loss in rivals(DTYPES[name]).items() if not any(part in rival for part in without)}
    runs: dict[str, Callable[[], object]] = {
        "GEMMs alone": gemms(tensors, with_bias=False),
        "GEMMs alone, torch adding the bias": gemms(tensors, with_bias=True),
    }
    runs |= {rival: functools.partial(train, loss, tensors) for rival, loss in losses.items()}
    times = interleaved(runs, repeats)
    results: dict[str, dict[str, float]] = {}
    for rival, timing in times.items():
        ratios = {
            "x GEMMs": timing.median / times["GEMMs alone"].median,
            "x GEMMs (best runs)": timing.best / times["GEMMs alone"].best,
            "x ours": timing.median / times["ours"].median,
        }
        results[rival] = {**timing.to_dict(), **ratios}
        if memory and rival in losses:
            results[rival]["extra_MB"] = peak_memory(rival, rows, hidden, name)
    return {"title": f"{rows} x {hidden} -> {VOCABULARY}, {name}, {threads} thread(s)", "rivals": results}


def peak_memory(rival: str, rows: int, hidden: int, name: str) -> float:
    """Peak resident memory that a forward and backward add in a fresh process, in MB."""
    command = [sys.executable, "-m", "benchmarks.fused_loss", "--peak", rival, str(rows), str(hidden), name]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return float(done.stdout.split()[-1])


def print_peak(rival: str, rows: int, hidden: int, name: str) -> None:
    """Child of `peak_memory`: warms up on a few rows, resets the high-water mark and trains once."""
    torch.set_num_threads(1)
    loss = rivals(DTYPES[name])[rival]
    train(loss, inputs(8, hidden, DTYPES[name]))
    tensors = inputs(rows, hidden, DTYPES[name])
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123
        file.write("5")
    train(loss, tensors)
    print((status("VmHWM") - before) / 1e3)


def status(field: str) -> int:
    """A field of this process's status, in kB."""
    with open("/proc/self/status") as file:  # noqa: PTH123
        return next(int(line.split()[1]) for line in file if line.startswith(field))


def accuracy() -> list[dict[str, Any]]:
    """Errors in bf16 against float64 on 1024 x 768."""
    tensors = inputs(1024, 768, torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors[:3]]
    true = F.cross_entropy(F.linear(*exact), tensors[3])
    true.backward()
    results: dict[str, dict[str, float]] = {}
    for rival, loss in rivals(torch.bfloat16).items():
        value = loss(*tensors)
        value.backward()
        results[rival] = {"loss": value.item(), "loss error": abs(value.item() - true.item())}
        for name, tensor, truth in zip(("hidden", "weight", "bias"), tensors[:3], exact, strict=True):
            if tensor.grad is None or truth.grad is None:
                continue  # Apple's has no bias
            results[rival][f"{name} grad"] = float((tensor.grad - truth.grad).norm() / truth.grad.norm())
            tensor.grad = None
    return [{"title": f"bf16 against float64 (true loss {true.item():.5f})", "rivals": results}]


def counts() -> list[dict[str, Any]]:
    """Traffic of bf16 logits between the GEMMs, forward and backward, by counting loads and stores in the sources.

    Sources, as of November 2026: apex contrib/csrc/xentropy/xentropy_kernel.cu, Liger-Kernel cross_entropy.py, quack
    cross_entropy.py, DeepSpeed runtime/chunked_cross_entropy.py, ml-cross-entropy, torch's SoftMax.cu and Loss.cu.
    """
    table = {
        "ours, CPU (row in second-level cache)": ("1 read, 1 write", 4, 2),
        "ours, CUDA, row in registers": ("1 read, 1 write", 4, 2),
        "ours, CUDA, two passes": ("2 reads, 1 write", 6, 2),
        "Liger cross-entropy, in place": ("2 reads, 1 write", 6, 2),
        "quack, row in shared memory": ("1 read; 1 read, 1 write", 6, 2),
        "DeepSpeed chunked cross-entropy": ("1 read; 1 read, 1 write", 6, 2),
        "apex xentropy, a new array for the gradient": ("2 reads; 1 read, 1 write", 8, 2),
        "torch, fp32 softmax": ("2 casts, log_softmax, nll, and their backward passes", 48, 4),
        "Apple CCE (recomputes logits: a fourth GEMM)": ("none", 0, 0),
    }
    names = ("passes", "bytes a logit", "bytes kept until backward")
    rivals = {name: dict(zip(names, row, strict=True)) for name, row in table.items()}
    return [{"title": "Traffic of bf16 logits beside the GEMMs' own", "rivals": rivals}]


def main() -> None:
    parser = options(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rows", type=int, nargs="+", default=[307, 1280], help="masked rows")
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 768], help="hidden sizes")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="number types")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="TEXT", help="leave out rivals with this in the name"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory (a process each)")
    parser.add_argument("--accuracy", action="store_true", help="errors in place of times")
    parser.add_argument("--counts", action="store_true", help="bytes moved a logit in place of times")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        rival, rows, hidden, name = args.peak
        return print_peak(rival, int(rows), int(hidden), name)
    if args.accuracy or args.counts:
        return emit([*(accuracy() if args.accuracy else []), *(counts() if args.counts else [])], args.json)
    results = []
    for rows in args.rows:
        for hidden in args.hidden:
            for name in args.dtypes:
                for threads in args.threads:
                    memory = not args.no_memory and threads == args.threads[0]
                    results.append(compare(rows, hidden, name, threads, args.repeats, memory, args.without))
                    if not args.json:
                        emit(results[-1:], as_json=False)
    return emit(results, as_json=True) if args.json else None


if __name__ == "__main__":
    main()
