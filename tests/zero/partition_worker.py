"""One rank that initialises DeepSpeed in many ways and records what the optimizer's step() gets in each.

python -m torch.distributed.run --nproc_per_node=N -m tests.zero.partition_worker FOLDER writes FOLDER/RANK.pt:
{name of a case: a record}, where a record is {"refused": message}, or what `record` returns.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import TrainConfig
from engine.errors import UserError
from engine.optim.shard import Shard
from engine.train.ranks.join import end_ranks, start_ranks
from engine.zero.wrappers.known import wrapper_of
from launch.zero.build import precision_section, zero_section


@dataclass(frozen=True)
class Case:
    """One way to initialise DeepSpeed: a run's own configuration, with changes."""

    wrapper: str
    """class that DeepSpeed wraps the optimizer in"""
    stage: int
    precision: str
    zero: dict[str, Any] = field(default_factory=dict)
    """changes of zero_optimization"""
    top: dict[str, Any] = field(default_factory=dict)
    """changes of the configuration"""
    partitioned_init: bool = False
    """build the model under zero.Init"""
    ranks: tuple[int, ...] = (1, 2, 3, 4)
    """numbers of ranks at which the case runs"""

    def config(self) -> dict[str, Any]:
        train = TrainConfig(zero_stage=self.stage, precision=self.precision)  # type: ignore[arg-type]
        sections = precision_section(train)
        if self.precision == "fp16":
            sections["fp16"]["loss_scale"] = 1  # static: skips no step; and stage 0 divides by it, never multiplies
        return {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": zero_section(self.stage, "cpu") | self.zero,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,  # 1.0 if it is left out
            "steps_per_print": 10**9,
            **sections,
            **self.top,
        }


ZERO, ZERO_3 = "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CLIENT = {"zero_force_ds_cpu_optimizer": False}
SMALL_GROUPS = {"sub_group_size": 700}
CASES = {
    "0-fp32": Case("Recorder", 0, "fp32"),
    "0-bf16": Case("FP16_UnfusedOptimizer", 0, "bf16"),
    "0-fp16": Case("FP16_UnfusedOptimizer", 0, "fp16"),
    "1-fp32": Case(ZERO, 1, "fp32"),
    "1-bf16": Case("BF16_Optimizer", 1, "bf16"),
    "1-bf16-bf16-gradients": Case(ZERO, 1, "bf16", top={"data_types": {"grad_accum_dtype": "bf16"}}),
    "1-bf16-offload": Case(ZERO, 1, "bf16", zero=OFFLOAD, top=CLIENT),
    "1-fp16": Case(ZERO, 1, "fp16"),
    "2-fp32": Case(ZERO, 2, "fp32"),
    "2-fp32-aligned": Case(ZERO, 2, "fp32", zero={"parameter_alignment": True}),
    "2-bf16": Case(ZERO, 2, "bf16"),
    "2-bf16-aligned": Case(ZERO, 2, "bf16", zero={"parameter_alignment": True}),
    "2-bf16-offload": Case(ZERO, 2, "bf16", zero=OFFLOAD, top=CLIENT),
    "2-fp16": Case(ZERO, 2, "fp16"),
    "2-round-robin": Case(ZERO, 2, "fp32", zero={"round_robin_gradients": True}),
    "3-fp32": Case(ZERO_3, 3, "fp32"),
    "3-fp32-small-groups": Case(ZERO_3, 3, "fp32", zero=SMALL_GROUPS),
    "3-fp32-none-persistent": Case(ZERO_3, 3, "fp32", zero={"stage3_param_persistence_threshold": 0}),
    "3-bf16": Case(ZERO_3, 3, "bf16"),
    "3-bf16-init": Case(ZERO_3, 3, "bf16", partitioned_init=True),
    "3-bf16-offload": Case(ZERO_3, 3, "bf16", zero=OFFLOAD | SMALL_GROUPS, top=CLIENT),
    "3-bf16-offload-parameters": Case(
        ZERO_3, 3, "bf16", zero=OFFLOAD | {"offload_param": {"device": "cpu"}}, top=CLIENT
    ),
    "3-bf16-init-small-groups": Case(ZERO_3, 3, "bf16", zero=SMALL_GROUPS, partitioned_init=True),
    "3-fp16": Case(ZERO_3, 3, "fp16"),
    "3-bf16-hierarchical": Case(ZERO_3, 3, "bf16", zero={"zero_hpz_partition_size": 2}, ranks=(4,)),
}


class Block(nn.Module):
    """Parameters whose loss has recognisable gradients: the sum of each element times its `slope`."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        self.names: dict[str, str] = {}

    def forward(self) -> Tensor:
        products = [(p.float() * slope(self.names[key], p.shape)).sum() for key, p in self._parameters.items()]  # type: ignore[union-attr]
        return torch.stack(products).sum()


class Model(nn.Module):
    """Names and odd sizes as in a BERT: decoder tied to the embedding, frozen positions, a pooler that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = Block(weight=(101, 36))
        self.position = Block(weight=(33, 36))
        self.norm = Block(weight=(36,), bias=(36,))
        self.attention = Block(weight=(36, 36), bias=(36,))
        self.intermediate = Block(weight=(71, 36), bias=(71,))
        self.output = Block(weight=(36, 71), bias=(36,))
        self.pooler = Block(weight=(5, 36), bias=(5,))
        self.sentences = Block(weight=(2, 36), bias=(2,))
        self.decoder = Block(weight=(101, 36), bias=(101,))
        self.decoder.weight = self.embedding.weight
        self.position.weight.requires_grad_(False)
        names = {id(p): name for name, p in self.named_parameters()}
        for block in self.children():
            block.names = {key: names[id(p)] for key, p in block.named_parameters()}  # type: ignore[assignment]

    def forward(self) -> Tensor:
        used = [block for name, block in self.named_children() if name != "pooler"]
        return torch.stack([block() for block in used]).sum()


def values(key: str, shape: tuple[int, ...]) -> Tensor:
    """Random numbers that belong to a key, exact in all precisions: a shift by one element can't be overlooked.

    7 random bits and a sign are what bf16 holds; exponents of 4 values are within fp16's.
    """
    generator = torch.Generator().manual_seed(int.from_bytes(key.encode(), "little") % 2**61)
    bits, exponent = torch.randint(128, shape, generator=generator), torch.randint(4, shape, generator=generator)
    sign = 1 - 2 * torch.randint(2, shape, generator=generator)
    return sign * (1 + bits / 128) * 2.0 ** (exponent - 3)


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """What a parameter is filled with at the start."""
    return values("weight of " + name, shape)


def slope(name: str, shape: tuple[int, ...]) -> Tensor:
    """The gradient that one use of a parameter has."""
    return values("slope of " + name, shape)


def update(name: str, shape: tuple[int, ...]) -> Tensor:
    """What the recording optimizer's step writes."""
    return values("update of " + name, shape)


class Recorder(torch.optim.Optimizer):
    """Records the tensors that each step() gets, and replaces every fragment by its parameter's `update`."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.mapped: dict[int, Shard] = {}
        self.calls: list[list[int]] = []
        self.gradients: dict[int, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        stepped = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if self.mapped:  # DeepSpeed steps some optimizers once while it initialises
            self.calls.append([id(p) for p in stepped])
            for p in stepped:
                self.gradients[id(p)] = p.grad.detach().float().cpu().clone().view(-1)
                write_update(self.mapped[id(p)])


def write_update(shard: Shard) -> None:
    for piece in shard.fragments:
        info = shard.parameters[piece.parameter]
        new = update(info.name, info.shape).view(-1)[piece.parameter_start :][: piece.length]
        shard.tensor.data.view(-1)[piece.start : piece.start + piece.length] = new.to(shard.tensor.device)


def build(case: Case, config: dict[str, Any]) -> Model:
    """The model, each parameter filled with its `weight`."""
    import deepspeed

    if not case.partitioned_init:
        model = Model()
        for name, p in model.named_parameters():
            p.data.copy_(weight(name, p.shape))
        return model
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = Model()
    for name, p in model.named_parameters():
        with deepspeed.zero.GatheredParameters(p, modifier_rank=0):
            if torch.distributed.get_rank() == 0:
                p.data.copy_(weight(name, p.shape))
    return model


def groups(model: Model) -> list[dict[str, Any]]:
    """Matrices and vectors, in the project's order, frozen parameters among them."""
    named = [(len(getattr(p, "ds_shape", p.shape)), p) for p in model.parameters()]
    return [{"params": [p for ndim, p in named if ndim >= 2]}, {"params": [p for ndim, p in named if ndim < 2]}]


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole model's weights on every rank; collective at stage 3."""
    import deepspeed

    gathered = {}
    for name, p in model.named_parameters():
        with deepspeed.zero.GatheredParameters(p) if hasattr(p, "ds_id") else contextlib.nullcontext():
            gathered[name] = p.detach().float().cpu().clone()
    return gathered


def record(case: Case) -> dict[str, Any]:
    """Initialise, map, take one step.

    Returns:
        wrapper: class name; shards: of each its group, parameters, fragments, whether it is split, its flat values
        before the step, and the gradient of the step; calls: of each step() the indices of its shards, None for a
        tensor that is no shard's; weights: the whole parameters after the step.
    """
    import deepspeed

    config = case.config()
    model = build(case, config)
    recorder = Recorder(groups(model))
    engine, *_ = deepspeed.initialize(model=model, optimizer=recorder, config=config)
    try:
        found = wrapper_of(engine).shards()
    except UserError as refusal:
        engine.destroy()
        return {"refused": str(refusal)}
    before = [shard.tensor.detach().cpu().clone().view(-1) for shard in found]
    recorder.mapped = {id(shard.tensor): shard for shard in found}
    engine.backward(engine())
    engine.step()
    position = {id(shard.tensor): index for index, shard in enumerate(found)}
    described = [
        {
            "group": shard.group,
            "parameters": [(info.name, info.shape) for info in shard.parameters],
            "fragments": [astuple(piece) for piece in shard.fragments],
            "split": shard.process_group is not None,
            "values": flat,
            "gradient": recorder.gradients.get(id(shard.tensor)),
        }
        for shard, flat in zip(found, before, strict=True)
    ]
    calls = [[position.get(key) for key in call] for call in recorder.calls]
    weights = full_weights(engine.module)
    wrapper = type(engine.optimizer).__name__
    engine.destroy()
    return {"wrapper": wrapper, "shards": described, "calls": calls, "weights": weights}


def main(folder: str) -> None:
    world = start_ranks(timeout=timedelta(seconds=60))
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # it computes correctly on CPUs, only slowly
    records = {name: record(case) for name, case in CASES.items() if world.size in case.ranks}
    torch.save(records, Path(folder) / f"{world.rank}.pt")
    end_ranks(world)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the other ranks wait in a collective, for which an ordinary exit would wait too
