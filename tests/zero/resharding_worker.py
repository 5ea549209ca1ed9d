"""One rank that loads saved states into many layouts, records what arrived, and saves them from each.

python -m torch.distributed.run --nproc_per_node=N -m tests.zero.resharding_worker FOLDER [OTHER] writes, in FOLDER/N,
the states that each case saved and RANK.pt: a list of what `record` returns. The first case saves the states that
`fill` made up; each following one loads those of the case before it, and those that OTHER ranks saved of another case.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.optim.fused import FusedAdamW, FusedLamb
from engine.optim.shard import Shard
from engine.train.ranks.join import end_ranks, start_ranks
from engine.zero.engine import ZeroEngine
from engine.zero.states import snapshot
from tests.zero.partition_worker import CASES, Case, build, full_weights, groups, values

#: in this order, neighbours differ in stage
ORDER = [
    "0-fp32",
    "3-bf16",
    "1-bf16",
    "3-fp32-small-groups",
    "0-bf16",
    "2-fp32-aligned",
    "3-bf16-offload",
    "2-bf16-offload",
    "0-fp16",
    "3-fp16",
    "2-fp16",
    "3-bf16-offload-parameters",
    "1-fp32",
    "3-bf16-init-small-groups",
    "2-bf16",
    "3-fp32-none-persistent",
    "1-bf16-offload",
    "3-bf16-hierarchical",
]
OPTIMIZERS = [FusedAdamW, torch.optim.AdamW, partial(FusedLamb, max_grad_norm=0.0)]
STATES = ("exp_avg", "exp_avg_sq")
STEP = 7
COUNTERS = {"global_steps": 9, "global_samples": 90, "skipped_steps": 2}
SCALER = {"cur_scale": 64.0, "cur_iter": 9, "last_overflow_iter": 4}
BUFFER = [3, 1, 2]


def truth(state: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """What a parameter's weight or state is made to be: positive fp32 numbers that no half precision holds."""
    return values(f"{state} of {name}", shape).abs() + values(f"more of {state} of {name}", shape).abs() * 2.0**-12


def frozen(name: str, shape: tuple[int, ...]) -> Tensor:
    """What a frozen parameter is made to be: exact in all precisions."""
    return values(f"frozen {name}", shape)


def start(case: Case, number: int) -> ZeroEngine:
    config = case.config() | {"gradient_accumulation_steps": 1 + number % 2}
    if case.precision == "fp16":
        config["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 3}
    model = build(case, config)
    model.register_buffer("counts", torch.zeros(3, dtype=torch.int64))
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    return ZeroEngine(model, OPTIMIZERS[number % 3](groups(model), lr=0.0), config)


def client(zero: ZeroEngine) -> torch.optim.Optimizer:
    """The optimizer that DeepSpeed was given."""
    wrapper = zero.model.optimizer
    return wrapper if isinstance(wrapper, torch.optim.Optimizer) else wrapper.optimizer


def train(zero: ZeroEngine) -> None:
    """One optimizer step."""
    for micro_batch in range(zero.accumulation):
        zero.backward(zero.model() * 1e-3)
        zero.step(1e-3, last_micro_batch=micro_batch + 1 == zero.accumulation)


def ranges(shard: Shard, tensor: Tensor) -> list[tuple[str, tuple[int, ...], slice, Tensor]]:
    """(parameter's name, its shape, range of it, that range's view) of each fragment of a shard's tensor."""
    found = []
    for piece in shard.fragments:
        info, view = shard.parameters[piece.parameter], tensor.detach().view(-1)[piece.start :][: piece.length]
        found.append((info.name, info.shape, slice(piece.parameter_start, piece.parameter_start + piece.length), view))
    return found


def fill(zero: ZeroEngine) -> None:
    """Overwrite all that a step made by what is known, padding by NaN."""
    import deepspeed

    for shard in zero.wrapper.shards():
        state = client(zero).state[shard.tensor]
        for name, tensor in {"weight": shard.tensor, **{key: state[key] for key in STATES if key in state}}.items():
            if name != "weight":
                tensor.fill_(torch.nan)
            for parameter, shape, part, view in ranges(shard, tensor):
                view.copy_(truth(name, parameter, shape).view(-1)[part])
        if state:
            state["step"] = torch.full_like(state["step"], STEP)
    for name, p in zero.model.module.named_parameters():
        if not p.requires_grad:
            gather = deepspeed.zero.GatheredParameters(p, modifier_rank=0)
            with gather if hasattr(p, "ds_id") else contextlib.nullcontext():
                p.data.copy_(frozen(name, p.shape))
    zero.model.module.counts.copy_(torch.tensor(BUFFER))
    zero.model.module.scratch.fill_(1.0)
    for name, count in COUNTERS.items():
        setattr(zero.model, name, count)
    for name, value in SCALER.items() if zero.model.fp16_enabled() else ():
        setattr(scaler(zero), name, value)


def scaler(zero: ZeroEngine) -> Any:
    wrapper = zero.model.optimizer
    return wrapper.loss_scaler if hasattr(wrapper, "loss_scaler") else wrapper.loss_scale_config


def record(zero: ZeroEngine, case: str, source: Path) -> dict[str, Any]:
    """What this rank has after it loaded the states of `source`.

    Returns:
        pieces: (state or "weight", parameter's name, range of it, values); padding: how many of the states' elements
        outside of pieces are not 0; steps: of each shard its step's type and value; distinct: whether no two are one
        tensor; model: the whole weights that the forward pass uses; full: `ZeroEngine.full_state_dict`; moments: the
        first ones as DeepSpeed gathers them; and some counters.
    """
    zero.load_states(source)
    found, pieces, padding = zero.wrapper.shards(), [], 0
    states = [client(zero).state[shard.tensor] for shard in found]
    for shard, state in zip(found, states, strict=True):
        for name, tensor in {"weight": shard.tensor, **{key: state[key] for key in STATES if key in state}}.items():
            pieces += [
                (name, parameter, part, view.cpu().clone()) for parameter, _, part, view in ranges(shard, tensor)
            ]
            if name != "weight":
                rest = tensor.clone()
                for *_, view in ranges(shard, rest):
                    view.zero_()
                padding += int(rest.count_nonzero())
    steps = [state["step"] for state in states if "step" in state]
    model = zero.model.module
    return {
        "case": case,
        "source": str(source),
        "wrapper": type(zero.model.optimizer).__name__,
        "pieces": pieces,
        "padding": padding,
        "steps": [(step.dtype, step.item()) for step in steps],
        "distinct": len({id(step) for step in steps}) == len(steps),
        "model": full_weights(model),
        "full": zero.full_state_dict(),
        "moments": whole_moments(zero),
        "buffers": (model.counts.tolist(), model.scratch.tolist()),
        "counters": {name: getattr(zero.model, name) for name in COUNTERS},
        "micro_steps": zero.model.micro_steps / zero.accumulation,
        "scaler": {name: getattr(scaler(zero), name) for name in SCALER} if zero.model.fp16_enabled() else None,
    }


def whole_moments(zero: ZeroEngine) -> dict[str, Tensor]:
    """Every trained parameter's first moment through DeepSpeed's own view of the optimizer, which stage 0 lacks."""
    from deepspeed.utils import safe_get_full_optimizer_state

    named = [] if zero.stage == 0 else list(zero.model.module.named_parameters())
    return {name: safe_get_full_optimizer_state(p, "exp_avg").cpu() for name, p in named if p.requires_grad}


def main(folder: Path, other: str | None) -> None:
    world = start_ranks(timeout=timedelta(seconds=60))
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # it computes correctly on CPUs, only slowly
    own, records, before = folder / str(world.size), [], None
    cases = [name for name in ORDER if world.size in CASES[name].ranks]
    for number, name in enumerate(cases):
        zero = start(CASES[name], number)
        far = ORDER[(number + 5) % (len(ORDER) - 1)]
        sources = ([before] if before else []) + ([folder / other / far] if other else [])
        records += [record(zero, name, source) for source in sources]
        train(zero)
        records.append({"case": name, "stepped": [float(s["step"]) for s in client(zero).state.values() if s]})
        records += [record(zero, name, source) for source in sources[:1]]  # over what the step has made
        fill(zero)
        before = own / name
        before.mkdir(parents=True, exist_ok=True)
        snapshot(zero.wrapper, copy=False).write(before)
        zero.model.destroy()
    torch.save(records, own / f"{world.rank}.pt")
    end_ranks(world)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), *(sys.argv[2:] or [None]))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the other ranks wait in a collective, for which an ordinary exit would wait too
