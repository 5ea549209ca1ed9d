"""How much a loss depends on each head and neuron: its derivative by a gate before the output matrix, which is 1.

Kwon et al. 2022 ("A Fast Post-Training Pruning Framework for Transformers", section 4.1): where gates close, the loss
grows by about 1/2 (1 - m)^T F (1 - m), with the empirical Fisher information F, the mean over samples of the outer
product of these derivatives.

Shape legend: N samples, U units of a sub-layer, D columns of a unit, T tokens, B sequences of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from engine.data.loading.source import Cursor, MicroBatch, SampleSource
from engine.model.pruning.units import Sublayer
from engine.tasks.finetune import FineTuning

#: sequences of a pass where the loss compares those of a batch, which single ones don't have
CONTRASTED = 32


def batches(source: SampleSource, samples: int, size: int) -> Iterator[MicroBatch]:
    """The first samples of the first epoch, in micro-batches of a size that are global batches of their own."""
    for start in range(0, samples, size):
        indices = np.arange(start, min(start + size, samples))
        described = source.describe(0, indices)
        yield MicroBatch(source.collate(described), source.totals(0, indices), Cursor())


def derivatives(
    task: FineTuning, model: nn.Module, parts: Sequence[Sublayer], samples: int, device: torch.device
) -> list[Tensor]:
    """Of each sub-layer the loss's derivative by its units' gates, fp32 [N, U], a row a sample.

    Args:
        task: whose loss and training examples they are of.
        model: in evaluation mode; its parameters get no gradient.
        samples: how many examples.
    """
    grouped = task.head == "embeddings"
    found: list[list[Tensor]] = [[] for _ in parts]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        for batch in batches(task.train_source(), samples, CONTRASTED if grouped else 1):
            with _gated(parts, device) as gates:
                task.step(model, batch.to(device)).loss.backward()
            for rows, gate in zip(found, gates, strict=True):
                assert gate.grad is not None
                rows.append(gate.grad.cpu())
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return [torch.stack(rows) for rows in found]


@contextmanager
def _gated(parts: Sequence[Sublayer], device: torch.device) -> Iterator[list[Tensor]]:
    """Open gates, [U] each, before the output matrices of sub-layers."""
    gates = [torch.ones(part.count, device=device, requires_grad=True) for part in parts]

    def hook(gate: Tensor, width: int) -> object:
        return lambda module, given: (given[0] * gate.repeat_interleave(width).to(given[0].dtype), *given[1:])

    hooks = [
        part.output.register_forward_pre_hook(hook(gate, part.width))  # type: ignore[arg-type]
        for part, gate in zip(parts, gates, strict=True)
    ]
    try:
        yield gates
    finally:
        for each in hooks:
            each.remove()


def importance(gradients: Tensor) -> Tensor:
    """The diagonal of the Fisher information, fp64 [U], from [N, U]."""
    mean: Tensor = gradients.double().square().mean(0)
    return mean


def rearranged(gradients: Tensor, kept: Tensor) -> Tensor:
    """Other units in as many places where the Fisher information of the sub-layer says that less is lost.

    Each closed unit in turn, the most important first, changes places with the open one with which 1/2 (1 - m)^T F
    (1 - m) falls most, if with any (section 4.2 of the paper, whose warm start is the mask by the diagonal alone).

    Args:
        gradients: [N, U].
        kept: [U] bool.

    Returns:
        [U] bool, with as many true.
    """
    kept = kept.clone()
    fisher = gradients.double().T @ gradients.double() / len(gradients)
    diagonal = fisher.diagonal()
    loss = fisher @ (~kept).double()  # by each gate, times -1
    closed = (~kept).nonzero()[:, 0]
    for unit in closed[diagonal[closed].argsort(descending=True)].tolist():
        change = diagonal[unit] - 2 * loss[unit] + diagonal + 2 * (loss - fisher[unit])
        change[~kept] = torch.inf
        other = int(change.argmin())
        if change[other] < 0:
            kept[unit], kept[other] = True, False
            loss += fisher[other] - fisher[unit]
    return kept
