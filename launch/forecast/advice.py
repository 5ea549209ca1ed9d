"""The size and tokens that fitted laws advise for a budget of compute, and the shape nearest to them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.config import ARCHITECTURES, DEFAULT_ARCHITECTURE, ModelConfig, RunConfig, TrainConfig, sizes_of
from engine.errors import UserError, require
from engine.scaling.optimum import Optimum, optimum
from engine.scaling.record import from_record
from engine.scaling.sizes import Proportions, Size, counts, size_near
from launch.forecast.planner import Request
from launch.scaling.told import advice as sentence

#: options that say what the laws are to say
EXCLUDED = ("model", "config", "tokens", "steps")


@dataclass(frozen=True)
class Advice:
    """What laws say of a budget."""

    best: Optimum
    level: float
    size: Size
    """the shape in constant proportions that is nearest to the best size"""
    warnings: tuple[str, ...]

    @property
    def run(self) -> RunConfig:
        """The run to plan: MLM with that shape."""
        run = RunConfig(model=self.size.model, train=TrainConfig(global_batch=256))
        return replace(run, data=replace(run.data, objective="mlm"))

    @property
    def parameters(self) -> int:
        """Of the shape, without embeddings."""
        return counts(self.size.shape(1, pairs=False)).no_embedding

    def named(self) -> tuple[str, int]:
        """The nearest of the architecture's named sizes, and its parameters without embeddings."""
        architecture = self.size.architecture
        entry = ARCHITECTURES.get(architecture)
        sizes = {
            f"{architecture}-{name}": counts(
                replace(entry.shape(ModelConfig(architecture=architecture, size=name), 1), pooler=False)
            ).no_embedding
            for name in sizes_of(architecture)
        }
        return min(sizes.items(), key=lambda each: abs(math.log(each[1] / self.best.parameters.value)))

    def lines(self, request: Request) -> Iterator[str]:
        """The advice in words."""
        yield sentence(self.best, self.level)
        name, parameters = self.named()
        steps = self.best.tokens.value / request.tokens_a_step
        yield (
            f"nearest shape in constant proportions: {self.size.hidden} wide, {self.size.layers} layers, "
            f"{self.size.heads} heads ({self.parameters:,} parameters without embeddings); nearest named size: {name} "
            f"({parameters:,})"
        )
        yield (
            f"{self.best.tokens.value:.3g} tokens are {steps:,.0f} steps of {request.global_batch} "
            f"sequences of {request.sequence_length}; loss {self.best.loss}"
        )
        yield from (f"warning: {text}" for text in self.warnings)

    def as_json(self, request: Request) -> dict[str, Any]:
        """The same as plain values; intervals are value, low and high."""
        name, parameters = self.named()
        ends = {"parameters": self.best.parameters, "tokens": self.best.tokens, "loss": self.best.loss}
        return {
            "flops": self.best.flops,
            **{name: [each.value, each.low, each.high] for name, each in ends.items()},
            "shape": {"hidden_size": self.size.hidden, "layers": self.size.layers, "heads": self.size.heads},
            "shape_parameters": self.parameters,
            "named": name,
            "named_parameters": parameters,
            "steps": request.steps,
            "warnings": list(self.warnings),
        }


def advice_of(options: Any) -> Advice:
    """What the laws of the options say of their budget.

    Raises:
        UserError: one of the two alone, or beside what they say; a wrong file; a law that doesn't tell size from data.
    """
    if options.compute is None or options.laws is None:
        missing, given = ("compute", "laws") if options.compute is None else ("laws", "compute")
        raise UserError(f"{missing}: not given, but {given} is; give --compute FLOPS --laws FIT.JSON")
    for name in EXCLUDED:
        value = getattr(options, name)
        if value is not None:
            raise UserError(f"{name}: {value!r} and laws exclude each other; the laws say it, so leave {name} out")
    try:
        record = json.loads(Path(options.laws).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"laws: {options.laws!r} can't be read ({error}); give a fit.json") from error
    require(isinstance(record, dict), "laws", options.laws, "give the fit.json of zerobert scaling fit")
    fit = from_record(record)
    best = optimum(fit, options.compute)
    architecture, told = _architecture(record)
    try:
        size = size_near(best.parameters.value, architecture, Proportions())
    except UserError as error:
        raise UserError(
            f"compute: {options.compute:g} is best spent on {best.parameters.value:.3g} parameters, a size that no "
            "shape in constant proportions has; give another"
        ) from error
    return Advice(best, fit.level, size, (*best.warnings, *fit.warnings(), *told))


def _architecture(record: Mapping[str, Any]) -> tuple[str, list[str]]:
    """That of the points, or else the usual one, and a warning if theirs is none of ours."""
    identity = record.get("identity", {})
    require(isinstance(identity, dict), "laws: identity", identity, "give the fit.json of zerobert scaling fit")
    name = identity.get("architecture", DEFAULT_ARCHITECTURE)
    if name in ARCHITECTURES.names:
        return name, []
    warning = f"the points are of {name!r}, which isn't here; the shape is of {DEFAULT_ARCHITECTURE}"
    return DEFAULT_ARCHITECTURE, [warning]
