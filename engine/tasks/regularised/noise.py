"""Noise on the embeddings of words that raises the loss: FGM (Miyato et al. 2017) and FreeLB (Zhu et al. 2020).

A pass under the next noise needs the gradient by the last one, which is a leaf of the graph that the engine's backward
pass goes through. So each pass is a micro-batch of its own to the engine, with one graph at a time: nothing is
computed twice, and neither ZeRO nor recomputation sees anything unusual.

Noise is fp32 [T, H], for the packed tokens of B sequences, and each sequence has a norm of its own (L2): what other
sequences lie beside it, and how loss and gradient are scaled, changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine import dist
from engine.config import RegulariseConfig, architecture_of
from engine.data.loading.source import MicroBatch
from engine.tasks.regularised.learner import Learner
from engine.tasks.task import StepOutput


@dataclass
class Noised(MicroBatch):
    """A micro-batch in one of its passes."""

    noise: Tensor | None = None
    """what this pass adds; it requires a gradient where another pass follows"""
    number: int = 0
    """of the pass, from 0"""


def passes(task: Learner, model: nn.Module, batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
    """Each micro-batch as often as it has passes, each time under the noise that the last pass's gradient leads to.

    All passes have the same dropout: under another mask the noise would have been found for another network (Zhu et
    al. 2020, section 3.3). FreeLB's first noise comes from torch's generator, as dropout does.
    """
    chosen = task.config.regularise
    for batch in batches:
        size = (batch.inputs["input_ids"].numel(), words_of(task, model).embedding_dim)
        noise = first_noise(chosen, batch.inputs["lengths"], size)
        state = dist.rng_state()
        for number in range(chosen.passes):
            if number > 0:
                dist.set_rng_state(state)
            noise.requires_grad_(number + 1 < chosen.passes)
            yield Noised(**{**vars(batch), "again": number > 0}, noise=noise, number=number)
            if noise.requires_grad:
                assert noise.grad is not None, "the backward pass of the last pass is not done"
                noise = next_noise(chosen, noise.detach(), noise.grad, batch.inputs["lengths"])


def step(task: Learner, model: nn.Module, batch: MicroBatch, inputs: Mapping[str, Any]) -> StepOutput:
    """One pass of a micro-batch; one that `passes` has not seen is in its first.

    Of FGM the loss is that of the clean texts and that under noise, added; of FreeLB the mean of all passes.
    """
    chosen = task.config.regularise
    seen = batch if isinstance(batch, Noised) else next(passes(task, model, [batch]))
    assert isinstance(seen, Noised)
    assert seen.noise is not None
    with _added(words_of(task, model), seen.noise):
        logits = model(**inputs)
    loss, counted = task.loss(logits, batch), task.metrics(logits.detach(), batch)
    last = {"adversarial_loss": loss.detach()} if seen.number + 1 == chosen.passes else {}
    if chosen.adversarial == "fgm":
        return StepOutput(loss, last | ({} if seen.again else counted))
    metrics = {name: share / chosen.passes for name, share in counted.items()}
    return StepOutput(loss / chosen.passes, last | metrics)


def words_of(task: Learner, model: nn.Module) -> nn.Embedding:
    """The module that has a row for each token of the vocabulary."""
    ends = tuple(name.removesuffix(".weight") for name in architecture_of(task.model_config).growing)
    named = model.named_modules()
    return next(one for name, one in named if name.endswith(ends) and isinstance(one, nn.Embedding))


@contextmanager
def _added(words: nn.Module, noise: Tensor) -> Iterator[None]:
    """Inside, what the module gives has the noise added, in its own precision."""
    hook = words.register_forward_hook(lambda _, __, output: output + noise.to(output.dtype))
    try:
        yield
    finally:
        hook.remove()


def first_noise(chosen: RegulariseConfig, lengths: Tensor, size: tuple[int, int]) -> Tensor:
    """That of the first pass: FGM's is none; FreeLB's is uniform, in a cube within the ball (its Algorithm 1).

    Args:
        lengths: of the sequences [B].
        size: T and H.
    """
    noise = torch.zeros(size, device=lengths.device)
    if chosen.adversarial == "fgm":
        return noise
    edges = chosen.adversarial_norm / (lengths * size[1]).sqrt()
    return noise.uniform_(-1.0, 1.0) * _of_tokens(edges, lengths, len(noise))


def next_noise(chosen: RegulariseConfig, noise: Tensor, gradient: Tensor, lengths: Tensor) -> Tensor:
    """That of the next pass, by the gradient of the last one's loss by its noise.

    FGM goes the whole norm along the gradient (Miyato et al. 2017, section 3); FreeLB takes a step along it
    and back into the ball (Algorithm 1). A sequence whose gradient is zero, or too large for fp16, has no direction.
    """
    norms = _norms(gradient, lengths)
    scales = torch.where(norms.isfinite() & (norms > 0), 1.0 / norms, 0.0)
    direction = torch.nan_to_num(gradient, 0.0, 0.0, 0.0) * _of_tokens(scales, lengths, len(noise))
    if chosen.adversarial == "fgm":
        return chosen.adversarial_norm * direction
    moved = noise + chosen.adversarial_rate * direction
    within = (chosen.adversarial_norm / _norms(moved, lengths)).clamp(max=1.0)
    return moved * _of_tokens(within, lengths, len(noise))


def _norms(noise: Tensor, lengths: Tensor) -> Tensor:
    """Of each sequence, [B]."""
    return torch.segment_reduce(noise.square().sum(1), "sum", lengths=lengths, unsafe=True).sqrt()


def _of_tokens(values: Tensor, lengths: Tensor, tokens: int) -> Tensor:
    """A value of each sequence [B] for each of its tokens, [T, 1]."""
    return torch.repeat_interleave(values, lengths, output_size=tokens)[:, None]
