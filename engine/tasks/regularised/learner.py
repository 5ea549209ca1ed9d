"""What regularisers ask of a fine-tuning task."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from engine.config import RunConfig
from engine.data.loading.source import MicroBatch


class Learner(Protocol):
    """A task whose loss is one of what its model returns of a micro-batch, called logits, [R, C].

    Results are shares of the global batch.
    """

    config: RunConfig
    model_config: Any

    def loss(self, logits: Tensor, batch: MicroBatch) -> Tensor:
        """That of the task alone."""
        ...

    def metrics(self, logits: Tensor, batch: MicroBatch) -> dict[str, Tensor]:
        """Shares of further curves, of logits without a graph."""
        ...

    def divergence(self, first: Tensor, second: Tensor, batch: MicroBatch) -> Tensor:
        """How far what two passes predict is apart, with gradients to both."""
        ...
