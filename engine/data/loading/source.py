"""What the loader needs to know of a data set: the `SampleSource` protocol and the position in it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Cursor:
    """A position in the endless stream of epochs, in samples of the global batch.

    It counts consumed samples, not batches of a rank, so it means the same at every world size.
    """

    epoch: int = 0
    offset: int = 0
    """samples of this epoch already consumed"""
    consumed: int = 0
    """samples consumed since the start of the run"""

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


class SampleSource(Protocol):
    """A data set whose epochs are pure functions of (seed, epoch).

    `describe` runs in the training process and `collate` in loader processes; what passes between them is
    small and picklable. An index is a position in the shuffled order of its epoch.
    """

    def epoch_size(self, epoch: int) -> int:
        """Number of samples in an epoch."""
        ...

    def describe(self, epoch: int, indices: Indices) -> Any:
        """All that `collate` needs to make these samples of the epoch."""
        ...

    def join(self, descriptions: list[Any]) -> Any:
        """Descriptions of consecutive samples as one, in order: a micro-batch may span epochs."""
        ...

    def totals(self, epoch: int, indices: Indices) -> dict[str, float]:
        """Denominators of losses over these samples, e.g. {"mlm": masked tokens, "sequences": samples}."""
        ...

    def collate(self, description: Any) -> dict[str, Tensor]:
        """The described samples as one micro-batch: keyword arguments of the task's model."""
        ...


@dataclass
class MicroBatch:
    """One forward pass of one rank."""

    inputs: dict[str, Tensor]
    totals: dict[str, float]
    """denominators over the *global* batch that this micro-batch belongs to"""
    cursor: Cursor
    """position after that global batch"""
    dummy: bool = False
    """evaluation only: repeats another micro-batch so that all ranks take equally many; its results don't count"""
    again: bool = False
    """training only: a further pass over a micro-batch of this optimizer step, whose samples count there"""
    max_length: int | None = None
    """tokens of the longest sequence, known on the host so that nothing waits for a GPU; None where it isn't"""

    def to(self, device: torch.device) -> MicroBatch:
        """This micro-batch with its tensors on `device` and its longest length on the host."""
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, max_length=int(self.inputs["lengths"].max()))
