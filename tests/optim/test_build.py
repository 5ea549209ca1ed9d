"""Weight decay reaches matrices and embeddings only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import kernels
from engine.config import OptimConfig
from engine.kernels import cpu
from engine.optim import FusedAdamW, FusedLamb
from engine.optim.build import build_optimizer
from tests.conftest import ROOT

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


RANK = """
import sys, torch, torch.distributed as dist
from engine.config import OptimConfig
from engine.optim.build import build_optimizer
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
print(type(build_optimizer(torch.nn.Linear(4, 4), OptimConfig(), torch.device("cpu"))).__name__)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("compiler", "used"), [("g++", "FusedAdamW"), ("no-such-compiler", "AdamW")])
def test_ranks_use_only_kernels_that_all_of_them_have(compiler: str, used: str, tmp_path: Path) -> None:
    if not cpu.available():
        pytest.skip("no C++ compiler")
    empty = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "CXX": compiler}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path / "meeting"), str(rank)],
            cwd=ROOT,
            env={**os.environ, **(empty if rank == 1 and compiler != "g++" else {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    assert [output.split() for output, _ in told] == [[used]] * 2
    assert [log.count("plain torch runs instead on every rank") for _, log in told] == [int(used == "AdamW"), 0]
