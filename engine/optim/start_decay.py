"""Decay of weights towards what they were at the start instead of towards 0 (L2-SP, Li et al. 2018).

Theirs is a penalty, a / 2 * |w - w_start|^2 over all pre-trained parameters, biases too; its gradient would pass
through Adam's moments and be divided by their size. Here it is decoupled as AdamW's weight decay is: just before the
optimizer's step of a tensor, w -= rate * a * (w - w_start).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.optim.shard import Shard

#: elements of a tensor that start at the first of them, and their values at the start
Part = tuple[slice, Tensor]
#: elements that are computed at a time in fp64
CHUNK = 1 << 20


class StartDecay:
    """A hook before an optimizer's steps. Keeps this rank's part of the starting weights, 4 bytes an element, where the
    optimizer steps.

    A step that is left out, as fp16's are at an overflow, never gets here.
    """

    def __init__(self, shards: Sequence[Shard], pretrained: Mapping[str, int], decay: float) -> None:
        """
        Args:
            shards: with the weights that the run starts from.
            pretrained: by name of a parameter how many of its elements, from the first on, are pre-trained.
            decay: see the module.
        """
        self.decay = decay
        self._parts = {id(shard.tensor): _parts(shard, pretrained) for shard in shards}

    @property
    def elements(self) -> int:
        """How many of this rank's elements are pre-trained."""
        return sum(len(start) for parts in self._parts.values() for _, start in parts)

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Pull the tensors that the optimizer is about to step."""
        for group in optimizer.param_groups:
            pairs = [(_view(p, part), start) for p in group["params"] for part, start in self._parts.get(id(p), ())]
            if pairs:
                views, starts = zip(*pairs, strict=True)
                torch._foreach_lerp_(list(views), list(starts), float(group["lr"]) * self.decay)

    def exact(self, shard: Shard, rate: float) -> Tensor:
        """What the weights of a shard become before the step, flat, fp32 on the CPU: computed in fp64 for a comparison.

        Args:
            rate: of the shard's parameters.
        """
        weights = shard.tensor.detach().view(-1).to("cpu", torch.float32, copy=True)
        for part, start in self._parts[id(shard.tensor)]:
            for now, first in zip(weights[part].split(CHUNK), start.split(CHUNK), strict=True):
                before = now.double()
                now.copy_(before - rate * self.decay * (before - first.cpu().double()))
        return weights


def _view(tensor: Tensor, part: slice) -> Tensor:
    return tensor.detach().view(-1)[part]


def _parts(shard: Shard, pretrained: Mapping[str, int]) -> list[Part]:
    """Ranges of a shard's tensor that are pre-trained, those that touch as one."""
    ranges: list[slice] = []
    for piece in shard.fragments:
        known = pretrained.get(shard.parameters[piece.parameter].name, 0) - piece.parameter_start
        end = piece.start + min(piece.length, known)
        if end <= piece.start:
            continue
        touches = bool(ranges) and ranges[-1].stop == piece.start
        ranges.append(slice(ranges.pop().start if touches else piece.start, end))
    return [(part, _view(shard.tensor, part).clone()) for part in ranges]
