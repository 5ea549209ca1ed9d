"""Logits, gradients and an optimizer step with adapters are those of peft, or of plain formulas, on transformers."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from engine.config import OptimConfig
from engine.model.packing import pack
from engine.optim.build import build_optimizer
from tests.model.adapters.adapted import CASES, adapted
from tests.model.test_task_heads import HEADS, LENGTHS, padded, their_logits

BOUND = 1e-5
RATE, DECAY = 1e-3, 0.1
#: so large that an element whose gradient is rounding alone doesn't step the whole rate
EPS = 0.2


def cases() -> list[tuple[str, str, str]]:
    """ModernBERT has no biases, nor a linear layer under embeddings that a freeze leaves alone."""
    every = [
        (name, head, case)
        for name in ("bert", "modernbert")
        for head in HEADS
        if head != "embeddings"
        for case in CASES
    ]
    return [given for given in every if (given[0], given[2]) != ("modernbert", "bitfit")]


def apart(ours: Tensor, theirs: Tensor, least: float) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=least))


@pytest.mark.parametrize(("name", "head", "case"), cases())
def test_logits_gradients_and_a_step_are_theirs(name: str, head: str, case: str) -> None:
    pair = adapted(name, head, case)
    ids, mask = padded(pair.ours.config)
    expected = their_logits(pair.theirs, head, ids, mask)
    logits = pair.ours(**pack(ids, mask), max_length=max(LENGTHS))
    assert apart(logits, expected, 0.0) < BOUND
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    least = 1e-3 * max(float(parameter.grad.abs().max()) for parameter in pair.other.values())
    for key, parameter in pair.own.items():
        assert apart(parameter.grad, pair.other[key].grad, least) < BOUND, key
    assert all(p.grad is None for key, p in pair.ours.named_parameters() if key not in pair.own)
    before = {key: parameter.detach().clone() for key, parameter in pair.own.items()}
    step(pair.ours, pair.other)
    for key, parameter in pair.own.items():
        moved, right = parameter - before[key], pair.other[key] - before[key]
        assert float(right.abs().max()) > 0.01 * RATE or "key.bias" in key, key
        assert float((moved - right).abs().max()) < BOUND * max(RATE, float(before[key].abs().max())), key


def step(ours: torch.nn.Module, theirs: Mapping[str, torch.nn.Parameter]) -> None:
    """One of our optimizer, and one of torch's."""
    config = OptimConfig(weight_decay=DECAY, eps=EPS, max_grad_norm=0.0)
    own = build_optimizer(ours, config, torch.device("cpu"))
    for group in own.param_groups:
        group["lr"] = RATE
    own.step()
    decayed = {name for name, p in theirs.items() if p.ndim >= 2 and "ia3" not in name}
    groups = [
        {"params": [p for name, p in theirs.items() if name in decayed], "weight_decay": DECAY},
        {"params": [p for name, p in theirs.items() if name not in decayed], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=RATE, betas=config.betas, eps=EPS).step()
