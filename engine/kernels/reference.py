"""Plain-torch versions of the kernels: the oracle of their tests, and what runs where no kernel can.

Formulas: softmax cross-entropy with label smoothing (Szegedy et al. 2016, section 7); AdamW (Loshchilov & Hutter 2019,
algorithm 2); LAMB (You et al. 2020, algorithm 2, with L2 norms).
Shape legend: R rows, V classes, N elements, S segments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.kernels.segments import Segments


def softmax_cross_entropy_(
    logits: Tensor, target: Tensor, scale: Tensor, *, ignore_index: int, label_smoothing: float, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row, and its gradient in place of the logits.

    Args:
        logits: [R, V] fp32, bf16 or fp16; with `gradient`, overwritten by d(loss)/d(logits) * scale.
        target: [R] int64 classes, or `ignore_index` for rows of loss and gradient 0.
        scale: [] fp32.
        label_smoothing: share of the target distribution that is spread evenly over the classes.

    Returns:
        loss [R] fp32, in nats; hit [R] bool, whether the target is the first maximum (never with a NaN in the row).
    """
    classes = logits.shape[1]
    kept = target != ignore_index
    index = target.where(kept, 0)[:, None]
    log_probability = logits.float().log_softmax(-1)
    picked = log_probability.gather(1, index).squeeze(1)
    loss = -(1.0 - label_smoothing) * picked
    if label_smoothing > 0.0:
        loss = loss - label_smoothing * log_probability.mean(-1)
    best = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
    hit = kept & (best == target) & ~logits.isnan().any(-1)
    if gradient:
        slope = log_probability.exp_() - label_smoothing / classes
        slope.scatter_add_(1, index, slope.new_full(index.shape, label_smoothing - 1.0))
        logits.copy_((slope * scale).where(kept[:, None], 0.0))
    return loss.where(kept, 0.0), hit


def global_norm(grad: Tensor, segments: Segments) -> Tensor:
    """L2 norm, [] fp32, of the elements of `grad` ([N] fp32, bf16 or fp16) that lie in segments."""
    norms = [grad[part].double().norm() for part in segments.ranges()]
    return torch.stack(norms).norm().float() if norms else grad.new_zeros((), dtype=torch.float32)


def adam_direction_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    bias_correction: bool,
    weight_decay: float,
    grad_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """Update the moments of one segment where the scaled gradient is finite.

    Returns:
        finite [n] bool and the update direction mhat / (sqrt(vhat) + eps) + weight_decay * param [n].
    """
    scaled = grad.float() * grad_scale
    finite = scaled.isfinite()
    exp_avg.copy_(torch.where(finite, beta1 * exp_avg + (1.0 - beta1) * scaled, exp_avg))
    exp_avg_sq.copy_(torch.where(finite, beta2 * exp_avg_sq + (1.0 - beta2) * scaled * scaled, exp_avg_sq))
    correction1, correction2 = bias_corrections(beta1, beta2, step, bias_correction)
    denominator = exp_avg_sq.sqrt() / math.sqrt(correction2) + eps
    return finite, exp_avg / correction1 / denominator + weight_decay * param


def bias_corrections(beta1: float, beta2: float, step: int, bias_correction: bool) -> tuple[float, float]:
    """1 - beta^step of both moments; 1 without correction."""
    return (1.0 - beta1**step, 1.0 - beta2**step) if bias_correction else (1.0, 1.0)


def adamw_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    segments: Segments,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    bias_correction: bool,
    grad_scale: Tensor,
) -> Tensor:
    """One AdamW step over every segment.

    Args:
        param, exp_avg, exp_avg_sq: [N] fp32, updated in place.
        grad: [N] fp32, bf16 or fp16, left alone.
        copy: [N] bf16 or fp16, receives the new weights; None for no copy.
        step: number of this step, from 1, for the bias correction.
        grad_scale: [] fp32, multiplies the gradients: loss unscaling times clipping.

    Returns:
        [] int32, 1 if a scaled gradient was not finite. Such an element keeps its weight and moments.
    """
    nonfinite = torch.zeros((), dtype=torch.int32, device=param.device)
    for part, decay in zip(segments.ranges(), segments.weight_decay.tolist(), strict=True):
        finite, direction = adam_direction_(
            param[part],
            grad[part],
            exp_avg[part],
            exp_avg_sq[part],
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            step=step,
            bias_correction=bias_correction,
            weight_decay=decay,
            grad_scale=grad_scale,
        )
        _apply(param[part], None if copy is None else copy[part], direction * lr, finite)
        nonfinite |= (~finite).any()
    return nonfinite


def lamb_step_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    segments: Segments,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    bias_correction: bool,
    grad_scale: Tensor,
    trust_clamp: float | None,
    nvlamb: bool,
) -> tuple[Tensor, Tensor]:
    """One LAMB step over every segment; arguments as in `adamw_step_`, and

    Args:
        trust_clamp: largest trust ratio; None for no bound.
        nvlamb: scale segments without weight decay by their trust ratio too (NVIDIA's `use_nvlamb`).

    Returns:
        nonfinite as in `adamw_step_`; ratio [S] fp32, the trust ratio of each segment.
    """
    nonfinite = torch.zeros((), dtype=torch.int32, device=param.device)
    ratios = torch.ones_like(segments.weight_decay)
    scaled = segments.trust & (segments.weight_decay != 0.0) if not nvlamb else segments.trust
    rows = zip(segments.ranges(), segments.weight_decay.tolist(), scaled.tolist(), strict=True)
    for index, (part, decay, by_trust) in enumerate(rows):
        finite, direction = adam_direction_(
            param[part],
            grad[part],
            exp_avg[part],
            exp_avg_sq[part],
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            step=step,
            bias_correction=bias_correction,
            weight_decay=decay,
            grad_scale=grad_scale,
        )
        if by_trust:
            ratios[index] = trust_ratio(param[part].norm(), direction.where(finite, 0.0).norm(), trust_clamp)
        _apply(param[part], None if copy is None else copy[part], direction * (lr * ratios[index]), finite)
        nonfinite |= (~finite).any()
    return nonfinite, ratios


def trust_ratio(weight_norm: Tensor, update_norm: Tensor, clamp: float | None) -> Tensor:
    """|weights| / |update|, at most `clamp`; 1 where either is 0."""
    ratio = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
    return ratio if clamp is None else ratio.clamp(max=clamp)


def _apply(param: Tensor, copy: Tensor | None, change: Tensor, finite: Tensor) -> None:
    """Subtract `change` where `finite`, and refresh the low-precision copy."""
    param.sub_(change.where(finite, 0.0))
    if copy is not None:
        copy.copy_(param)
