"""A moving average of the weights (Polyak and Juditsky 1992): average += (1 - d) * (weights - average) after each step.

The decay d grows from step to step, min(decay, (1 + t) / (10 + t)) in step t, so that the average forgets the first
weights soon; the formula is that of TensorFlow's tf.train.ExponentialMovingAverage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from engine.optim.shard import Shard

#: the optimizer's state that holds it, so that it is saved, divided and loaded as the moments are
AVERAGE = "average"
#: elements that are exchanged at a time
CHUNK = 1 << 22


def decay_at(number: int, decay: float) -> float:
    """The decay in an update, counted from 1.

    >>> decay_at(1, 0.999), round(decay_at(10**6, 0.999), 4)
    (0.18181818181818182, 0.999)
    """
    return min(decay, (1.0 + number) / (10.0 + number))


class Average:
    """A hook behind an optimizer's steps, fp32, where the optimizer steps. It begins with the weights after the first
    step.

    A step that is left out, as fp16's are at an overflow, never gets here.
    """

    def __init__(self, decay: float, updates: Callable[[], int]) -> None:
        """Args: updates tells, inside of a step, how many were applied before it."""
        self.decay, self._updates = decay, updates

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Move the averages of the tensors that the optimizer has just stepped."""
        share = 1.0 - decay_at(self._updates() + 1, self.decay)
        stepped = [p for group in optimizer.param_groups for p in group["params"] if optimizer.state.get(p)]
        known = [p for p in stepped if AVERAGE in optimizer.state[p]]
        if known:
            averages = [optimizer.state[p][AVERAGE] for p in known]
            torch._foreach_lerp_(averages, [p.detach() for p in known], share)
        for p in stepped:
            optimizer.state[p].setdefault(AVERAGE, p.detach().clone())


@torch.no_grad()
def exchange(shards: Sequence[Shard], optimizer: torch.optim.Optimizer) -> bool:
    """Put the averages where the weights are and the weights where the averages are, bit by bit; false without any.

    A second exchange undoes it.
    """
    found = False
    for shard in shards:
        average = optimizer.state.get(shard.tensor, {}).get(AVERAGE)
        if average is None:
            continue
        found = True
        pairs = zip(shard.tensor.detach().view(-1).split(CHUNK), average.view(-1).split(CHUNK), strict=True)
        for weights, averaged in pairs:
            held = weights.clone()
            weights.copy_(averaged)
            averaged.copy_(held)
    return found
