"""Decay to the start and averages of weights against plain torch, at every ZeRO stage and precision, on one rank."""

from __future__ import annotations

from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.zero_exactness import SHAPES, Model, slope, weight
from engine.config import OptimConfig, RunConfig, TrainConfig, ZeroConfig
from engine.data.loading.loader import BatchLayout
from engine.errors import RunError
from engine.optim.average import AVERAGE, decay_at
from engine.optim.build import build_optimizer, parameter_groups
from engine.train.certificate.certificate import UpdateCertificate
from engine.zero.engine import ZeroEngine
from launch.zero.build import deepspeed_config

RATE, DECAY, AVERAGING, STEPS = 1e-2, 30.0, 0.6, 5
FRESH = ("attention.weight", "norm.bias")
CASES = [
    *((stage, "fp32", "none", name) for stage in (0, 1, 2, 3) for name in ("adamw", "lamb")),
    *((stage, "bf16", "none", "adamw") for stage in (0, 1, 2, 3)),
    (2, "fp16", "none", "lamb"),
    (0, "fp32", "none", "torch"),
    (3, "bf16", "none", "torch"),
    (2, "bf16", "cpu", "adamw"),
    (3, "fp32", "cpu", "adamw"),
]


def start(stage: int, precision: Any, offload: Any, name: str) -> tuple[ZeroEngine, RunConfig]:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # it computes correctly on CPUs, only slowly
    config = RunConfig(
        optim=OptimConfig(name="adamw" if name == "torch" else name),
        train=TrainConfig(zero_stage=stage, precision=precision),
        zero=ZeroConfig(offload_optimizer=offload),
    )
    values: dict[str, Any] = deepspeed_config(config, BatchLayout(1, 1), "cpu")
    values["zero_optimization"] |= {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    if precision == "fp16":
        values["fp16"] |= {"loss_scale": 0, "initial_scale_power": 8}
    model, terms = Model(), config.optim
    if name == "torch":
        groups = parameter_groups(model, terms)
        optimizer: Any = torch.optim.AdamW(groups, lr=0.0, betas=terms.betas, eps=terms.eps, fused=True)
    else:
        optimizer = build_optimizer(model, terms, torch.device("cpu"), stage)
    return ZeroEngine(model, optimizer, values), config


def raw(zero: ZeroEngine) -> dict[str, Tensor]:
    """The fp32 weights that are trained."""
    found = zero.wrapper.full_weights(keep=True)
    return {name: found[id(p)].clone() for name, p in zero.model.module.named_parameters()}


def own(zero: ZeroEngine) -> dict[str, Tensor]:
    """The weights that the model computes with."""
    found = {}
    for name, p in zero.model.module.named_parameters():
        with zero.wrapper.gathered(p):
            found[name] = p.detach().clone()
    return found


def trained(folder: Path, *case: Any) -> dict[str, Any]:
    """What a run of some steps keeps; the certificate watches all of them."""
    zero, config = start(*case)
    known = {name: w.numel() if name not in FRESH else 0 for name, w in ((n, weight(n)) for n in SHAPES)}
    known[next(iter(SHAPES))] -= 5  # as rows of new tokens are
    zero.decay_to_start(known, DECAY)
    zero.keep_average(AVERAGING)
    certificate = UpdateCertificate(zero, config.optim, STEPS, folder)
    weights, averages, back, inside = [raw(zero)], [], True, []
    for step in range(STEPS):
        zero.backward(zero.model(step, 0, 0))
        with certificate.watch(step + 1, RATE):
            zero.step(RATE, last_micro_batch=True)
        weights.append(raw(zero))
        before = own(zero)
        with zero.evaluating():
            inside.append(own(zero))
        after, again = own(zero), raw(zero)
        back = back and all(torch.equal(before[n], after[n]) and torch.equal(weights[-1][n], again[n]) for n in after)
        averages.append(zero.full_state_dict())
    dtype = next(iter(before.values())).dtype
    zero.model.destroy()
    verified = certificate.remaining == 0
    names = {"weights": weights, "averages": averages, "inside": inside, "back": back, "dtype": dtype}
    return {**names, "verified": verified, "known": known, "skipped": zero.skipped_steps}


def plain(known: dict[str, int], name: str) -> list[dict[str, Tensor]]:
    """Weights after each step of torch's own AdamW on whole fp32 parameters, or of our LAMB, with the pull by hand."""
    from engine.optim.fused import FusedLamb

    model = Model()
    parameters = dict(model.named_parameters())
    first = {key: p.detach().clone() for key, p in parameters.items()}
    terms = OptimConfig()
    groups = [
        {
            "params": [p for p in parameters.values() if (p.dim() > 1) is matrix],
            "weight_decay": terms.weight_decay * matrix,
        }
        for matrix in (True, False)
    ]
    kind: Any = FusedLamb if name == "lamb" else torch.optim.AdamW
    more = {"max_grad_norm": 0.0} if name == "lamb" else {}
    optimizer = kind(groups, lr=RATE, betas=terms.betas, eps=terms.eps, **more)
    found = [first]
    for step in range(STEPS):
        for key, p in parameters.items():
            p.grad = slope(key, step, 0, 0).clone()
        torch.nn.utils.clip_grad_norm_(model.parameters(), terms.max_grad_norm)
        with torch.no_grad():
            for key, p in parameters.items():
                part = slice(known[key])
                p.view(-1)[part] -= RATE * DECAY * (p.view(-1)[part] - first[key].view(-1)[part])
        optimizer.step()
        found.append({key: p.detach().clone() for key, p in parameters.items()})
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_steps_and_averages_are_those_of_plain_torch(rank: Pool, tmp_path: Path, case: tuple[Any, ...]) -> None:
    found = rank.apply(trained, (tmp_path, *case))
    assert found["verified"]
    assert found["back"], "weights after an evaluation are those before it, bit by bit"
    weights = found["weights"]
    if case[1] == "fp32":
        for ours, theirs in zip(weights, plain(found["known"], case[3]), strict=True):
            assert all(torch.allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6) for name in SHAPES)
    average = weights[1]
    for number, (exported, inside) in enumerate(zip(found["averages"], found["inside"], strict=True), 1):
        if number > 1:
            share = 1.0 - decay_at(number, AVERAGING)
            average = {name: w + share * (weights[number][name] - w) for name, w in average.items()}
        for name in SHAPES:
            torch.testing.assert_close(exported[name], average[name], rtol=1e-6, atol=1e-7)
            assert torch.equal(inside[name], exported[name].to(found["dtype"])), "an evaluation's are the export's"
    assert any(not torch.equal(weights[-1][name], found["averages"][-1][name]) for name in SHAPES)


def overflowing(stage: int, precision: str) -> list[dict[str, Tensor]]:
    """Weights and averages after a step, after one whose gradient is infinite, and after another one."""
    zero, _ = start(stage, precision, "none", "adamw")
    zero.decay_to_start({name: w.numel() for name, w in ((n, weight(n)) for n in SHAPES)}, DECAY)
    zero.keep_average(AVERAGING)
    found = []
    for step, factor in enumerate((1.0, torch.inf, 1.0)):
        zero.backward(zero.model(step, 0, 0) * factor)
        zero.step(RATE, last_micro_batch=True)
        found += [raw(zero), zero.full_state_dict()]
    assert zero.skipped_steps == 1
    shards, client = zero.wrapper.shards(), zero.wrapper.client
    assert all(AVERAGE in client.state[shard.tensor] for shard in shards)
    zero.model.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_that_fp16_skips_changes_neither(rank: Pool, stage: int) -> None:
    weights, averages, weights_2, averages_2, weights_3, _ = rank.apply(overflowing, (stage, "fp16"))
    assert all(torch.equal(weights[name], weights_2[name]) for name in SHAPES)
    assert all(torch.equal(averages[name], averages_2[name]) for name in SHAPES)
    assert not any(torch.equal(weights[name], weights_3[name]) for name in SHAPES)


def forgotten(folder: Path) -> str:
    """What the certificate says of a step before which nothing was pulled."""
    zero, config = start(2, "fp32", "none", "adamw")
    zero.decay_to_start({name: weight(name).numel() for name in SHAPES}, DECAY)
    certificate = UpdateCertificate(zero, config.optim, STEPS, folder)
    said = "nothing"
    for step in range(2):
        if step == 1:  # in the first step the weights are where they started
            zero.wrapper.client._optimizer_step_pre_hooks.clear()
        zero.backward(zero.model(step, 0, 0))
        try:
            with certificate.watch(step + 1, RATE):
                zero.step(RATE, last_micro_batch=True)
        except RunError as error:
            said = f"{step}: {error}"
    zero.model.destroy()
    return said


def test_the_certificate_misses_a_pull_that_was_left_out(rank: Pool, tmp_path: Path) -> None:
    said = rank.apply(forgotten, (tmp_path,))
    assert said.startswith("1: the update of step 2 is wrong: ")
    assert "the weights have an error of " in said
