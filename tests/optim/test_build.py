"""Weight decay reaches matrices and embeddings only."""

from __future__ import annotations

import torch
from torch import nn

from engine import kernels
from engine.config import OptimConfig
from engine.optim import FusedAdamW, FusedLamb
from engine.optim.build import build_optimizer

CPU = torch.device("cpu")


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))


def test_biases_and_layer_norm_have_no_weight_decay() -> None:
    decayed, others = build_optimizer(model(), OptimConfig(weight_decay=0.1), CPU).param_groups
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0.0
    assert [tuple(p.shape) for p in decayed["params"]] == [(5, 4), (4, 4)]
    assert [tuple(p.shape) for p in others["params"]] == [(4,), (4,), (4,)]
    assert [group["rate_multiplier"] for group in (decayed, others)] == [1.0, 1.0]


def test_frozen_parameters_are_left_out() -> None:
    net = model()
    net[0].weight.requires_grad_(False)  # type: ignore[index,union-attr]
    decayed, _ = build_optimizer(net, OptimConfig(), CPU).param_groups
    assert len(decayed["params"]) == 1


def test_a_step_before_the_loop_sets_the_rate_changes_nothing() -> None:
    net = model()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = build_optimizer(net, OptimConfig(weight_decay=0.1), CPU)
    net(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_the_named_optimizer_is_built_with_the_configured_terms() -> None:
    adamw = build_optimizer(model(), OptimConfig(betas=(0.8, 0.9), eps=1e-3), CPU)
    lamb = build_optimizer(model(), OptimConfig(name="lamb", betas=(0.8, 0.9), eps=1e-3), CPU)
    assert (type(adamw), type(lamb)) == (FusedAdamW, FusedLamb)
    for optimizer in (adamw, lamb):
        terms = {(group["betas"], group["eps"], group["max_grad_norm"]) for group in optimizer.param_groups}
        assert terms == {((0.8, 0.9), 1e-3, 0.0)}


def test_plain_torch_everywhere_means_torchs_own_adamw() -> None:
    kernels.select("reference")
    try:
        assert type(build_optimizer(model(), OptimConfig(), CPU)) is torch.optim.AdamW
    finally:
        kernels.select("auto")


def test_kernels_that_never_ran_on_a_gpu_are_not_its_default() -> None:
    assert type(build_optimizer(model(), OptimConfig(), torch.device("cuda"))) is torch.optim.AdamW
