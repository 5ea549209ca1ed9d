"""Weight decay of single parts: in the groups of the optimizer, and so in its steps and in their certificate."""

from __future__ import annotations

import re

import pytest
import torch

from engine.config import OptimConfig
from engine.config.optimizer import placed_groups
from engine.errors import UserError
from engine.optim.build import build_optimizer
from tests.model.test_task_heads import both

CPU = torch.device("cpu")
RULES = "embeddings=0, layers=0.2, layers:1-2=0.05, head=1e-1"
EXPECTED = {"embeddings": 0.0, "layer.0": 0.2, "layer.1": 0.05, "layer.2": 0.05, "classifier": 0.1, "pooler": 0.01}


def decay_by_hand(name: str, matrix: bool) -> float:
    return next(decay for part, decay in EXPECTED.items() if part in name) if matrix else 0.0


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_a_step_is_that_of_groups_made_by_hand(kind: str) -> None:
    config = OptimConfig(name=kind, decay_of=RULES)
    _, model = both("bert", "sequence_classification")
    _, other = both("bert", "sequence_classification")
    named = dict(other.named_parameters())
    groups = [{"params": [p], "weight_decay": decay_by_hand(name, p.dim() > 1)} for name, p in named.items()]
    ours = build_optimizer(model, config, CPU)
    theirs = type(ours)(groups, betas=config.betas, eps=config.eps, max_grad_norm=0.0)  # type: ignore[call-arg]
    for optimizer, trained in ((ours, model), (theirs, other)):
        for index, p in enumerate(trained.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(index))
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, named[name], rtol=1e-6, atol=1e-7)


def test_a_layer_s_rate_and_decay_divide_together() -> None:
    shapes = {f"encoder.layer.{n}.output.dense.weight": (2, 2) for n in range(3)} | {"head.bias": (2,)}
    groups = placed_groups(shapes, OptimConfig(layer_decay=0.5, decay_of="layers:2=0.3"))
    assert [(len(group.names), group.weight_decay, group.rate_multiplier) for group in groups] == [
        (1, 0.3, 0.5), (1, 0.01, 0.25), (1, 0.01, 0.125), (1, 0.0, 1.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "rules", ["embeddings", "embeddings=-1", "layer:0=1", "head=nan", "head=1,", "", "=1", "head=."]
)
def test_a_rule_that_is_none_is_refused(rules: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"optim.decay_of: {rules!r} is not allowed; ")):
        OptimConfig(decay_of=rules).validate()


@pytest.mark.parametrize("rules", ["pooler=0", "layers:7=0", "layers:1=0,encoder=0.1"])
def test_a_rule_without_effect_is_refused(rules: str) -> None:
    shapes = {"encoder.layer.1.output.dense.weight": (2, 2), "pooler.dense.bias": (2,), "classifier.weight": (2, 2)}
    with pytest.raises(UserError, match=r"is of no weight matrix that is trained and that no later rule holds"):
        placed_groups(shapes, OptimConfig(decay_of=rules))
