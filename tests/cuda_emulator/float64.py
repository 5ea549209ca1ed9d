"""The kernels' results in float64, written from the papers' formulas and torch's own loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from engine.kernels.segments import Segments
from engine.kernels.terms import Adam, Trust


def cross_entropy64(logits: Tensor, target: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Loss [R] and its gradient [R, V] in float64; -100 is ignored."""
    exact = logits.double().requires_grad_()
    loss = cross_entropy(exact, target, ignore_index=-100, label_smoothing=smoothing, reduction="none")
    loss.sum().backward()
    assert exact.grad is not None
    return loss.detach(), exact.grad


@dataclass
class State64:
    """Weights and moments [N] of an optimizer in float64."""

    param: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def step64(
    state: State64, grad: Tensor, segments: Segments, adam: Adam, grad_scale: Tensor, trust: Trust | None
) -> Tensor:
    """One step of AdamW, or of LAMB with `trust`, in place; the trust ratios [S]. All gradients must be finite."""
    scaled = grad.double() * grad_scale.double()
    correction1 = 1 - adam.beta1**adam.step if adam.bias_correction else 1.0
    correction2 = 1 - adam.beta2**adam.step if adam.bias_correction else 1.0
    ratios = torch.ones(len(segments.length), dtype=torch.float64)
    for index, part in enumerate(segments.ranges()):
        decay = float(segments.weight_decay[index])
        m, v, p = state.exp_avg[part], state.exp_avg_sq[part], state.param[part]
        m.mul_(adam.beta1).add_(scaled[part], alpha=1 - adam.beta1)
        v.mul_(adam.beta2).add_(scaled[part] ** 2, alpha=1 - adam.beta2)
        update = m / correction1 / (v.sqrt() / math.sqrt(correction2) + adam.eps) + decay * p
        if trust and bool(segments.trust[index]) and (trust.nvlamb or decay):
            ratio = p.norm() / update.norm() if p.norm() > 0 and update.norm() > 0 else torch.tensor(1.0)
            ratios[index] = min(float(ratio), trust.clamp or math.inf)
        p.sub_(update * (adam.lr * ratios[index]))
    return ratios


def error(measured: Tensor, exact: Tensor) -> float:
    """Largest error relative to the largest value; infinite for NaN, so that a comparison with it fails."""
    if not measured.numel():
        return 0.0
    worst = float((measured.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))
    return math.inf if math.isnan(worst) else worst
