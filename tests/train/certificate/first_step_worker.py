"""A training command that ends after its first step and prints the modules that are loaded then, one a line."""

from __future__ import annotations

import os
import sys
from typing import Any

from engine.train.trainer import Trainer
from launch.train import main

MARK = "loaded after the first step:"
_train_step = Trainer.train_step


def train_step_and_end(self: Trainer, *arguments: Any) -> None:
    _train_step(self, *arguments)
    print(MARK, *sys.modules, sep="\n", flush=True)
    os._exit(0)


if __name__ == "__main__":
    Trainer.train_step = train_step_and_end  # type: ignore[method-assign]
    main(sys.argv[1:])
