"""What a run of pre-training was: its parameters, the tokens that it has seen, and the FLOPs that they took."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import numpy as np

from engine.config import RunConfig, architecture_of
from engine.model.flops import training_flops
from engine.scaling.sizes import Counts, counts
from engine.tasks.pretrain import Pretraining

#: samples that are looked at one by one; of longer runs the first ones tell the mean
LOOKED_AT = 1_000_000
_CHUNK = 65_536


@dataclass(frozen=True)
class Trained:
    """A run up to a step."""

    parameters: Counts
    tokens: float
    flops: float
    """forward and backward passes with attention and heads, see `engine.model.flops`"""

    def columns(self) -> dict[str, float]:
        """Those of a point."""
        own = asdict(self.parameters)
        counted = {f"parameters_{name}": float(value) for name, value in own.items()}
        return {
            "parameters": float(self.parameters.no_embedding),
            **counted,
            "tokens": self.tokens,
            "flops": self.flops,
        }


def trained(config: RunConfig, step: int) -> Trained:
    """A run of a configuration up to a step.

    Raises:
        UserError: its prepared text is gone.
    """
    task = Pretraining(config)
    shape = replace(architecture_of(task.model_config).shape_of(task.model_config), pooler=task.pairs)
    source, wanted = task.train_source(), step * config.train.global_batch
    left, epoch = min(wanted, LOOKED_AT), 0
    looked, tokens, flops = left, 0.0, 0.0
    while left:
        size = min(left, source.epoch_size(epoch))
        for first in range(0, size, _CHUNK):
            indices = np.arange(first, min(size, first + _CHUNK))
            masked = source.totals(epoch, indices)["mlm"]
            tokens += float(source.lengths(epoch, indices).sum())
            flops += training_flops(shape, source.attended(epoch, indices).tolist(), masked)
        left, epoch = left - size, epoch + 1
    share = wanted / looked
    return Trained(counts(shape), tokens * share, flops * share)
