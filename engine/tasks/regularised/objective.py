"""The loss of a micro-batch of a fine-tuning task, with what the section `regularise` adds to it.

A task tells the loss of logits, what is counted of them, and how far two of them are apart; the passes that a
regulariser needs are made here, once for all tasks.

Shapes: B sequences, T tokens in all of them, R rows of logits, C columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.data.loading.source import MicroBatch
from engine.tasks.regularised import noise
from engine.tasks.regularised.learner import Learner
from engine.tasks.task import StepOutput


def step(task: Learner, model: nn.Module, batch: MicroBatch, inputs: Mapping[str, Any]) -> StepOutput:
    """Forward pass and loss shares of one micro-batch.

    Args:
        inputs: the model's arguments: tensors of a packed batch, and `max_length`.
    """
    if task.config.regularise.r_drop:
        return _r_drop(task, model, batch, inputs)
    if task.config.regularise.adversarial != "none":
        return noise.step(task, model, batch, inputs)
    logits = model(**inputs)
    if task.config.regularise.mixup:
        return StepOutput(_mixed_loss(task, logits, batch), task.metrics(logits.detach(), batch))
    return StepOutput(task.loss(logits, batch), task.metrics(logits.detach(), batch))


def _r_drop(task: Learner, model: nn.Module, batch: MicroBatch, inputs: Mapping[str, Any]) -> StepOutput:
    """R-Drop (Liang et al. 2021, Algorithm 1): the mean loss of two passes and their divergence.

    Both passes are one of a batch that has every sequence twice, as the paper makes them (section 2): dropout draws
    another mask for each copy.
    """
    first, second = model(**doubled(inputs)).chunk(2)
    apart = task.divergence(first, second, batch)
    loss = (task.loss(first, batch) + task.loss(second, batch)) / 2 + task.config.regularise.r_drop * apart
    counted, again = (task.metrics(logits.detach(), batch) for logits in (first, second))
    metrics = {name: (share + again[name]) / 2 for name, share in counted.items()}
    return StepOutput(loss, metrics | {"r_drop": apart.detach()})


def _mixed_loss(task: Learner, logits: Tensor, batch: MicroBatch) -> Tensor:
    """Mixup (Zhang et al. 2018) of what the last linear layer is given (Guo et al. 2019, senMixup), and of the losses.

    That layer is linear, so mixtures of its inputs have mixtures of its outputs. One share for the micro-batch, and
    each example once as either partner, keep the sum of the examples' weights what it is without.
    """
    spread = torch.tensor(task.config.regularise.mixup)
    share = float(torch.distributions.Beta(spread, spread).sample())
    order = torch.randperm(len(logits)).to(logits.device)
    mixture = share * logits + (1 - share) * logits[order]
    partners = replace(batch, inputs={**batch.inputs, "labels": batch.inputs["labels"][order]})
    return share * task.loss(mixture, batch) + (1 - share) * task.loss(mixture, partners)


def doubled(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a packed batch with all of its sequences again behind them."""
    found = {name: torch.cat((value, value)) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    if "read" in inputs:
        found["read"] = torch.cat((inputs["read"], inputs["read"] + len(inputs["input_ids"])))
    return found
