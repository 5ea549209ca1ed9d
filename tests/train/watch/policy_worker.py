"""Engines and runs in which the numbers go wrong, and what became of them.

python -m torch.distributed.run --nproc_per_node=2 -m tests.train.watch.policy_worker FOLDER writes FOLDER/RANK.json:
what `left_out` found for each of CASES.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from engine import dist
from engine.config import FaultConfig
from engine.data.loading.source import Cursor, MicroBatch
from engine.errors import RunError
from engine.train.certificate.recorded import range_of
from engine.train.ranks.join import end_ranks, start_ranks
from engine.train.watch.faults import FaultPolicy
from engine.zero.engine import ZeroEngine
from tests.train.certificate.verify_worker import RATE, Case, client, engine_of

STEPS = 4
CASES = [(2, "fp32", "adamw", "loss"), (2, "bf16", "lamb", "gradient"), (3, "fp32", "adamw", "spike")]


def state_of(zero: ZeroEngine) -> list[Tensor]:
    """Copies of all that an update changes on this rank: weights, masters, moments, step counters."""
    tensors = [p.ds_tensor if hasattr(p, "ds_tensor") else p for p in zero.model.module.parameters()]
    for p, state in client(zero).state.items():
        tensors += [p, *(value for _, value in sorted(state.items()) if isinstance(value, Tensor))]
    return [tensor.detach().clone() for tensor in tensors]


def trained_values(zero: ZeroEngine) -> list[Tensor]:
    """The same of the parameters' own elements, without ZeRO's padding, whose content means nothing."""
    found = []
    for shard in zero.wrapper.shards():
        flat = [shard.tensor, *(value for _, value in sorted(client(zero).state[shard.tensor].items()))]
        for tensor in (tensor.detach().reshape(-1) for tensor in flat if isinstance(tensor, Tensor)):
            found += [tensor[range_of(piece)] for piece in shard.fragments] if tensor.numel() > 1 else [tensor]
    return found


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def one_step(zero: ZeroEngine, number: int, factor: float, policy: FaultPolicy | None, loss: float) -> str | None:
    """One optimizer step, judged by the policy as a step whose loss is `loss`."""
    for index in range(zero.accumulation):
        generator = torch.Generator().manual_seed(1000 * number + 10 * index + torch.distributed.get_rank())
        ids = torch.randint(101, (4, 12), generator=generator)
        zero.backward(zero.model(ids) * factor / (zero.accumulation * zero.world_size))
        last = index + 1 == zero.accumulation
        if last and policy is not None:
            policy.judge(number, Cursor(consumed=number), loss)
        zero.step(RATE, last_micro_batch=last)
    fault = policy.after_update(number, Cursor(consumed=number)) if policy is not None else None
    return None if fault is None else f"{fault.action} {fault.kind} {fault.step}"


def left_out(stage: int, precision: str, optimizer: str, kind: str, faulty: int = 3) -> dict[str, Any]:
    """Train with a fault in a step that is skipped, and once without that step at all."""
    case = Case(stage, precision, optimizer, accumulation=2)
    ranks = dist.place()[1]
    factor = {"loss": math.nan, "gradient": math.inf, "spike": 1.0}[kind]
    loss = {"loss": math.nan, "gradient": 5.0, "spike": 500.0}[kind]
    with tempfile.TemporaryDirectory() as folder:
        zero, _ = engine_of(case, ranks)
        config = FaultConfig(non_finite="skip", spike="skip", spike_window=1)
        policy = FaultPolicy(zero, config, Path(folder), None, is_main=True)
        faults, same = [], False
        for number in range(1, STEPS + 1):
            before = state_of(zero) if number == faulty else []
            values = (factor, loss) if number == faulty else (1.0, 5.0)
            faults.append(one_step(zero, number, values[0], policy, values[1]))
            same = equal(state_of(zero), before) if number == faulty else same
        recorded = [json.loads(line) for line in (Path(folder) / "faults.jsonl").read_text().splitlines()]
    truth, _ = engine_of(case, ranks)
    for number in (number for number in range(1, STEPS + 1) if number != faulty):
        one_step(truth, number, 1.0, None, 5.0)
    return {
        "faults": [fault for fault in faults if fault],
        "nothing changed": same,
        "as without it": equal(trained_values(zero), trained_values(truth)),
        "skipped": zero.skipped_steps,
        "recorded": [
            (found["step"], found["kind"], found["action"], found["cursor"]["consumed"]) for found in recorded
        ],
    }


def trained(output: Path, options: list[str], factors: dict[int, float], stop_at: int | None = None) -> str:
    """A run of one rank in this process whose loss is multiplied at some batches (from 1); how it ended.

    With `stop_at` a SIGTERM comes before that batch.
    """
    from engine.tasks.pretrain import Pretraining
    from engine.tasks.task import StepOutput
    from engine.train.watch.preempt import Stopped, StopRequest
    from engine.train.watch.session import Session
    from engine.train.watch.watchdog import Watchdog
    from launch.configure.options import parse_given
    from launch.launcher import Launcher
    from launch.train import run
    from tests.train.runs import defaults

    original = Pretraining.step

    def step(self: Pretraining, model: Any, batch: MicroBatch) -> StepOutput:
        number = batch.cursor.consumed // 16
        if number == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        found = original(self, model, batch)
        return StepOutput(found.loss * factors[number], found.metrics) if number in factors else found

    config, given = parse_given([*defaults(options), f"--output={output}", *options])
    request = StopRequest()
    request.listen(launched=False)
    with mock.patch.object(Pretraining, "step", step):
        try:
            run(config, Launcher("none", 1), Session(config, dist.World(), request, Watchdog(output)), given)
        except Stopped:
            return "stopped"
        except RunError as error:
            return str(error)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which the pool ends this process
    return "done"


def main(folder: Path) -> None:
    world = start_ranks(1, timedelta(minutes=2))
    found = [left_out(*case) for case in CASES]
    (folder / f"{world.rank}.json").write_text(json.dumps(found))
    end_ranks(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
