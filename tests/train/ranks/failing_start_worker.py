"""A training command that fails while it starts, on one rank or on all, after its loader processes were started.

python tests/train/ranks/failing_start_worker.py OPTIONS trains as launch/train.py does. The environment's FAILS is a
JSON list: the rank (null: every one), and one of the words below.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch

from engine.errors import RunError, UserError
from engine.tasks.pretrain import Pretraining
from launch.cli import run_command
from launch.train import main

ERRORS: dict[str, BaseException] = {
    "mistake": UserError("model.init_from: it can't be read here; give another"),
    "defect": AssertionError("a broken thing"),
    "memory": torch.OutOfMemoryError("no memory is left"),
    "machine": RunError("the machine is too small"),
    "interrupt": KeyboardInterrupt(),
    "exit": SystemExit(3),
}
_original = Pretraining.build_model


def build_model(self: Pretraining) -> Any:
    """The model of the task, or the failure."""
    rank, word = json.loads(os.environ["FAILS"])
    if rank in (None, int(os.environ["RANK"])):
        raise ERRORS[word]
    return _original(self)


if __name__ == "__main__":
    Pretraining.build_model = build_model  # type: ignore[method-assign]
    run_command(main)
