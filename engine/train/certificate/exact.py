"""One optimizer step in float64 over a whole parameter, and how far a real step is from it.

The update itself is the optimizer's `ExactRule`, as its paper writes it. Nothing here is shared with the kernels, which
it judges. Parameters are worked through in chunks, so that memory stays small.

Shape legend: n elements of a parameter, S states of it, K = 3 + 2 S rows of `field_names`, c elements of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import OPTIMIZERS, OptimConfig
from engine.config.optimizer import ExactRule, ExactStep, Group

#: elements of a chunk on CPUs: its float64 temporaries stay in a core's second-level cache
CHUNK = 16384
#: on other devices: there are some 90 operators a chunk, and each is to last longer than its launch; the temporaries
#: take 160 bytes an element
DEVICE_CHUNK = 1 << 20
#: distance of neighbouring fp32 numbers at 1
EPSILON = 2.0**-23
#: smallest fp32 number with all its digits
TINY = 2.0**-126
#: how many EPSILON of a weight its update may be off: AdamW's decay and subtraction each round the weight once, and the
#: decay's factor is rounded too
ROUNDINGS = 2.0


def field_names(states: Sequence[str]) -> tuple[str, ...]:
    """Rows of a recorded update; the last, the states before it, are zero at the first step, and then left out."""
    return ("new_weight", *(f"new_{name}" for name in states), "weight", "gradient", *states)


@dataclass(frozen=True)
class Rule:
    """What a configuration asks of one parameter at one step."""

    exact: ExactRule
    states: tuple[str, ...]
    """names of the optimizer's states"""
    rate: float
    """the parameter's own learning rate"""
    factor: float
    """multiplies the recorded gradient: one over the loss scale, times the clipping factor"""
    roundings: float = ROUNDINGS

    @classmethod
    def of(
        cls, config: OptimConfig, group: Group, rate: float, step: int, factor: float, *, pulled: bool = False
    ) -> Rule:
        """The rule of a parameter of a group.

        Args:
            rate: the schedule's learning rate.
            step: number of this update, from 1.
            pulled: whether weights decay towards the start before it, which rounds them once more on either side.
        """
        entry = OPTIMIZERS.get(config.name)
        exact = entry.exact(config, group.weight_decay, step)
        return cls(exact, entry.states, rate * group.rate_multiplier, factor, ROUNDINGS + pulled)


@dataclass(frozen=True)
class Comparison:
    """How far a recorded update is from the exact one. Errors are fractions; NaN if something was not finite."""

    weights: float
    """largest error of a new weight beyond its rounding, over the largest term of the parameter's update"""
    states: dict[str, float]
    """of each state the largest error, over its largest term"""
    trust_ratio: float
    """the exact one; 1 where none is used"""
    weight_norm: float
    """L2 norm of the weights before the step"""
    update_norm: float
    """L2 norm of the exact change"""
    factor: float
    """what the gradient was multiplied by, from the first state; NaN if the gradient is zero or the state not linear"""
    length: float
    """how far the weights moved along the exact change, 1 if as far as that; NaN if there is none"""

    @property
    def error(self) -> float:
        """The largest of the errors."""
        errors = (self.weights, *self.states.values())
        return math.nan if any(map(math.isnan, errors)) else max(errors)


def compare(recorded: Tensor, rule: Rule) -> Comparison:
    """Compare a recorded update with the exact one.

    A sum whose terms cancel is only as exact as its terms, so errors are measured by the largest term (b1 |m| and
    (1 - b1) |g| for Adam's first moment); at the first step, where m is 0, that is the result itself.

    Args:
        recorded: [K, n] fp32, the rows of `field_names`, or all but the last S at the first step.
    """
    squares = torch.stack([_squares(chunk, _exact(chunk, rule)) for chunk in _chunks(recorded, rule)]).sum(0)
    weight_norm, direction_norm = squares.sqrt().tolist()
    ratio = rule.exact.scale(weight_norm, direction_norm)
    rate = rule.rate * ratio
    parts = [_differences(chunk, _exact(chunk, rule), rate, rule.roundings) for chunk in _chunks(recorded, rule)]
    (excess, term), *of_states = torch.stack([maxima for maxima, _ in parts]).amax(0).tolist()
    sums = torch.stack([products for _, products in parts]).sum(0).tolist()
    share = rule.exact.gradient_share
    return Comparison(
        weights=_fraction(excess, rule.rate * ratio * term),
        states={name: _fraction(*pair) for name, pair in zip(rule.states, of_states, strict=True)},
        trust_ratio=ratio,
        weight_norm=weight_norm,
        update_norm=rule.rate * ratio * direction_norm,
        factor=rule.factor + sums[0] / (share * sums[1]) if sums[1] > 0.0 else math.nan,
        length=sums[2] / (rule.rate * ratio * sums[3]) if rule.rate * ratio * sums[3] > 0.0 else math.nan,
    )


def chunk_on(device: torch.device) -> int:
    """Elements of a chunk; only the last bits of a comparison depend on them."""
    return CHUNK if device.type == "cpu" else DEVICE_CHUNK


def _chunks(recorded: Tensor, rule: Rule) -> Iterator[dict[str, Tensor]]:
    """Rows of a recorded update by name, [c] fp64 each."""
    names = field_names(rule.states)
    for part in recorded.split(chunk_on(recorded.device), dim=1):
        rows = part.double()
        zero = torch.zeros_like(rows[0])
        yield dict(zip(names, [*rows, *[zero] * (len(names) - len(rows))], strict=True))


def _exact(chunk: dict[str, Tensor], rule: Rule) -> ExactStep:
    return rule.exact.step(chunk | {"gradient": chunk["gradient"] * rule.factor})


def _squares(chunk: dict[str, Tensor], exact: ExactStep) -> Tensor:
    """[2], the sums of squares of the weights and of the update direction."""
    return torch.stack([chunk["weight"].square().sum(), exact.direction.value.square().sum()])


def _differences(chunk: dict[str, Tensor], exact: ExactStep, rate: float, roundings: float) -> tuple[Tensor, Tensor]:
    """Of the weights and each state the largest difference beyond rounding and the largest term; products.

    Returns:
        [1 + S, 2] and, for `factor` and `length`, [4].
    """
    weight, gradient, direction = chunk["weight"], chunk["gradient"], exact.direction.value
    moved, wanted = weight - chunk["new_weight"], weight - rate * direction
    rounding = roundings * EPSILON * torch.maximum(weight.abs(), wanted.abs())
    gains = {name: chunk[f"new_{name}"] - state.value for name, state in exact.states.items()}
    pairs = [((chunk["new_weight"] - wanted).abs() - rounding, exact.direction.terms)]
    pairs += [(gains[name].abs() - TINY, state.terms) for name, state in exact.states.items()]
    maxima = torch.stack([torch.stack([excess.amax(), terms.amax()]) for excess, terms in pairs])
    first = next(iter(gains.values()), torch.zeros_like(gradient))
    products = [(first, gradient), (gradient, gradient), (moved, direction), (direction, direction)]
    return maxima, torch.stack([left.dot(right) for left, right in products])


def _fraction(excess: float, scale: float) -> float:
    """excess / scale, where nothing in excess of nothing is no error."""
    if excess <= 0.0:
        return 0.0
    return excess / scale if scale != 0.0 else excess * math.inf
