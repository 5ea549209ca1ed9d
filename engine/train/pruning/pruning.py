"""Gradual pruning on whatever ZeRO leaves of the weights on each rank.

The loss's derivative by a gate before an output matrix W, one for each of its units, is the sum of W times its gradient
over the unit's columns. So each rank adds up what it has of that where ZeRO steps it, the ranks add up these sums, a
number a unit, and the square of the total, smoothed over steps, is the unit's score: the Fisher information of the gate
(Kwon et al. 2022) by the global batch's gradients, as Molchanov et al. 2019 ("Importance Estimation for Neural Network
Pruning") smooth them. Scores and what is kept are buffers, which checkpoints hold, the same on every rank.

Once rows before and columns behind a unit are zeros, with the optimizer's moments, their gradients are zeros too, so
the next steps leave them so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from engine import dist
from engine.config import PruneConfig
from engine.model.pruning.schedule import Schedule, kept_units
from engine.model.pruning.units import Kind, Sublayer, sublayers
from engine.optim.shard import Fragment, ParameterInfo, Shard
from engine.train.log import say
from engine.zero.engine import ZeroEngine

#: of the score before, in the smoothed one after a step
DECAY = 0.9
#: buffers of a sub-layer's output matrix: which of its units are kept, [U] bool, and their scores, [U] fp64
KEPT, SCORES = "kept_units", "unit_scores"


class Pruning:
    """Watches the optimizer's steps, and after some of them takes units out."""

    def __init__(self, zero: ZeroEngine, prune: PruneConfig, steps: int) -> None:
        """Made from an engine that has neither loaded nor stepped anything.

        Args:
            steps: of the run.
        """
        self.zero, self.prune = zero, prune
        self.schedule = Schedule.of(prune, steps)
        self._parts = sublayers(zero.model.module)
        counts = [part.count for part in self._parts]
        for part in self._parts:  # now, since an engine in half precision rounds buffers that it is given
            part.output.register_buffer(KEPT, torch.ones(part.count, dtype=torch.bool))
            part.output.register_buffer(SCORES, torch.zeros(part.count, dtype=torch.float64))
        self._places = {f"{part.output_name}.weight": (index, True) for index, part in enumerate(self._parts)}
        for index, part in enumerate(self._parts):
            self._places |= {f"{name}.{which}": (index, False) for name in part.inputs for which in ("weight", "bias")}
        self._shards = zero.wrapper.shards()
        self._watched = {  # by what the ranks divide among them, of which this one may have nothing
            id(shard.tensor): shard
            for shard in self._shards
            if any(info.name in self._places for info in shard.parameters)
        }
        self._sums = torch.zeros(sum(counts), dtype=torch.float64, device=self._shards[0].tensor.device)
        self._slices = [slice(sum(counts[:index]), sum(counts[: index + 1])) for index in range(len(counts))]
        zero.wrapper.client.register_step_post_hook(self._observe)

    @property
    def is_final(self) -> bool:
        """Whether what is kept stays."""
        return self.zero.steps >= self.schedule.last

    @torch.no_grad()
    def _observe(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """After the optimizer's step on some of its tensors, whose gradients are still there."""
        if self.zero.steps + 1 > self.schedule.last:
            return
        fused = self.zero.fused
        for tensor in (p for group in optimizer.param_groups for p in group["params"] if id(p) in self._watched):
            gradient = tensor.grad if fused is None else fused.applied_gradient(tensor)
            if gradient is None:
                continue
            used = 1.0 if fused is None else fused.nonfinite == 0
            product = (tensor.detach() * gradient).nan_to_num(0.0).view(-1) * used
            for info, piece, (index, behind) in self._pieces(self._watched[id(tensor)]):
                if behind:
                    own = product[piece.start : piece.start + piece.length]
                    self._sums[self._slices[index]] += unit_sums(own, piece.parameter_start, info, self._parts[index])

    @torch.no_grad()
    def after_update(self) -> None:
        """Score the units, and take some out where the schedule says so; collective."""
        step = self.zero.steps
        if step > self.schedule.last:
            return
        group = next((shard.process_group for shard in self._watched.values()), None)
        totals = self._sums if group is None else dist.sum_over_ranks(self._sums, group)
        self._sums = torch.zeros_like(self._sums)
        for part, place in zip(self._parts, self._slices, strict=True):
            scores = part.output.get_buffer(SCORES)
            scores.lerp_(totals[place].square().to(scores.device), 1.0 - DECAY)
        changed = [self._choose(kind, step, share) for kind, share in self._wanted()]
        if any(changed):
            self._take_out()
        if step == self.schedule.last:
            say(self._told())

    def _wanted(self) -> list[tuple[Kind, float]]:
        shares: list[tuple[Kind, float]] = [("heads", self.prune.heads), ("neurons", self.prune.neurons)]
        return [(kind, share) for kind, share in shares if share < 1.0]

    def _choose(self, kind: Kind, step: int, final: float) -> bool:
        """Decide which units of a kind stay, if the step is one of those; whether it is."""
        share = self.schedule.share(step, final)
        if share is None:
            return False
        own = [part.output for part in self._parts if part.kind == kind]
        scores, kept = ([module.get_buffer(name).cpu() for module in own] for name in (SCORES, KEPT))
        for module, units in zip(own, kept_units(scores, kept, share, even=self.prune.even), strict=True):
            module.get_buffer(KEPT).copy_(units)
        return True

    def _take_out(self) -> None:
        """Make zeros, in the optimizer's weights and moments and in the model's weights, of what isn't kept."""
        state = self.zero.wrapper.client.state
        for shard in self._watched.values():
            for info, piece, (index, behind) in self._pieces(shard):
                part = self._parts[index]
                gone = ~part.output.get_buffer(KEPT).cpu()
                units = units_of(info, piece, part, behind=behind)
                place = slice(piece.start, piece.start + piece.length)
                for tensor in (shard.tensor.detach(), *state.get(shard.tensor, {}).values()):
                    if isinstance(tensor, Tensor) and tensor.shape == shard.tensor.shape:
                        tensor.view(-1)[place].masked_fill_(gone[units].to(tensor.device), 0.0)
        self.zero.wrapper.round_weights(self._shards)

    def _pieces(self, shard: Shard) -> Iterator[tuple[ParameterInfo, Fragment, tuple[int, bool]]]:
        """The parts of pruned matrices in a shard, the sub-layer of each, and whether it is its output's."""
        for piece in shard.fragments:
            info = shard.parameters[piece.parameter]
            if info.name in self._places:
                yield info, piece, self._places[info.name]

    def _told(self) -> str:
        """What is kept, in words."""
        told = []
        for kind, _ in self._wanted():
            kept = [part.output.get_buffer(KEPT) for part in self._parts if part.kind == kind]
            sizes = [int(units.sum()) for units in kept]
            told.append(f"{sum(sizes)} of {sum(map(len, kept))} {kind} ({', '.join(map(str, sizes))} by layer)")
        return f"pruned: {' and '.join(told)} are kept from step {self.schedule.last} on"


def unit_sums(elements: Tensor, start: int, info: ParameterInfo, part: Sublayer) -> Tensor:
    """Sums over the columns of units, fp64 [U], of a part of what has the shape of an output matrix.

    Args:
        elements: [n], of which the first is number `start` of the whole.
    """
    columns = info.shape[1]
    before = start % columns
    rows = functional.pad(elements, (before, -(before + len(elements)) % columns)).view(-1, columns)
    sums: Tensor = rows.double().sum(0).view(-1, part.width).sum(1)
    return sums


def units_of(info: ParameterInfo, piece: Fragment, part: Sublayer, *, behind: bool) -> Tensor:
    """Which unit each element of a part of a parameter is of, [n] int64.

    Args:
        behind: whether the parameter is the output's weight, whose columns are the units'; else rows are.
    """
    places = torch.arange(piece.parameter_start, piece.parameter_start + piece.length)
    if behind:
        places %= info.shape[1]
    elif len(info.shape) > 1:
        places //= info.shape[1]
    return places % part.columns // part.width
