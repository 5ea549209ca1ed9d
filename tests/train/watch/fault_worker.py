"""A training command in which something goes wrong at a given batch, on a given rank.

python tests/train/watch/fault_worker.py OPTIONS trains as launch/train.py does. The environment's ACCIDENTS is a JSON
list of {"rank", "batch" (from 1; null: every one), "what"} where `what` is one of the functions below with its
argument.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from engine.data.loading.source import MicroBatch
from engine.tasks.pretrain import Pretraining
from engine.tasks.task import StepOutput
from launch.cli import run_command
from launch.train import main

#: of the runs that use this
GLOBAL_BATCH = 16
_original = Pretraining.step


def kill(number: int) -> None:
    """A signal to this rank."""
    os.kill(os.getpid(), number)


def kill_group(number: int) -> None:
    """A signal to everything that the launcher started, and to itself."""
    os.killpg(os.getpgid(0), number)


def kill_launcher(_: Any) -> None:
    """Kill -9 to the process that started this one."""
    os.kill(os.getppid(), signal.SIGKILL)


def kill_command(_: Any) -> None:
    """Kill -9 to the process that started the launcher of this node."""
    stat = Path(f"/proc/{os.getppid()}/stat").read_text()
    os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)


def sleep(seconds: float) -> None:
    """A slow rank, or one that hangs."""
    time.sleep(seconds)


def fail(message: str) -> None:
    """A defect on one rank."""
    raise AssertionError(message)


def step(self: Pretraining, model: Any, batch: MicroBatch) -> StepOutput:
    """The step of the task, with its accidents; `nan` and `huge` concern the loss."""
    number = batch.cursor.consumed // GLOBAL_BATCH
    factor = 1.0
    for accident in json.loads(os.environ["ACCIDENTS"]):
        if accident["rank"] == int(os.environ["RANK"]) and accident["batch"] in (number, None):
            name, argument = accident["what"]
            if name in ("nan", "huge"):
                factor = float("nan") if name == "nan" else 1e4
            else:
                globals()[name](argument)
    output = _original(self, model, batch)
    return StepOutput(output.loss * factor, output.metrics) if factor != 1.0 else output


if __name__ == "__main__":
    Pretraining.step = step  # type: ignore[method-assign]
    run_command(main)
