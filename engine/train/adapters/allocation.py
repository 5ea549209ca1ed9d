"""AdaLoRA's reallocation of ranks (Zhang et al. 2023), on whatever ZeRO leaves of the adapters on each rank.

The importance of an element is smoothed where ZeRO steps it, in two more states of the optimizer: nothing is sent, and
checkpoints hold and reshard them as they do its moments. Only when the budget shrinks do the ranks add up the scores
of the triplets, a number each. The arithmetic is peft's `RankAllocator` with the factors as the step leaves them and
the clipped gradient of the global batch; peft's own wants whole factors and gradients on every rank at every step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine import dist
from engine.config import AdapterConfig
from engine.model.adapters import budget
from engine.optim.shard import Fragment, ParameterInfo, Shard
from engine.tasks.task import StepOutput
from engine.zero.engine import ZeroEngine

#: the optimizer's further states of an adapted layer's factors
STATES = ("sensitivity", "uncertainty")


class Allocation:
    """Watches the optimizer's steps, and after some of them takes the least important triplets out."""

    def __init__(self, zero: ZeroEngine, adapter: AdapterConfig, steps: int) -> None:
        self.zero, self.schedule = zero, budget.Schedule.of(adapter, steps)
        self.weight = adapter.orthogonality
        model = zero.model.module
        self._layers = budget.adapted(model)
        self._first = {name: number * adapter.initial_rank for number, name in enumerate(self._layers)}
        self._factors = [(name, p) for name, p in model.named_parameters() if ".lora_A." in name or ".lora_B." in name]
        self._shards = zero.wrapper.shards()
        self._adapted = {
            id(shard.tensor): shard
            for shard in self._shards
            if any(_layer(info) is not None for info in shard.parameters)
        }
        zero.wrapper.client.register_step_post_hook(self._observe)

    @property
    def is_final(self) -> bool:
        """Whether the budget is reached, and the ranks stay."""
        return self.zero.steps >= self.schedule.last

    def penalised(self, output: StepOutput) -> StepOutput:
        """A micro-batch's output with its share of the penalty on factors that are not orthogonal (equation 4).

        All micro-batches of all ranks have equal shares. The penalty is the mean over all factors, as peft's.
        """
        if self.weight == 0.0:
            return output
        terms = []
        for name, factor in self._factors:
            with self.zero.wrapper.gathered(factor):
                terms.append(budget.penalty(factor, name))
        share = torch.stack(terms).mean() / (self.zero.accumulation * self.zero.world_size)
        metrics = output.metrics | {"orthogonality": share.detach()}
        return replace(output, loss=output.loss + self.weight * share, metrics=metrics)

    @torch.no_grad()
    def _observe(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """After the optimizer's step on some of its tensors, whose gradients are still there."""
        if self.zero.steps + 1 >= self.schedule.last:
            return
        fused = self.zero.fused
        for tensor in (p for group in optimizer.param_groups for p in group["params"] if id(p) in self._adapted):
            gradient = tensor.grad if fused is None else fused.applied_gradient(tensor)
            if gradient is not None:
                state = optimizer.state[tensor]
                for name in STATES:
                    state.setdefault(name, torch.zeros_like(tensor, requires_grad=False))
                used = 1.0 if fused is None else fused.nonfinite == 0
                budget.observe(state[STATES[0]], state[STATES[1]], tensor.detach(), gradient, used)

    @torch.no_grad()
    def after_update(self) -> None:
        """Reallocate where the schedule says so, and keep out what was taken out for good; collective."""
        step = self.zero.steps
        size = self.schedule.budget(step, len(self._layers))
        if size is not None:
            self._allocate(size)
        if step == self.schedule.last:
            self._forget()
        if size is not None or step > self.schedule.last:
            self._take_out()

    def _allocate(self, size: int) -> None:
        kept = budget.kept(self._scores(), size)
        for layer, own in zip(self._layers.values(), kept.split(self.schedule.initial), strict=True):
            layer.get_buffer(budget.KEPT).copy_(own)

    def _scores(self) -> Tensor:
        """The importance of each triplet, [T] fp64, the same on every rank (equation 11); collective."""
        scores, group = torch.zeros(len(self._layers) * self.schedule.initial, dtype=torch.float64), None
        for shard in self._adapted.values():
            state, group = self.zero.wrapper.client.state.get(shard.tensor, {}), shard.process_group
            if STATES[0] in state:
                elements = (state[STATES[0]] * state[STATES[1]]).view(-1).to("cpu", torch.float64)
                for info, piece, triplets in self._pieces(shard):
                    own = elements[piece.start : piece.start + piece.length] / budget.spread(info.name, info.shape)
                    scores.index_add_(0, triplets, own)
        return scores if group is None else dist.sum_over_ranks(scores, group)

    def _take_out(self) -> None:
        """Make zero, in the optimizer's weights and in the model's, what isn't kept of each E; collective."""
        kept = torch.cat([layer.get_buffer(budget.KEPT) for layer in self._layers.values()])
        for shard in self._adapted.values():
            for info, piece, triplets in self._pieces(shard):
                if ".lora_E." in info.name:
                    elements = shard.tensor.detach().view(-1)[piece.start : piece.start + piece.length]
                    elements.masked_fill_(~kept.to("cpu")[triplets].to(elements.device), 0.0)
        self.zero.wrapper.round_weights(self._shards)

    def _forget(self) -> None:
        for shard in self._adapted.values():
            for name in STATES:
                self.zero.wrapper.client.state.get(shard.tensor, {}).pop(name, None)

    def _pieces(self, shard: Shard) -> Iterator[tuple[ParameterInfo, Fragment, Tensor]]:
        """The parts of factors in a shard, and which of all triplets each of their elements is of, [n] int64."""
        for piece in shard.fragments:
            info = shard.parameters[piece.parameter]
            layer = _layer(info)
            if layer is not None:
                own = budget.triplets_of(info.name, info.shape, piece.parameter_start, piece.length)
                yield info, piece, own + self._first[layer]

    def emptied(self) -> frozenset[str]:
        """The layers of which no triplet is kept."""
        return frozenset(name for name, layer in self._layers.items() if not layer.get_buffer(budget.KEPT).any())


def _layer(info: ParameterInfo) -> str | None:
    """The adapted layer that a parameter is a factor of."""
    return next((info.name.partition(factor)[0] for factor in budget.FACTORS if factor in info.name), None)
