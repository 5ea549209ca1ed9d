"""Inputs and float64 truths that the kernels' tests share."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from engine.kernels.segments import Segments
from engine.kernels.terms import Adam, Sequences

#: bound of a kernel's error: that of plain torch in the same precision, times and plus these
FACTOR = 2.0
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
STEP = Adam(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-6, step=3)


def logits(kind: str, rows: int, classes: int, dtype: torch.dtype) -> Tensor:
    """Rows of a kind: normal, extreme (+-1e4), equal or steep (one logit far above the others)."""
    generator = torch.Generator().manual_seed(rows + classes)
    drawn = torch.randn(rows, classes, generator=generator)
    if kind == "extreme":
        drawn = drawn.sign() * 1e4
    elif kind == "equal":
        drawn = torch.full_like(drawn, 3.25)
    elif kind == "steep":
        drawn[:, classes // 2] = 60.0
    return drawn.to(dtype)


def targets(rows: int, classes: int) -> Tensor:
    """Random classes; every fifth row is ignored (-100)."""
    target = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(rows))
    target[::5] = -100
    return target


def cross_entropy_truth(logits: Tensor, target: Tensor, smoothing: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Row losses and the gradient of their sum, computed by torch in `dtype` and returned in float64."""
    x = logits.detach().to(dtype).requires_grad_()
    loss = F.cross_entropy(x, target, reduction="none", label_smoothing=smoothing)
    loss.sum().backward()
    assert x.grad is not None
    return loss.detach().double(), x.grad.double()


def error(value: Tensor, truth: Tensor) -> float:
    """Largest error, relative to the largest true value or 1; NaN counts as infinite."""
    if not truth.numel():
        return 0.0
    worst = ((value.double() - truth).abs().max() / truth.abs().max().clamp(min=1.0)).item()
    return math.inf if math.isnan(worst) else worst


def optimizer_buffers(size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights, gradients in `dtype` and moments of a run under way."""
    generator = torch.Generator().manual_seed(size)
    return {
        "param": torch.randn(size, generator=generator),
        "grad": torch.randn(size, generator=generator).to(dtype),
        "exp_avg": torch.randn(size, generator=generator) * 0.1,
        "exp_avg_sq": torch.rand(size, generator=generator) * 0.01,
    }


def segments(lengths: list[int], gap: int = 2, decays: tuple[float, ...] = (0.1, 0.0)) -> tuple[Segments, int]:
    """Segments with gaps of padding between them, and the size of the buffer."""
    offsets = [sum(lengths[:index]) + gap * (index + 1) for index in range(len(lengths))]
    decay = [decays[index % len(decays)] for index in range(len(lengths))]
    return Segments.build(offsets, lengths, decay), sum(lengths) + gap * (len(lengths) + 1)


def adam_truth(
    buffers: dict[str, Tensor],
    table: Segments,
    scale: float,
    *,
    lamb: bool,
    clamp: float = math.inf,
    nvlamb: bool = True,
) -> dict[str, Tensor]:
    """Weights and moments after `STEP` in float64, straight from the papers' equations."""
    p, g, m, v = (tensor.double().clone() for tensor in buffers.values())
    ratios = []
    for part, decay in zip(table.ranges(), table.weight_decay.double().tolist(), strict=True):
        m[part] = 0.9 * m[part] + 0.1 * g[part] * scale
        v[part] = 0.999 * v[part] + 0.001 * (g[part] * scale) ** 2
        update = m[part] / (1 - 0.9**3) / ((v[part] / (1 - 0.999**3)).sqrt() + 1e-6) + decay * p[part]
        scaled = lamb and (nvlamb or decay != 0.0)
        ratios.append(min(clamp, float(p[part].norm() / update.norm())) if scaled else 1.0)
        p[part] -= 1e-2 * ratios[-1] * update
    return {"param": p, "exp_avg": m, "exp_avg_sq": v, "ratio": torch.tensor(ratios, dtype=torch.float64)}


def packed(lengths: list[int], read: Tensor | None = None) -> Sequences:
    """Sequences of so many tokens, of which all ask, or those `read`."""
    sequences = Sequences.of(torch.tensor(lengths), sum(lengths), max(lengths))
    return sequences if read is None else sequences.asking(read)
