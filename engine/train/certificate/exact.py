"""One optimizer step in float64 over a whole parameter, as the papers write it, and how far a real step is from it.

Adam's moments, bias correction and update are algorithm 1 of Kingma & Ba 2015; the decoupled decay is algorithm 2 of
Loshchilov & Hutter 2019; LAMB's trust ratio is algorithm 2 of You et al. 2020 with phi the identity. Nothing here is
shared with the kernels, which it judges. Parameters are worked through in chunks, so that memory stays small.

Shape legend: n elements of a parameter, K of `FIELDS`, c elements of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import OptimConfig

#: rows of a recorded update; the last two are zero at the first step, and then left out
FIELDS = ("new_weight", "new_exp_avg", "new_exp_avg_sq", "weight", "gradient", "exp_avg", "exp_avg_sq")
#: elements of a chunk: its float64 temporaries stay in a core's second-level cache
CHUNK = 16384
#: distance of neighbouring fp32 numbers at 1
EPSILON = 2.0**-23
#: smallest fp32 number with all its digits
TINY = 2.0**-126
#: how many EPSILON of a weight its update may be off: AdamW's decay and subtraction each round the weight once, and the
#: decay's factor is rounded too
ROUNDINGS = 2.0


@dataclass(frozen=True)
class Rule:
    """What a configuration asks of one parameter at one step."""

    rate: float
    betas: tuple[float, float]
    eps: float
    decay: float
    """decoupled weight decay"""
    step: int
    """number of this update, from 1"""
    factor: float
    """multiplies the recorded gradient: one over the loss scale, times the clipping factor"""
    trusted: bool
    """whether LAMB scales the update by the trust ratio"""
    largest_ratio: float

    @classmethod
    def of(cls, config: OptimConfig, shape: Sequence[int], rate: float, step: int, factor: float) -> Rule:
        """The rule of a parameter of `shape`: vectors (biases, LayerNorm) have no decay, and by default no ratio."""
        decay = config.weight_decay if len(shape) >= 2 else 0.0
        trusted = config.name == "lamb" and (decay != 0.0 or config.nvlamb)
        largest = math.inf if config.max_trust_ratio is None else config.max_trust_ratio
        return cls(rate, config.betas, config.eps, decay, step, factor, trusted, largest)


@dataclass(frozen=True)
class Comparison:
    """How far a recorded update is from the exact one. Errors are fractions; NaN if something was not finite."""

    weights: float
    """largest error of a new weight beyond its rounding, over the largest term of the parameter's update"""
    exp_avg: float
    """largest error of the first moment, over its largest term"""
    exp_avg_sq: float
    """largest error of the second moment, over the largest one"""
    trust_ratio: float
    """the exact one; 1 where none is used"""
    weight_norm: float
    """L2 norm of the weights before the step"""
    update_norm: float
    """L2 norm of the exact change"""
    factor: float
    """what the gradient was multiplied by, from the first moment; NaN if the gradient is zero"""
    length: float
    """how far the weights moved along the exact change, 1 if as far as that; NaN if there is none"""

    @property
    def error(self) -> float:
        """The largest of the errors."""
        errors = (self.weights, self.exp_avg, self.exp_avg_sq)
        return math.nan if any(map(math.isnan, errors)) else max(errors)


@dataclass(frozen=True)
class _Exact:
    """A chunk's exact moments and update direction, [c] fp64, and the sizes of the terms that they are sums of."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    direction: Tensor
    """mhat / (sqrt(vhat) + eps) + decay * weight"""
    exp_avg_terms: Tensor
    direction_terms: Tensor


def compare(recorded: Tensor, rule: Rule) -> Comparison:
    """Compare a recorded update with the exact one.

    A sum whose terms cancel is only as exact as its terms, so errors are measured by the largest term (b1 |m| and
    (1 - b1) |g| for the first moment); at the first step, where m is 0, that is the result itself.

    Args:
        recorded: [K, n] fp32, the rows of `FIELDS`, or the first five at the first step.
    """
    squares = torch.stack([_squares(chunk, _exact(chunk, rule)) for chunk in _chunks(recorded)]).sum(0)
    weight_norm, direction_norm = squares.sqrt().tolist()
    ratio = _trust_ratio(weight_norm, direction_norm, rule)
    found = [_differences(chunk, _exact(chunk, rule), rule.rate * ratio) for chunk in _chunks(recorded)]
    off = torch.stack([maxima for maxima, _ in found]).amax(0).tolist()
    sums = torch.stack([products for _, products in found]).sum(0).tolist()
    beta1 = rule.betas[0]
    return Comparison(
        weights=_fraction(off[0], rule.rate * ratio * off[1]),
        exp_avg=_fraction(off[2], off[3]),
        exp_avg_sq=_fraction(off[4], off[5]),
        trust_ratio=ratio,
        weight_norm=weight_norm,
        update_norm=rule.rate * ratio * direction_norm,
        factor=rule.factor + sums[0] / ((1.0 - beta1) * sums[1]) if sums[1] > 0.0 else math.nan,
        length=sums[2] / (rule.rate * ratio * sums[3]) if rule.rate * ratio * sums[3] > 0.0 else math.nan,
    )


def _chunks(recorded: Tensor) -> Iterator[dict[str, Tensor]]:
    """Rows of FIELDS, [c] fp64 each."""
    for part in recorded.split(CHUNK, dim=1):
        rows = part.double()
        zero = torch.zeros_like(rows[0])
        yield dict(zip(FIELDS, [*rows, *[zero] * (len(FIELDS) - len(rows))], strict=True))


def _exact(chunk: dict[str, Tensor], rule: Rule) -> _Exact:
    (beta1, beta2), weight, gradient = rule.betas, chunk["weight"], chunk["gradient"] * rule.factor
    old, new = beta1 * chunk["exp_avg"], (1.0 - beta1) * gradient
    exp_avg_sq = beta2 * chunk["exp_avg_sq"] + (1.0 - beta2) * gradient.square()
    denominator = (exp_avg_sq / (1.0 - beta2**rule.step)).sqrt() + rule.eps
    denominator = denominator * (1.0 - beta1**rule.step)
    exp_avg, terms, decay = old + new, old.abs() + new.abs(), rule.decay * weight
    return _Exact(exp_avg, exp_avg_sq, exp_avg / denominator + decay, terms, terms / denominator + decay.abs())


def _squares(chunk: dict[str, Tensor], exact: _Exact) -> Tensor:
    """[2], the sums of squares of the weights and of the update direction."""
    return torch.stack([chunk["weight"].square().sum(), exact.direction.square().sum()])


def _trust_ratio(weight_norm: float, direction_norm: float, rule: Rule) -> float:
    if not rule.trusted or weight_norm == 0.0 or direction_norm == 0.0:
        return 1.0
    return min(weight_norm / direction_norm, rule.largest_ratio)


def _differences(chunk: dict[str, Tensor], exact: _Exact, rate: float) -> tuple[Tensor, Tensor]:
    """Largest differences beyond rounding, each with its largest term: [6]; products for `factor`, `length`: [4]."""
    weight, moved = chunk["weight"], chunk["weight"] - chunk["new_weight"]
    wanted = weight - rate * exact.direction
    rounding = ROUNDINGS * EPSILON * torch.maximum(weight.abs(), wanted.abs())
    pairs = [
        ((chunk["new_weight"] - wanted).abs() - rounding, exact.direction_terms),
        ((chunk["new_exp_avg"] - exact.exp_avg).abs() - TINY, exact.exp_avg_terms),
        ((chunk["new_exp_avg_sq"] - exact.exp_avg_sq).abs() - TINY, exact.exp_avg_sq),
    ]
    maxima = torch.stack([value.amax() for pair in pairs for value in pair])
    gradient, direction = chunk["gradient"], exact.direction
    return maxima, torch.stack(
        [
            (chunk["new_exp_avg"] - exact.exp_avg).dot(gradient),
            gradient.dot(gradient),
            moved.dot(direction),
            direction.dot(direction),
        ]
    )


def _fraction(excess: float, scale: float) -> float:
    """excess / scale, where nothing in excess of nothing is no error."""
    if excess <= 0.0:
        return 0.0
    return excess / scale if scale != 0.0 else excess * math.inf
