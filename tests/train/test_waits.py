"""The host doesn't wait for the GPU between points of the curves, but where DeepSpeed asks for a norm."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.pool import Pool
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from benchmarks.zero_exactness import Case, train
from engine.config import ModelConfig
from engine.data.loading.source import Cursor, MicroBatch
from engine.kernels import dispatch
from engine.model.bert import BertForMaskedLM, BertForPreTraining
from engine.model.build import build_config
from engine.model.packing import pack
from engine.optim import FusedAdamW, FusedLamb
from engine.optim.shard import Fragment, ParameterInfo, Shard
from engine.tasks.pretrain import loss_shares
from engine.train.curves.meter import Meter
from engine.zero import engine as zero
from tests.cuda_emulator.emulated import emulated_kernels
from tests.train.waits import Waits

DEVICES = [
    "meta",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
WIDTH = 24


def batch(full: bool, pairs: bool) -> MicroBatch:
    """Three sequences, which fill the padded grid or don't."""
    lengths = [WIDTH] * 3 if full else [WIDTH, 7, 12]
    mask = torch.arange(WIDTH) < torch.tensor(lengths)[:, None]
    inputs = pack(torch.randint(5, 900, mask.shape), mask)
    inputs |= {"mlm_positions": torch.tensor([1, 5, 9, 30]), "mlm_labels": torch.tensor([7, 8, 9, 10])}
    if pairs:
        inputs["nsp_labels"] = torch.tensor([0, 1, 1])
    return MicroBatch(inputs, {"mlm": 4.0, "sequences": 3.0}, Cursor())


@contextmanager
def no_wait(device: str) -> Iterator[None]:
    """Fails for any wait inside; on a GPU torch itself raises."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with Waits(device) as waits:
        yield
    assert waits.found == []


def model_on(device: str, kind: type[nn.Module], checkpointing: bool) -> nn.Module:
    config = build_config(ModelConfig(size="tiny"), 1000)
    with torch.device(device):
        return kind(config, activation_checkpointing=checkpointing).bfloat16().train()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [BertForPreTraining, BertForMaskedLM])
@pytest.mark.parametrize("full", [False, True], ids=["masked", "full"])
def test_a_micro_batch_of_pre_training_waits_for_nothing(
    full: bool, kind: type[nn.Module], checkpointing: bool, device: str
) -> None:
    """From the batch on the host to the sums of the curves, in bf16."""
    model, meter = model_on(device, kind, checkpointing), Meter(torch.device(device))
    given = batch(full, pairs=kind is BertForPreTraining)
    if device == "cuda":
        given = replace(given, inputs={name: tensor.pin_memory() for name, tensor in given.inputs.items()})
    for _ in range(2):
        with no_wait(device):
            moved = given.to(torch.device(device))
            shares = loss_shares(model(**moved.inputs, max_length=moved.max_length), moved.totals)
            loss = torch.stack([share for name, share in shares.items() if name.endswith("loss")]).sum()
            (loss * 2).backward()
            meter.add({"loss": loss, **shares}, moved.inputs["input_ids"].numel())
            meter.end_step()
    assert all(p.grad is not None for p in model.parameters())


def flat_shard(device: str) -> Shard:
    """Pieces of two parameters in a flat tensor of ZeRO."""
    tensor = nn.Parameter(torch.zeros(48, device=device))
    infos = (ParameterInfo("a", (5, 4)), ParameterInfo("b", (24,)))
    return Shard(tensor, 0, infos, (Fragment(0, 0, 20, 0), Fragment(1, 24, 24, 0)), None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [FusedAdamW, FusedLamb])
@pytest.mark.parametrize("scale", ["number", "on the host", "on the device"])
@pytest.mark.parametrize("flat", [False, True], ids=["whole", "flat"])
def test_an_update_waits_for_nothing(flat: bool, scale: str, kind: Any, device: str) -> None:
    """Clipped by its own norm, or by a factor of DeepSpeed's; observed too."""
    shard = flat_shard(device)
    whole = [nn.Parameter(torch.zeros(shape, device=device)) for shape in ((5, 4), (24,))]
    optimizer = kind([shard.tensor] if flat else whole, lr=1e-3, max_grad_norm=0.0 if flat else 1.0)
    optimizer.lay_out([shard] if flat else [])
    factors = {"number": 0.5, "on the host": torch.tensor(0.5, dtype=torch.float64)}
    factor: Tensor | float = factors.get(scale, torch.full((), 0.5, dtype=torch.float64, device=device))
    optimizer.scale = lambda: factor
    for step in range(3):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.observing = step == 2
        if step == 0:  # tables are built
            optimizer.step()
            continue
        with no_wait(device):
            optimizer.step()


def of_a_step(case: Case) -> list[list[tuple[str, str]]]:
    """The waits of each update under DeepSpeed, where a CPU and its emulated CUDA kernels are in a GPU's place."""
    waits: list[list[tuple[str, str]]] = []
    kernels, step = emulated_kernels(), zero.ZeroEngine.step

    def watched(self: zero.ZeroEngine, rate: float, *, last_micro_batch: bool) -> None:
        with Waits("cpu") as found:
            step(self, rate, last_micro_batch=last_micro_batch)
        if last_micro_batch:
            waits.append(found.found)

    with (
        mock.patch.dict(dispatch.BACK_ENDS, cpu=lambda *_: kernels),
        mock.patch.object(zero.ZeroEngine, "step", watched),
    ):
        train(case, 0, 1)
    return waits


#: of DeepSpeed 0.19 in an update: looks for overflow, the norm, and a look at the norm
DEEPSPEEDS = (0, 3, 4, 3)
#: of ours in an update: the counter of steps, which is on the CPU, and stage 0's norm in bf16 in DeepSpeed's place
OWN = {"engine/optim/fused.py": "int(old)", "engine/zero/wrappers/stage_0.py": "float(norm)"}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_an_update_under_deepspeed_adds_no_wait_of_ours(stage: int, precision: str, one_rank: Pool) -> None:
    *_, last = one_rank.apply(of_a_step, (Case(stage, precision, "lamb", 2),))
    ours = [place for _, place in last if not place.startswith("deepspeed/")]
    lines = [line_of(place) for place in ours]
    for place, line in zip(ours, lines, strict=True):
        assert OWN[place.split(":")[0]] in line, (place, line)
    deepspeeds = [place for _, place in last if place.startswith("deepspeed/")]
    direct = sum("float(norm)" in line for line in lines)
    assert direct == (1 if (stage, precision) == (0, "bf16") else 0)
    assert len(deepspeeds) <= DEEPSPEEDS[stage]


def line_of(place: str) -> str:
    """The source of "file:line"."""
    match = re.fullmatch(r"(.+):(\d+)", place)
    assert match is not None
    from tests.conftest import ROOT

    return (ROOT / match[1]).read_text().splitlines()[int(match[2]) - 1]


def test_waits_are_seen() -> None:
    """What would wait on a GPU, and what wouldn't."""
    host, there = torch.ones(4), torch.ones(4, device="meta")
    mask = torch.ones(4, dtype=torch.bool, device="meta")
    waiting = {
        "item": lambda: float(there.sum()),
        "mask": lambda: there.__setitem__(mask, 0.0),
        "to the host": lambda: there.to("cpu", non_blocking=True),
        "from pageable memory": lambda: host.to("meta"),
        "of numbers": lambda: torch.tensor(1.0, device="meta"),
        "as tensor": lambda: torch.as_tensor(1.0, device="meta"),
        "repeat": lambda: torch.repeat_interleave(mask.long()),
    }
    for name, work in waiting.items():
        with Waits("meta") as waits, suppress(NotImplementedError, RuntimeError):  # without data there is no result
            work()
        assert waits.found, name
    with Waits("meta") as waits:
        torch.full((), 1.0, device="meta")
        host.to("meta", non_blocking=True)
        torch.repeat_interleave(mask.long(), mask.long(), output_size=4)
        there.sum() * 2.0
        float(host.sum())
    assert waits.found == []
