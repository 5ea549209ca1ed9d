"""One rank that trains a small model in many ways under the certificate, some of them spoilt, and records what it said.

python -m torch.distributed.run --nproc_per_node=N -m tests.train.certificate.verify_worker FOLDER GROUP writes
FOLDER/RANK.pt: {name of a case of the group: what `record` returns}.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine import kernels
from engine.config import OptimConfig, RunConfig, TrainConfig
from engine.data.loading.loader import resolve_layout
from engine.errors import RunError
from engine.optim.build import build_optimizer
from engine.optim.shard import Shard
from engine.train.certificate.certificate import UpdateCertificate
from engine.train.ranks.join import end_ranks, start_ranks
from engine.zero.engine import ZeroEngine
from engine.zero.wrappers.base import Wrapper
from launch.zero.build import deepspeed_config
from tests.zero.partition_worker import full_weights

RATE = 1e-3


@dataclass(frozen=True)
class Case:
    """One way to train."""

    stage: int
    precision: str
    optimizer: str
    """adamw and lamb of ours, or torch for torch.optim.AdamW"""
    accumulation: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    """of OptimConfig"""
    fault: str = ""
    """of FAULTS"""

    @property
    def name(self) -> str:
        parts = [self.stage, self.precision, self.optimizer, self.accumulation, *self.options, self.fault]
        return "-".join(str(part) for part in parts if part != "")


SOUND = [
    Case(*values)
    for values in product((0, 1, 2, 3), ("fp32", "bf16", "fp16"), ("adamw", "lamb", "torch"), (1, 2))
    if values[:2] != (0, "fp16")  # refused by the configuration
]
SPECIAL = [
    Case(2, "fp32", "lamb", options={"max_grad_norm": 0.0}),
    Case(3, "bf16", "lamb", options={"nvlamb": True}),
    Case(2, "bf16", "lamb", options={"max_trust_ratio": 0.5}),
    Case(3, "fp32", "adamw", options={"weight_decay": 0.0}),
]
SPOILT = [
    Case(2, "bf16", "lamb", fault="own norms"),
    Case(3, "fp32", "lamb", fault="own norms"),
    Case(0, "fp32", "lamb", fault="clamped ratio"),
    Case(2, "fp32", "adamw", fault="piece left out"),
    Case(3, "bf16", "lamb", fault="piece left out"),
    Case(2, "fp32", "torch", fault="piece unknown"),
    Case(3, "fp32", "torch", fault="piece unknown"),
    Case(0, "fp32", "adamw", fault="parameter left out"),
    Case(2, "bf16", "adamw", fault="stale copy"),
    Case(3, "bf16", "torch", fault="stale copy"),
    Case(0, "bf16", "lamb", fault="stale copy"),
    Case(2, "bf16", "adamw", fault="clipped twice"),
    Case(3, "fp32", "lamb", fault="clipped twice"),
    Case(0, "fp32", "adamw", fault="clipped twice"),
    Case(2, "fp32", "torch", fault="late correction"),
    Case(3, "bf16", "adamw", fault="late correction"),
    Case(0, "bf16", "lamb", fault="late correction"),
    Case(2, "bf16", "lamb", fault="decayed biases"),
    Case(3, "fp32", "torch", fault="decayed biases"),
    Case(0, "fp32", "adamw", fault="decayed biases"),
    Case(2, "fp32", "lamb", fault="moment kept"),
    Case(3, "bf16", "adamw", fault="moment kept"),
    Case(0, "fp32", "torch", fault="moment kept"),
    Case(0, "fp32", "adamw", fault="other weights on one rank"),
    Case(2, "bf16", "torch", fault="not a number"),
]
SKIPPED = [
    Case(0, "fp32", "adamw", fault="infinite gradient"),
    Case(1, "bf16", "lamb", fault="infinite gradient"),
    Case(2, "fp16", "lamb", fault="infinite gradient"),
    Case(3, "fp16", "torch", fault="infinite gradient"),
]
RAISED = [Case(stage, "fp16", "lamb", options={"max_grad_norm": 9.0}, fault="raised loss scale") for stage in (2, 3)]
#: stages and precisions at which the fast suite verifies both AdamWs besides LAMB
ADAM = ((0, "fp32"), (2, "bf16"), (3, "fp32"))
GROUPS = {
    "few": [
        *(
            case
            for case in SOUND
            if case.accumulation == 2 and (case.optimizer == "lamb" or (case.stage, case.precision) in ADAM)
        ),
        *(*SPECIAL, *SPOILT, *SKIPPED, *RAISED),
    ],
    "all": [*SOUND, *SPECIAL],
}


class Model(nn.Module):
    """As a BERT in what matters: decoder tied to the embedding, LayerNorm, biases, odd sizes, frozen positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(101, 36)
        self.position = nn.Embedding(33, 36)
        self.norm = nn.LayerNorm(36)
        self.intermediate = nn.Linear(36, 71)
        self.output = nn.Linear(71, 36)
        self.sentences = nn.Linear(36, 2)
        self.decoder = nn.Linear(36, 101)
        self.decoder.weight = self.embedding.weight
        self.position.weight.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.norm(self.embedding(ids) + self.position.weight[: ids.shape[1]])
        hidden = hidden + self.output(functional.gelu(self.intermediate(hidden)))
        tokens = functional.cross_entropy(self.decoder(hidden).float().view(-1, 101), ids.roll(1, 1).view(-1))
        return tokens + functional.cross_entropy(self.sentences(hidden[:, 0]).float(), ids[:, 0] % 2)


def engine_of(case: Case, ranks: int) -> tuple[ZeroEngine, OptimConfig]:
    """A run's own engine; clipping is active at every step."""
    name = "lamb" if case.optimizer == "lamb" else "adamw"
    optim = OptimConfig(**({"name": name, "max_grad_norm": 0.1} | case.options))
    train = TrainConfig(global_batch=4 * ranks * case.accumulation, micro_batch=4, zero_stage=case.stage)
    train.precision = case.precision  # type: ignore[assignment]
    kernels.select("reference" if case.optimizer == "torch" else "auto")
    torch.manual_seed(3)
    model = Model()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    layout = resolve_layout(train.global_batch, train.micro_batch, ranks, torch.distributed.get_rank())
    config = deepspeed_config(RunConfig(optim=optim, train=train), layout, "cpu")
    if case.stage == 3:  # so that matrices are partitioned between steps, and vectors are not
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 200
    return ZeroEngine(model, build_optimizer(model, optim, torch.device("cpu")), config), optim


def train_step(zero: ZeroEngine, number: int, certificate: UpdateCertificate, factor: float = 1.0) -> None:
    """One optimizer step on random tokens."""
    for index in range(zero.accumulation):
        generator = torch.Generator().manual_seed(1000 * number + 10 * index + torch.distributed.get_rank())
        ids = torch.randint(101, (4, 12), generator=generator)
        zero.backward(zero.model(ids) * factor / (zero.accumulation * zero.world_size))
        last = index + 1 == zero.accumulation
        with certificate.watch(number, RATE, last_micro_batch=last):
            zero.step(RATE, last_micro_batch=last)


def client(zero: ZeroEngine) -> torch.optim.Optimizer:
    wrapper = zero.model.optimizer
    return wrapper if isinstance(wrapper, torch.optim.Optimizer) else wrapper.optimizer


def around_step(zero: ZeroEngine, spoil: Callable[[], Callable[[], None]]) -> None:
    """Call `spoil` before DeepSpeed's step, and what that returned after it."""
    step = zero.model.step

    def spoilt() -> None:
        after = spoil()
        step()
        after()

    zero.model.step = spoilt


def own_norms(zero: ZeroEngine) -> str:
    """Trust ratios from the norms of a rank's pieces."""
    for layout in zero.fused._layouts.values():  # type: ignore[union-attr]
        zeros = torch.zeros(len(layout.names), 2, dtype=torch.float64)
        layout.whole_squares = lambda squares, zeros=zeros, layout=layout: zeros.index_add(0, layout.owner, squares)
    return ""


def clamped_ratio(zero: ZeroEngine) -> str:
    client(zero).param_groups[0]["max_trust_ratio"] = 1e-3
    return ""


def without_last_piece(found: list[Shard]) -> list[Shard]:
    """The shards, of which the last rank's first one lacks its last piece."""
    if torch.distributed.get_rank() + 1 < torch.distributed.get_world_size():
        return found
    return [replace(found[0], fragments=found[0].fragments[:-1]), *found[1:]]


def last_piece(zero: ZeroEngine) -> str:
    shard = zero.wrapper.shards()[0]
    return shard.parameters[shard.fragments[-1].parameter].name


def piece_left_out(zero: ZeroEngine) -> str:
    zero.fused.lay_out(without_last_piece(zero.wrapper.shards()))  # type: ignore[union-attr]
    return last_piece(zero)


def parameter_left_out(zero: ZeroEngine) -> str:
    left_out = client(zero).param_groups[0]["params"].pop(1)
    return next(name for name, p in zero.model.module.named_parameters() if p is left_out)


def stale_copy(zero: ZeroEngine) -> str:
    """The model's own parameter stays as it was, on rank 0."""
    p = zero.model.module.output.weight
    data = p.ds_tensor.data if zero.stage == 3 else p.data

    def spoil() -> Callable[[], None]:
        old = data.clone()
        return lambda: data.copy_(old) if torch.distributed.get_rank() == 0 else None

    around_step(zero, spoil)
    return "output.weight"


def clipped_twice(zero: ZeroEngine) -> str:
    scale = zero.fused.scale  # type: ignore[union-attr]
    zero.fused.scale = lambda: scale() * 0.5  # type: ignore[union-attr]
    return ""


def late_correction(zero: ZeroEngine) -> str:
    """From the second step on the number of the step is off by one."""

    def spoil() -> Callable[[], None]:
        for state in client(zero).state.values():
            state["step"] = state["step"] + 1
        return lambda: None

    around_step(zero, spoil)
    return ""


def decayed_biases(zero: ZeroEngine) -> str:
    client(zero).param_groups[1]["weight_decay"] = 0.01
    return ""


def moment_kept(zero: ZeroEngine) -> str:
    """Of the first piece of rank 0 the second moment stays as it was."""
    shard, state = zero.wrapper.shards()[0], client(zero).state
    piece = shard.fragments[0]

    def spoil() -> Callable[[], None]:
        old = {name: value.clone() for name, value in state[shard.tensor].items() if name == "exp_avg_sq"}

        def after() -> None:
            moment = state[shard.tensor]["exp_avg_sq"].view(-1)[piece.start : piece.start + piece.length]
            before = old.get("exp_avg_sq", torch.zeros_like(shard.tensor)).view(-1)
            moment.copy_(before[piece.start : piece.start + piece.length])

        return after if torch.distributed.get_rank() == 0 else lambda: None

    around_step(zero, spoil)
    return shard.parameters[piece.parameter].name


def other_weights_on_one_rank(zero: ZeroEngine) -> str:
    """By no more than rounding."""

    def after() -> None:
        if torch.distributed.get_rank() == 1:
            zero.model.module.norm.weight.data.mul_(1 + 2**-23)

    around_step(zero, lambda: after)
    return "norm.weight"


def not_a_number(zero: ZeroEngine) -> str:
    """In the last weight of the first shard on rank 0."""
    shard = zero.wrapper.shards()[0]
    piece = shard.fragments[-1]

    def after() -> None:
        if torch.distributed.get_rank() == 0:
            shard.tensor.data.view(-1)[piece.start + piece.length - 1] = torch.nan

    around_step(zero, lambda: after)
    return last_piece(zero)


def raised_loss_scale(zero: ZeroEngine) -> str:
    """In the third step."""
    zero.model.optimizer.loss_scaler.scale_window = 2
    return ""


#: what spoils an engine; returns the name of the parameter that is to blame as far as this rank knows it
FAULTS: dict[str, Callable[[ZeroEngine], str]] = {
    "own norms": own_norms,
    "clamped ratio": clamped_ratio,
    "piece left out": piece_left_out,
    "piece unknown": last_piece,  # `unknown_piece` does it
    "parameter left out": parameter_left_out,
    "stale copy": stale_copy,
    "clipped twice": clipped_twice,
    "late correction": late_correction,
    "decayed biases": decayed_biases,
    "moment kept": moment_kept,
    "other weights on one rank": other_weights_on_one_rank,
    "not a number": not_a_number,
    "raised loss scale": raised_loss_scale,
    "infinite gradient": lambda _: "",  # `record` makes it
}


@contextlib.contextmanager
def unknown_piece() -> Iterator[None]:
    """The certificate too is told of all pieces but one."""
    whole = Wrapper.shards
    with mock.patch.object(Wrapper, "shards", lambda wrapper: without_last_piece(whole(wrapper))):
        yield


def record(case: Case, ranks: int, folder: Path) -> dict[str, Any]:
    """Verify three updates.

    Returns:
        said: lines; errors: the largest of each kind; failure: the message that stopped the run; blamed: the parameter
        that should be; remaining: updates that are still to be verified; same: whether two steps without the
        certificate give the very weights that they gave with it.
    """
    zero, optim = engine_of(case, ranks)
    blamed = FAULTS[case.fault](zero) if case.fault else ""
    printed = io.StringIO()
    certificate = UpdateCertificate(zero, optim, 3, folder)
    kinds = ("weights", "exp_avg", "exp_avg_sq")
    errors, failure, weights = dict.fromkeys(kinds, 0.0), None, {}
    try:
        unknown = unknown_piece() if case.fault == "piece unknown" else contextlib.nullcontext()
        with unknown, contextlib.redirect_stdout(printed):
            for number in (1, 2, 3):
                infinite = case.fault == "infinite gradient" and number == 1
                train_step(zero, number, certificate, torch.inf if infinite else 1.0)
                for kind in kinds:
                    comparisons = [finding.comparison for finding in certificate.findings]
                    found = [one.weights if kind == "weights" else one.states[kind] for one in comparisons]
                    errors[kind] = max(errors[kind], *found, 0.0)
                weights[number] = full_weights(zero.model.module) if number == 2 else {}
    except RunError as error:
        failure = str(error)
    zero.model.destroy()
    same = None
    if not case.fault and case.accumulation == 1:
        same = all(torch.equal(weights[2][name], w) for name, w in unwatched(case, ranks, folder).items())
    remaining = certificate.remaining
    said = printed.getvalue().splitlines()
    return {"said": said, "errors": errors, "failure": failure, "blamed": blamed, "remaining": remaining, "same": same}


def unwatched(case: Case, ranks: int, folder: Path) -> dict[str, Tensor]:
    """The weights after two steps that nobody verifies."""
    zero, optim = engine_of(case, ranks)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for number in (1, 2):
            train_step(zero, number, UpdateCertificate(zero, optim, 0, folder))
    assert not printed.getvalue()
    weights = full_weights(zero.model.module)
    zero.model.destroy()
    return weights


def main(folder: str, group: str) -> None:
    world = start_ranks(timeout=timedelta(seconds=60))
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # it computes correctly on CPUs, only slowly
    gc.freeze()  # DeepSpeed collects garbage at each initialisation, and would look through all that was imported
    records = {case.name: record(case, world.size, Path(folder)) for case in GROUPS[group]}
    torch.save(records, Path(folder) / f"{world.rank}.pt")
    end_ranks(world)


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2])
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the other ranks wait in a collective, for which an ordinary exit would wait too
