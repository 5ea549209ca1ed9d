"""Losses of fine-tuning tasks are torch's, transformers' or the paper's; their shares add up to the global batch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine.tasks.losses import choice_grid, class_loss, label_loss, squared_distance, squared_error

CLASSES = 4
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.5])


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, CLASSES, (12,), generator=generator)
    return torch.randn(12, CLASSES, generator=generator).requires_grad_(), labels


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_a_classifiers_loss_is_torchs_over_the_whole_batch_of_two_parts(
    drawn: tuple[Tensor, Tensor], weights: Tensor | None, smoothing: float
) -> None:
    logits, labels = drawn
    total = len(labels) if weights is None else weights[labels].sum()
    parts = zip(logits.split(5), labels.split(5), strict=True)
    loss = torch.stack([class_loss(*part, weights=weights, smoothing=smoothing) / total for part in parts]).sum()
    expected = functional.cross_entropy(logits, labels, weights, label_smoothing=smoothing)
    assert torch.allclose(loss, expected, rtol=1e-6)
    ours, theirs = (torch.autograd.grad(each, logits)[0] for each in (loss, expected))
    assert torch.allclose(ours, theirs, atol=1e-7)


def test_the_ordinal_distance_is_the_papers(drawn: tuple[Tensor, Tensor]) -> None:
    """Equation 3 of Hou et al. with l = 2, by cumulated sums of both distributions."""
    logits, labels = drawn
    truth = functional.one_hot(labels, CLASSES).double()
    expected = (logits.double().softmax(1).cumsum(1) - truth.cumsum(1)).square().sum(1)
    assert torch.allclose(squared_distance(logits, labels).double(), expected, atol=1e-6)
    weighted = class_loss(logits, labels, weights=WEIGHTS, ordinal=True)
    assert torch.allclose(weighted.double(), (expected * WEIGHTS[labels]).sum(), rtol=1e-6)
    assert torch.autograd.gradcheck(squared_distance, (logits.detach().double().requires_grad_(), labels))


def test_a_far_class_costs_more_than_a_near_one() -> None:
    certain = 30.0 * torch.eye(CLASSES)
    distances = squared_distance(certain, torch.zeros(CLASSES, dtype=torch.int64))
    assert distances.tolist() == pytest.approx([0.0, 1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("summed", "mean", "columns"),
    [
        (squared_error, lambda logits, labels: functional.mse_loss(logits.squeeze(), labels.squeeze()), 1),
        (label_loss, lambda logits, labels: functional.binary_cross_entropy_with_logits(logits, labels.float()), 3),
    ],
    ids=["numbers", "several labels"],
)
def test_other_losses_are_transformers_over_the_whole_batch_of_two_parts(
    summed: Callable[[Tensor, Tensor], Tensor], mean: Callable[[Tensor, Tensor], Tensor], columns: int
) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(9, columns, generator=generator)
    labels = torch.randn(9, generator=generator) if columns == 1 else torch.rand(9, 3, generator=generator) > 0.5
    shares = [summed(*part) / labels.numel() for part in zip(logits.split(4), labels.split(4), strict=True)]
    assert torch.allclose(torch.stack(shares).sum(), mean(logits, labels), rtol=1e-6)


def test_a_grid_of_choices_leaves_out_what_a_question_lacks() -> None:
    logits = torch.tensor([[1.0], [2.0], [0.5], [-1.0], [3.0]], requires_grad=True)
    question, option = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 2])
    grid = choice_grid(logits, question, option, 2, 4)
    assert grid.tolist() == [[1.0, 2.0, -torch.inf, -torch.inf], [0.5, -1.0, 3.0, -torch.inf]]
    loss = functional.cross_entropy(grid, torch.tensor([1, 0]), reduction="sum")
    one_by_one = sum(
        functional.cross_entropy(part.squeeze(1), torch.tensor(right))
        for part, right in ((logits[:2], 1), (logits[2:], 0))
    )
    assert torch.allclose(loss, torch.as_tensor(one_by_one))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert bool(gradient.isfinite().all())
