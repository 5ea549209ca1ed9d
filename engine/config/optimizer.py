"""What an optimizer says of itself, and the table of optimizers; without torch, so that a command line can ask.

`engine.optim` has the optimizers. Whoever adds one derives from `OptimizerEntry` and registers an instance.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.config.methods.adapter import Frozen, frozen_parts
from engine.errors import UserError, require
from engine.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from engine.config.optim import OptimConfig


#: the part that is outside of the encoder
HEAD = "head"
#: in the names of IA3's vectors, which peft keeps as matrices
SCALE = ".ia3_l."
#: in a parameter's name, the number of its encoder layer: BERT's, and ModernBERT's
LAYER = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.")


@dataclass(frozen=True)
class Group:
    """Parameters that are updated with the same terms."""

    names: tuple[str, ...]
    weight_decay: float
    rate_multiplier: float = 1.0
    """the learning rate of these parameters, over that of the schedule"""


@dataclass(frozen=True)
class ExactSum:
    """Exact values, [c] fp64, and the sizes of the terms that they are sums of, by which errors are measured."""

    value: Tensor
    terms: Tensor


@dataclass(frozen=True)
class ExactStep:
    """What a step makes of a part of a parameter: new weights are weight - rate * scale * direction."""

    states: dict[str, ExactSum]
    """the new states, by name"""
    direction: ExactSum


class ExactRule(ABC):
    """The update of one parameter at one step, as the optimizer's paper writes it; shares nothing with its kernels."""

    @abstractmethod
    def step(self, old: Mapping[str, Tensor]) -> ExactStep:
        """The step of some elements.

        Args:
            old: [c] fp64 each: weight, gradient (unscaled and clipped), and the states by name, zero before the first
                step.
        """

    def scale(self, weight_norm: float, direction_norm: float) -> float:
        """What multiplies the direction, from the L2 norms of the whole parameter: a trust ratio."""
        return 1.0

    @property
    def gradient_share(self) -> float:
        """What the first state gains for each unit of the gradient, to tell what a wrong gradient was multiplied by.

        NaN where the first state is no linear function of the gradient.
        """
        return math.nan


class OptimizerEntry(ABC):
    """An optimizer under a name of `optim.name`.

    Attributes:
        states: names, in torch's `state`, of the states that have an fp32 element for each of the parameter's.
        step_bytes: bytes per parameter that a step reads and writes, with the copy of half precision.
        options: fields of OptimConfig that the optimizer reads, besides those of the rate, the schedule and clipping.
        deepspeed_types: what `optimizer.type` of a DeepSpeed JSON calls it, the plainest first.
        flat_copies: fp32 tensors of all parameters that a step at stage 0 makes on a GPU.
    """

    states: tuple[str, ...]
    step_bytes: int
    options: frozenset[str]
    deepspeed_types: tuple[str, ...] = ()
    flat_copies: int = 0

    def groups(self, shapes: Mapping[str, Sequence[int]], config: OptimConfig) -> list[Group]:
        """The groups of trained parameters of these shapes, each in one group; the certificate relies on them too.

        Here two: matrices and embeddings with weight decay; biases, LayerNorm (one dimension) and the scales of IA3,
        which begin at 1, without.
        """
        decayed = tuple(name for name, shape in shapes.items() if decays(name, shape))
        others = tuple(name for name in shapes if name not in decayed)
        return [Group(decayed, config.weight_decay), Group(others, 0.0)]

    @abstractmethod
    def build(
        self, groups: list[dict[str, Any]], config: OptimConfig, device: torch.device, zero_stage: int
    ) -> torch.optim.Optimizer:
        """The optimizer over parameter groups, with a learning rate of 0 and without clipping.

        Args:
            groups: torch's, of whole parameters, each with its weight_decay and rate_multiplier.
            device: where the run steps.
        """

    @abstractmethod
    def exact(self, config: OptimConfig, weight_decay: float, step: int) -> ExactRule:
        """The rule of a parameter of a group with this decay in its step number `step`, counted from 1."""


def decays(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter has weight decay by default; see `OptimizerEntry.groups`."""
    return len(shape) >= 2 and SCALE not in name


@dataclass(frozen=True)
class PartDecay:
    """The decay of one part."""

    rule: str
    """as it was given"""
    parts: Frozen | None
    """of the encoder; None for the head"""
    decay: float

    def holds(self, part: str, layer: int | None) -> bool:
        """Whether it is that of a part, or of the layer of this number."""
        return part == HEAD if self.parts is None else part != HEAD and self.parts.holds(part, layer)


def part_decays(rules: str | None) -> tuple[PartDecay, ...]:
    """The meaning of optim.decay_of, such as "embeddings=0,layers:0-5=0.05,head=0.1".

    Raises:
        UserError: a rule that is none, or a decay that is no number of at least 0.
    """
    return tuple(_part_decay(rule.strip(), str(rules)) for rule in (rules.split(",") if rules is not None else ()))


def _part_decay(rule: str, rules: str) -> PartDecay:
    part, _, value = (each.strip() for each in rule.partition("="))
    try:
        decay = float(value) if re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", value) else math.nan
        if math.isfinite(decay):
            return PartDecay(rule, None if part == HEAD else frozen_parts(part), decay)
    except (ValueError, UserError):  # told below with the option's own name
        pass
    raise UserError(
        f"optim.decay_of: {rules!r} is not allowed; {rule!r} is no part and its decay of at least 0, such as "
        "embeddings=0, layers:3=0.1, layers:0-5=0.1, pooler=0, encoder=0 or head=0.1"
    )


def placed_groups(shapes: Mapping[str, Sequence[int]], config: OptimConfig) -> list[Group]:
    """The groups of a run's optimizer, divided by what `rate_share` and optim.decay_of say of their parameters.

    Raises:
        UserError: a part of optim.decay_of is of no parameter.
    """
    own = _part_decays(shapes, config)
    layers = max((int(found[1]) for name in shapes if (found := LAYER.search(name))), default=-1) + 1
    divided = []
    for group in OPTIMIZERS.get(config.name).groups(shapes, config):
        terms = {n: (rate_share(n, layers, config), own.get(n, group.weight_decay)) for n in group.names}
        for share, decay in sorted(set(terms.values()), reverse=True):
            names = tuple(name for name in group.names if terms[name] == (share, decay))
            divided.append(Group(names, decay, group.rate_multiplier * share))
    return divided


def _part_decays(shapes: Mapping[str, Sequence[int]], config: OptimConfig) -> dict[str, float]:
    """The decay of the parameters that have one by their part, which is that of the last rule that holds them."""
    rules = part_decays(config.decay_of)
    deciding = {
        name: next((rule for rule in reversed(rules) if rule.holds(*part_of(name))), None)
        for name, shape in shapes.items()
        if decays(name, shape)
    }
    for rule in rules:
        remedy = f"{rule.rule!r} is of no weight matrix that is trained and that no later rule holds; leave it out"
        require(rule in deciding.values(), "optim.decay_of", config.decay_of, remedy)
    return {name: rule.decay for name, rule in deciding.items() if rule is not None}


def part_of(name: str) -> tuple[str, int | None]:
    """The part of a model that a parameter is of, as optim.decay_of names it, and its layer's number.

    >>> part_of("bert.encoder.layer.3.output.dense.weight"), part_of("classifier.weight")
    (('layers', 3), ('head', None))
    """
    numbered = LAYER.search(name)
    if numbered:
        return "layers", int(numbered[1])
    return next((part for part in ("embeddings", "pooler") if f"{part}." in name), HEAD), None


def rate_share(name: str, layers: int, config: OptimConfig) -> float:
    """The learning rate of a parameter over the full one, by its place in the encoder and in its adapter.

    Args:
        layers: number of encoder layers up to the highest that is trained; the head above them has the full rate.

    >>> from engine.config.optim import OptimConfig
    >>> rate_share("bert.encoder.layer.3.output.dense.weight", 6, OptimConfig(layer_decay=0.5))
    0.125
    """
    numbered = LAYER.search(name)
    below = layers - int(numbered[1]) if numbered else layers + 1 if "embeddings." in name else 0
    ratio = config.lora_ratio if ".lora_B." in name else 1.0
    share: float = config.layer_decay**below * ratio
    return share


#: the optimizers by name
OPTIMIZERS: Registry[OptimizerEntry] = Registry(
    "optim.name", {"adamw": "engine.optim.adamw:ADAMW", "lamb": "engine.optim.lamb:LAMB"}
)


def optimizers_with_option() -> dict[str, tuple[str, ...]]:
    """The dotted options that only some optimizers read, and those that do."""
    readers: dict[str, tuple[str, ...]] = {}
    for name in OPTIMIZERS.names:
        for own in sorted(OPTIMIZERS.get(name).options):
            readers[f"optim.{own}"] = (*readers.get(f"optim.{own}", ()), name)
    return readers
