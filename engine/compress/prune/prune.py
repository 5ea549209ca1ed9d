"""Prune a trained encoder without training it: what matters least, by the Fisher information, goes.

Kwon et al. 2022, "A Fast Post-Training Pruning Framework for Transformers": derivatives on samples (`fisher`), how many
units stay where (`search`), which ones (`fisher.rearranged`), and what is left fitted (`tune`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.compress.prune import cost, fisher
from engine.compress.prune.cost import Costs
from engine.compress.prune.latency import Load, measure
from engine.compress.prune.search import Choice, Numbers, choice, search
from engine.compress.prune.target import Target
from engine.compress.prune.tune import Tuning, tune
from engine.config import require
from engine.errors import UserError
from engine.model.pruning.units import Kind, Sublayer, sublayers
from engine.tasks.finetune import FineTuning

#: numbers of neurons are multiples of it, as kernels like them
STEP = 16
#: examples of a pass while outputs are fitted
PASS = 32


@dataclass(frozen=True)
class Options:
    """How to prune."""

    target: Target
    samples: int = 1024
    """training examples that are looked at"""
    tune: Tuning = "matrix"
    even: bool = False
    """keep equally many units in each layer, so that a folder itself gets smaller"""
    load: Load = field(default_factory=Load)
    """what a target speed is measured with"""

    def validate(self) -> None:
        require(self.samples >= 1, "samples", self.samples, "give a whole number above 0")
        for name in ("batch", "length", "threads"):
            value = getattr(self.load, name)
            require(value >= 1, f"latency_{name}" if name != "threads" else name, value, "give a whole number above 0")


@dataclass(frozen=True)
class Evidence:
    """What is known of a model before it is pruned, for any value of a target."""

    gradients: list[Tensor]
    """by sub-layer, see `fisher.derivatives`"""
    costs: Costs
    """by the target's measure"""


@dataclass(frozen=True)
class Pruned:
    """A pruned model and what is known of it."""

    model: nn.Module
    """with zeros where units were"""
    kept: tuple[tuple[int, Kind, int, int], ...]
    """by sub-layer its layer, kind, units that are kept and units that there were"""
    share: float
    """of the cost that the target bounds, as the search counts it"""
    whole: float
    """that cost before"""

    def lines(self) -> list[str]:
        """Units by layer, in words."""
        told = []
        for kind in ("heads", "neurons"):
            sizes = [(size, count) for _, one, size, count in self.kept if one == kind]
            kept, there = (sum(numbers) for numbers in zip(*sizes, strict=True))
            told.append(f"{kind}: {kept} of {there} kept; by layer {', '.join(str(size) for size, _ in sizes)}")
        return told

    def cost_line(self, options: Options) -> str:
        """What the target bounds, before and after."""
        load, measure = options.load, options.target.measure
        if measure == "speed":
            before, after = 1e3 * self.whole, 1e3 * self.share * self.whole
            return f"time: {before:.2f} ms -> {after:.2f} ms expected ({1 / self.share:.2f} times as fast; {load})"
        if measure == "size":
            return f"size: {self.whole / 1e6:.1f} MB -> {self.share * self.whole / 1e6:.1f} MB without zeros"
        return f"FLOPs of the layers: {self.share:.3f} of the whole, at {load.length} tokens"


def examine(task: FineTuning, model: nn.Module, options: Options) -> Evidence:
    """Look at a model, which stays as it is; see `prune`."""
    parts = sublayers(model)
    gradients = fisher.derivatives(task, model, parts, _samples(task, options), next(model.parameters()).device)
    return Evidence(gradients, costs_of(model, parts, options))


def _samples(task: FineTuning, options: Options) -> int:
    return min(options.samples, task.train_source().epoch_size(0))


def prune(task: FineTuning, model: nn.Module, options: Options, evidence: Evidence | None = None) -> Pruned:
    """Prune a copy of a model.

    Args:
        task: whose loss counts, on its training examples.
        model: ours, trained on the task, in evaluation mode; stays as it is.
        evidence: of `examine`, with the same options but for the target's value; None looks now.

    Raises:
        UserError: a target that can't be reached, or an option that is wrong.
    """
    options.validate()
    known = evidence or examine(task, model, options)
    gradients, costs = known.gradients, known.costs
    pruned = deepcopy(model)
    parts, device = sublayers(pruned), next(model.parameters()).device
    importances = [fisher.importance(each).numpy() for each in gradients]
    sizes = choose(parts, importances, costs, options.target, even=options.even)
    for part, rows, size in zip(parts, gradients, sizes, strict=True):
        part.zero(~masked(rows, size).to(device))
    tune(model, pruned, options.tune, partial(_passes, task, _samples(task, options), device))
    whole = costs.whole(len(parts) // 2)
    left = costs.total([(part.kind, size) for part, size in zip(parts, sizes, strict=True)])
    kept = tuple((part.layer, part.kind, size, part.count) for part, size in zip(parts, sizes, strict=True))
    return Pruned(pruned, kept, left / whole, whole)


def masked(gradients: Tensor, size: int) -> Tensor:
    """Which units of a sub-layer stay, [U] bool, by their derivatives [N, U]."""
    kept = torch.zeros(gradients.shape[1], dtype=torch.bool)
    kept[fisher.importance(gradients).argsort(descending=True, stable=True)[:size]] = True
    return fisher.rearranged(gradients, kept) if 0 < size < len(kept) else kept


def costs_of(model: nn.Module, parts: Sequence[Sublayer], options: Options) -> Costs:
    """What the target's measure says of a model."""
    config: Any = model.config
    if options.target.measure == "speed":
        return measure(config, options.load)
    if options.target.measure == "size":
        return cost.file_bytes(model, parts)
    return cost.flops(parts, options.load.length)


def choose(
    parts: Sequence[Sublayer], importances: Sequence[Numbers], costs: Costs, target: Target, *, even: bool
) -> list[int]:
    """How many units each sub-layer keeps.

    Raises:
        UserError: no sizes fit the target.
    """
    if target.measure != "share":
        whole = costs.whole(len(parts) // 2)
        wanted = {"speed": whole / max(target.value, 1.0), "flops": whole * target.value, "size": target.value}
        tables: dict[Kind, Numbers] = {"heads": costs.heads, "neurons": costs.neurons}
        found = _searched(parts, importances, tables, wanted[target.measure] - costs.fixed, even=even)
        if found is None:
            least = costs.total([(part.kind, _sizes(part)[0]) for part in parts])
            raise _unreachable(target, whole, least)
        return found
    sizes = [part.count for part in parts]
    for kind, share in target.shares:
        own = [index for index, part in enumerate(parts) if part.kind == kind]
        budget = share * sum(parts[index].count for index in own)
        counts = {kind: np.arange(parts[own[0]].count + 1.0)}
        chosen = _searched([parts[i] for i in own], [importances[i] for i in own], counts, budget, even=even)
        if chosen is None:
            least = sum(_sizes(parts[index])[0] for index in own)
            remedy = f"each layer keeps {_sizes(parts[own[0]])[0]}, {least} in all; give more"
            raise UserError(f"target: {kind} {share:g} is not allowed; {remedy}")
        for index, size in zip(own, chosen, strict=True):
            sizes[index] = size
    return sizes


def _unreachable(target: Target, whole: float, least: float) -> UserError:
    """What to tell of a target below what the smallest layers cost."""
    limits = {"speed": f"{whole / least:.2g}x", "flops": f"{least / whole:.3g}", "size": f"{least / 1e6:.3g}MB"}
    remedy = (
        f"with one head and {STEP} neurons a layer {limits[target.measure]} is reached; ask less, or drop layers too"
    )
    return UserError(f"target: {target} is out of reach; {remedy}")


def _sizes(part: Sublayer) -> list[int]:
    """Numbers of units that a sub-layer may keep."""
    step = 1 if part.kind == "heads" else STEP
    return [*range(min(step, part.count), part.count, step), part.count]


def _searched(
    parts: Sequence[Sublayer],
    importances: Sequence[Numbers],
    tables: Mapping[Kind, Numbers],
    budget: float,
    *,
    even: bool,
) -> list[int] | None:
    """Sizes within a budget, by the cost of each number of units; None where none are."""
    groups = [[index] for index in range(len(parts))]
    if even:
        groups = [[i for i, part in enumerate(parts) if part.kind == kind] for kind in tables]
    choices: list[Choice] = []
    for group in groups:
        part, sizes = parts[group[0]], _sizes(parts[group[0]])
        choices.append(choice([importances[index] for index in group], tables[part.kind][sizes], sizes))
    found = search(choices, budget)
    if found is None:
        return None
    places = {index: size for group, size in zip(groups, found, strict=True) for index in group}
    return [places[index] for index in range(len(parts))]


def _passes(task: FineTuning, samples: int, device: torch.device, model: nn.Module) -> Iterator[object]:
    """A model's passes over the first training examples."""
    for batch in fisher.batches(task.train_source(), samples, PASS):
        with torch.no_grad():
            yield task.step(model, batch.to(device))
