"""Loss, optimizer, normalisation and GELU: ours, plain torch, plain torch compiled, and Liger where it is installed.

Ours are the public functions of the engine under `select("auto")`, which on a GPU without a kernel for one of them are
plain torch too: a ratio of 1.00 says so. Compiled means torch.compile, which fuses element-wise work by Triton as apex
and others do by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from benchmarks.fused_loss import VOCABULARY, inputs
from benchmarks.fused_loss import train as train_loss
from benchmarks.optimizer_step import SIZES, shapes
from benchmarks.proof.stage import Report, Setting
from benchmarks.proof.timing import Work, extra_bytes, table
from engine.kernels import dispatch, linear_cross_entropy, select
from engine.kernels.layers import normalised_sum
from engine.kernels.linear import linear_gelu
from engine.kernels.segments import Segments
from engine.kernels.terms import Adam, Trust

OURS, PLAIN, COMPILED = "ours", "plain torch", "plain torch, compiled"
Function = Callable[..., Tensor]


def under(kernels: Any, work: Work) -> Work:
    """The same work with another choice of kernels."""

    def run() -> None:
        select(kernels)
        work()

    return run


def compiled(function: Function, device: torch.device) -> dict[str, Function]:
    """The compiled function by its rival's name; none on a CPU, whose compiler takes a minute."""
    return {COMPILED: torch.compile(function, dynamic=False)} if device.type == "cuda" else {}


def trained(function: Function, tensors: list[Tensor], slope: Tensor) -> Work:
    """Forward and backward, gradients dropped."""

    def run() -> None:
        function(*tensors).backward(slope)
        for tensor in tensors:
            tensor.grad = None

    return run


def drawn(device: torch.device, *shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(device, torch.bfloat16).requires_grad_()


def loss_rivals(device: torch.device) -> dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]:
    """MLM losses of masked rows through the decoder."""

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        found = linear_cross_entropy(hidden, weight, bias, target, reduction="mean")
        assert isinstance(found, Tensor)
        return found

    def fp32(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), target)

    rivals = {OURS: ours, "torch, bf16 softmax": lambda h, w, b, t: F.cross_entropy(F.linear(h, w, b), t)}
    rivals["torch, fp32 softmax"] = fp32
    rivals |= {f"{name}, fp32 softmax": function for name, function in compiled(fp32, device).items()}
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return rivals
    liger = LigerFusedLinearCrossEntropyLoss()
    rivals["Liger, fused linear cross-entropy"] = lambda h, w, b, t: liger(w, h, t, b)
    return rivals


def loss_row(device: torch.device, rows: int, hidden: int) -> dict[str, Any]:
    tensors = inputs(rows, hidden, torch.bfloat16, device.type)

    def work(loss: Any) -> Work:
        return under("auto", lambda: train_loss(loss, tensors))

    runs = {name: work(loss) for name, loss in loss_rivals(device).items()}
    found = table(f"MLM loss, {rows} x {hidden} -> {VOCABULARY}, bf16, forward and backward", runs, device)
    for name, values in found["rivals"].items():
        if device.type == "cuda" and "median_ms" in values:
            values["extra MB"] = extra_bytes(runs[name], device) / 1e6
    return found


def adamw_formula(param: Tensor, grad: Tensor, mean: Tensor, square: Tensor, copy: Tensor, scale: Tensor) -> Tensor:
    """AdamW's step on flat tensors as plain torch, the first corrections as of a late step."""
    scaled = grad * scale
    mean.mul_(0.9).add_(scaled, alpha=0.1)
    square.mul_(0.999).addcmul_(scaled, scaled, value=0.001)
    param.sub_(1e-4 * (mean / (square.sqrt() + 1e-6) + 0.01 * param))
    return copy.copy_(param)


def optimizer_rows(device: torch.device, size: str) -> list[dict[str, Any]]:
    """Steps on flat fp32 tensors with a bf16 copy, as ZeRO's partitions are."""
    counts = [torch.Size(shape).numel() for shape in shapes(*SIZES[size])] if device.type == "cuda" else [5000, 70000]
    total = sum(counts)
    offsets = [sum(counts[:index]) for index in range(len(counts))]
    segments = Segments.build(offsets, counts, [0.01] * len(counts)).to(device)
    flats = [torch.rand(total, device=device) * 0.01 for _ in range(4)]
    copy, scale = torch.empty(total, dtype=torch.bfloat16, device=device), torch.ones((), device=device)
    adam = Adam(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-6, step=1000)
    select("auto")
    adamw, lamb = (dispatch.backend(device, name) for name in ("adamw", "lamb"))  # type: ignore[arg-type]
    norm = dispatch.backend(device, "norm")

    def torch_fused() -> None:
        grad = flats[1] * scale
        steps = [torch.full((), 1000.0, device=device)]
        options: dict[str, Any] = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "eps": 1e-6}
        options |= {"amsgrad": False, "maximize": False}
        torch._fused_adamw_([flats[0]], [grad], [flats[2]], [flats[3]], [], steps, **options)
        copy.copy_(flats[0])

    rivals: dict[str, Work] = {
        OURS: lambda: adamw.adamw_step_(*flats, copy, segments, adam, scale),
        "torch fused, scaled before and cast after": torch_fused,
        PLAIN: lambda: adamw_formula(*flats, copy, scale),
    }
    fused = compiled(adamw_formula, device)
    rivals |= {name: lambda step=step: step(*flats, copy, scale) for name, step in fused.items()}
    rivals["LAMB: ours"] = lambda: lamb.lamb_step_(*flats, copy, segments, adam, scale, Trust())
    step = table(
        f"optimizer step, {total / 1e6:.3g} M parameters in fp32, bf16 copy", rivals, device, moved=30.0 * total
    )
    norms: dict[str, Work] = {
        OURS: lambda: norm.global_norm(flats[1], segments),
        PLAIN: lambda: torch.linalg.vector_norm(flats[1]),
    }
    return [step, table(f"norm of {total / 1e6:.3g} M fp32 gradients", norms, device, moved=4.0 * total)]


def layer_rows(device: torch.device, tokens: int, hidden: int) -> list[dict[str, Any]]:
    """Dropout + residual + LayerNorm, and linear + GELU, forward and backward."""
    states, residual, slope = (drawn(device, tokens, hidden) for _ in range(3))
    weight, bias = drawn(device, hidden), drawn(device, hidden)

    def norm(states: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return normalised_sum(states, residual, weight, bias, 1e-12, dropout=0.1)

    def plain_norm(states: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(F.dropout(states, 0.1) + residual, weight.shape, weight, bias, 1e-12)

    wide, wide_bias = drawn(device, 4 * hidden, hidden, scale=0.02), drawn(device, 4 * hidden)
    wide_slope = drawn(device, tokens, 4 * hidden).detach()

    def plain_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias))

    rows = []
    for title, ours, plain, tensors, grad in (
        ("dropout + residual + LayerNorm", norm, plain_norm, [states, residual, weight, bias], slope.detach()),
        (f"linear -> {4 * hidden} + GELU", linear_gelu, plain_gelu, [states, wide, wide_bias], wide_slope),
    ):
        runs = {
            OURS: under("auto", trained(ours, tensors, grad)),
            "ours, kernels reference": under("reference", trained(ours, tensors, grad)),
        }
        runs |= {name: trained(function, tensors, grad) for name, function in compiled(plain, device).items()}
        rows.append(table(f"{title}, {tokens} x {hidden}, bf16, forward and backward", runs, device))
    return rows


def run(setting: Setting, report: Report) -> None:
    device = torch.device(setting.device)
    small = setting.toy
    rows, tokens, widths = (16, 64, (64,)) if small else (2456, 16384, (768, 1024))
    for hidden in widths:
        report.put(loss_row(device, rows, hidden))
        for row in layer_rows(device, tokens, hidden):
            report.put(row)
        if hidden == widths[0]:
            for row in optimizer_rows(device, "110M"):
                report.put(row)
